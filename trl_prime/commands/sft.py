"""`trl-prime sft`: supervised warm-up of a base model by TRL's `SFTTrainer`, on a data set with finished conversations.

PRIME starts from a model that can solve some of its problems (the paper: Eurus-2-7B-SFT). A recipe holds fields of TRL's
`SFTConfig` and `ModelConfig` and of `DatasetArguments`, and flags of accelerate's launcher. `dataset_format` makes the
conversations; on data that is in TRL's form already, `trl sft` does the same.
"""

from __future__ import annotations

from .dataset_arguments import DatasetArguments, load_split
from .launching import check_launch, launch_if_asked, parse_launched_arguments
from .train import check_model_name, model_init_kwargs, resume_point
from .work import work


def run(argv: list[str]) -> int:
    """Train by a recipe; the exit code."""
    from trl import ModelConfig, SFTConfig

    types = [DatasetArguments, SFTConfig, ModelConfig]
    exit_code = launch_if_asked(types, argv, "trl-prime sft")
    if exit_code is not None:
        return exit_code
    script_args, args, model_args = parse_launched_arguments(types, argv, "trl-prime sft")
    check_launch(args.world_size, args.bf16)
    if not (model_args.model_name_or_path and script_args.dataset_name):
        raise ValueError("Give `model_name_or_path` and `dataset_name`.")
    for name in ("dataset_ability", "max_prompt_length"):
        if getattr(script_args, name) is not None:
            raise ValueError(f"{name} is for data sets of prompts: leave it out. `max_length` shortens conversations.")
    resume_from = resume_point(args)
    check_model_name("model_name_or_path", model_args.model_name_or_path)

    from trl import SFTTrainer, get_peft_config, get_quantization_config

    model = model_args.model_name_or_path
    with args.main_process_first(desc="loading the data set"):
        train_dataset = load_split(script_args, script_args.dataset_train_split, model, messages="messages")
        eval_dataset = None
        if args.eval_strategy != "no":
            eval_dataset = load_split(script_args, script_args.dataset_test_split, model, messages="messages")
    args.model_init_kwargs = model_init_kwargs(args, model_args)
    trainer = SFTTrainer(
        model=model,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        peft_config=get_peft_config(model_args),
        quantization_config=get_quantization_config(model_args),
    )
    with work():
        trainer.train(resume_from_checkpoint=resume_from)
        trainer.save_model(args.output_dir)
        trainer.save_state()
        if args.push_to_hub:
            trainer.push_to_hub(dataset_name=script_args.dataset_name)
    return 0
