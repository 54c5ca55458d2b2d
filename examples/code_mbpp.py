"""Code: all weights are trained on MBPP, and every program of the policy is run on its row's tests in the sandbox.

Run it by `python examples/code_mbpp.py`, or on several GPUs by `accelerate launch examples/code_mbpp.py`. It needs
`pip install "trl-prime[code]"` and Linux; `trl-prime env` tells which sandbox this machine has. Batch and lengths are a start for
one GPU of 80 GB; they have not been tried on one.
"""

from trl_prime import PRIMEConfig, PRIMETrainer, load_prime_dataset
from trl_prime.rewards import code_reward

MODEL = "Qwen/Qwen2.5-Coder-0.5B-Instruct"
DATA = {"name_or_path": "google-research-datasets/mbpp", "format": "mbpp", "config": "full", "prompt_suffix": "code"}


def main():
    trainer = PRIMETrainer(
        model=MODEL,
        reward_funcs=code_reward,  # 1 if all tests pass, else 0; CodeReward(scoring="fraction") gives part marks
        args=PRIMEConfig(
            "runs/code-mbpp",
            # 16 problems x 8 completions = 16 x 8
            per_device_train_batch_size=16,
            gradient_accumulation_steps=8,
            num_generations=8,
            max_completion_length=512,
            # Not given, learning_rate, prm_learning_rate and prm_beta follow what is trained and how long completions are
            # A line of a program is a step
            process_reward_granularity="step",
            # Programs that almost pass are few: twice as many are generated, and groups with right and wrong ones kept
            oversample_factor=2,
            max_steps=100,
            logging_steps=1,
            save_steps=50,
            log_completions=True,
        ),
        train_dataset=load_prime_dataset(**DATA),
    )
    trainer.train()
    trainer.save_model()
    for name in ("reward", "filter/pass_rate", "code_reward/no_program", "prm/pairwise_accuracy"):
        values = [row[name] for row in trainer.state.log_history if row.get(name) is not None]
        print(f"{name}: {values[0]:.3f} at first, {values[-1]:.3f} at last" if values else f"{name}: not logged")


if __name__ == "__main__":
    main()
