"""Training runs that go wrong on one of two processes, for `torchrun`: `faulty_run.py FOLDER`.

Each process writes what was raised in a run and the weights that were left. In the last run one process dies.
"""

import os
import sys
from pathlib import Path

import torch
from conftest import build_model, build_tokenizer, row_rewards
from datasets import Dataset
from distributed_run import rollout

from trl_prime import PRIMEConfig, PRIMETrainer

RANK = int(os.environ["RANK"])


def break_logits(trainer, model, step):
    """Let a model of the second process give NaN from a step on."""
    if RANK == 1:
        model.model.norm.register_forward_hook(
            lambda module, args, states: states * float("nan") if trainer.state.global_step >= step else None
        )


def dying(completions, trainer_state, **kwargs):
    if RANK == 1 and trainer_state.global_step == 1:
        os._exit(3)
    return [float(i % 2) for i in range(len(completions))]


def unlearnable(completions, trainer_state, **kwargs):
    """Nothing to learn after the first step."""
    return [float(i % 2 and trainer_state.global_step == 0) for i in range(len(completions))]


def run(folder, name, break_it=None, reward=None, **settings):
    args = PRIMEConfig(
        output_dir=str(folder / name),
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=4,
        max_completion_length=10,
        max_steps=3,
        logging_steps=1,
        report_to=[],
        learning_rate=1e-2,
        prm_learning_rate=1e-2,
        prm_beta=0.5,
        accuracy_low=0.2,
        accuracy_high=0.8,
        gradient_checkpointing=False,
        save_strategy="steps",
        save_steps=1,
        disable_tqdm=True,
        num_generations=4,
        **settings,
    )
    trainer = PRIMETrainer(
        model=build_model(7, scale=4.0),
        reward_funcs=reward or row_rewards((1.0, 0.0)),
        args=args,
        train_dataset=Dataset.from_list([{"prompt": f"{i}+{i % 7}="} for i in range(40)]),
        processing_class=build_tokenizer(),
        rollout_func=rollout,
    )
    if break_it is not None:
        break_it(trainer)
    raised = ""
    try:
        trainer.train()
    except FloatingPointError as error:
        raised = str(error)
    models = {"policy": trainer.model, "prm": trainer.implicit_prm.model}
    state = {part: {k: v.detach() for k, v in model.named_parameters()} for part, model in models.items()}
    torch.save({"raised": raised, **state}, folder / f"{name}_{RANK}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    run(folder, "policy", lambda trainer: break_logits(trainer, trainer.model, 1))
    run(folder, "prm", lambda trainer: break_logits(trainer, trainer.implicit_prm.model, 1))
    run(folder, "unlearnable", reward=unlearnable)
    run(folder, "dying", reward=dying)
