"""The data set of a recipe: its fields, which part of it is held out, and how that of `trl-prime train` is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trl import ScriptArguments

from ..texts import encode_prompt

if TYPE_CHECKING:
    from ..texts import TextFormat

FORMAT_HELP = (
    "How the rows of dataset_name (Hub, local file or folder) are adapted: eurus2_rl, eurus2_sft, gsm8k, math, math500, "
    "question_answer, humaneval, mbpp or reasoning_gym, with options if need be: gsm8k(question='problem')."
)


@dataclass
class SplitArguments(ScriptArguments):
    """
    The held-out part of a recipe's data set.

    Parameters:
        dataset_test_split (`str`, *optional*): Split that is evaluated on where `eval_strategy` asks for it; `"test"` if not
            given.
        eval_split_size (`float`, *optional*): Hold out so many prompts of the train split, or this share of them, with all of
            their rows. They are drawn by `data_seed`, or `seed`. Takes the place of a test split.
    """

    dataset_test_split: str | None = field(
        default=None,
        metadata={"help": "Split that is evaluated on where eval_strategy asks for it. Defaults to test."},
    )
    eval_split_size: float | None = field(
        default=None,
        metadata={
            "help": "Hold out so many prompts of the train split, or this share of them if below 1, and evaluate on them. Takes "
            "the place of a test split."
        },
    )

    def __post_init__(self):
        from ..data.splits import check_split_size

        if self.eval_split_size is None:
            return
        check_split_size(self.eval_split_size)
        if self.dataset_test_split is not None:
            raise ValueError(
                f"eval_split_size is {self.eval_split_size:g} and dataset_test_split is {self.dataset_test_split!r}, but a run has "
                "one held-out part. Leave one of them out."
            )
        if self.dataset_streaming:
            raise ValueError(
                f"eval_split_size is {self.eval_split_size:g}, but of a data set that is streamed no part can be drawn. Leave out "
                "dataset_streaming, or give dataset_test_split and eval_strategy instead."
            )

    def load_splits(self, load: Callable[[str], Any], args: Any) -> tuple[Any, Any]:
        """
        The rows to train on and the held-out ones.

        Args:
            load (`Callable[[str], Dataset]`): Loads the split of a name, with a column `prompt`.
            args ([`~transformers.TrainingArguments`]): Of the run.

        Returns:
            `tuple[Dataset, Dataset | None]`: None where nothing is to be evaluated on.

        Raises:
            ValueError: Nothing would be left to train on.
        """
        from ..data.splits import split_by_prompt

        train_dataset = load(self.dataset_train_split)
        if self.eval_split_size is not None:
            seed = args.seed if args.data_seed is None else args.data_seed
            return split_by_prompt(train_dataset, self.eval_split_size, seed)
        if args.eval_strategy != "no":
            return train_dataset, load(self.dataset_test_split or "test")
        return train_dataset, None


@dataclass
class DatasetArguments(SplitArguments):
    """
    The data set of a recipe.

    Parameters:
        dataset_format (`str`, *optional*): How the rows of `dataset_name` are adapted: a key of
            [`~trl_prime.data.formats.DATASET_FORMATS`], with options if need be, `gsm8k(question='problem')`. Not given,
            the data set has a `prompt` and what the rewards read. `dataset_name` may be a local file or folder.
        dataset_ability (`str`, *optional*): Only the rows with this in their column `ability` are used: `"math"`, `"code"`.
        system_prompt (`str`, *optional*): System prompt of every row; replaces the one that is there.
        prompt_suffix (`str`, *optional*): Appended to every prompt: `"math"` or `"code"`, the paper's, or a text.
        plain_prompts (`bool`): Prompts are plain text, for base models without a chat template.
        on_malformed_row (`str`): `"raise"`, or `"skip"` to leave out rows that cannot be adapted.
        max_prompt_length (`int`, *optional*): Rows whose prompt has more tokens are left out; tokens of images do not count.
    """

    dataset_format: str | None = field(
        default=None,
        metadata={"help": f"{FORMAT_HELP} Not given, the data set has a prompt and what the rewards read."},
    )
    dataset_ability: str | None = field(
        default=None, metadata={"help": "Use only the rows with this in their column `ability`: math or code."}
    )
    system_prompt: str | None = field(
        default=None, metadata={"help": "System prompt of every row; replaces the one that is there."}
    )
    prompt_suffix: str | None = field(
        default=None, metadata={"help": "Appended to every prompt: 'math' or 'code', the paper's, or a text."}
    )
    plain_prompts: bool = field(
        default=False, metadata={"help": "Prompts are plain text, for base models without a chat template."}
    )
    on_malformed_row: str = field(
        default="raise",
        metadata={
            "help": "'raise', or 'skip' to leave out rows that cannot be adapted.",
            "choices": ["raise", "skip"],
        },
    )
    max_prompt_length: int | None = field(
        default=None, metadata={"help": "Leave out rows whose prompt has more tokens, those of images not counted."}
    )


def load_split(
    arguments: DatasetArguments,
    split: str,
    tokenizer_name: str,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> Any:
    """
    A split of the recipe's data set, in the form that the trainer reads.

    Args:
        arguments ([`DatasetArguments`]): Fields of the recipe.
        split (`str`): Its name.
        tokenizer_name (`str`): Model whose tokens `max_prompt_length` counts.
        chat_template_kwargs (`dict`, *optional*): Arguments that the run renders prompts with.

    Returns:
        `Dataset` or `IterableDataset`: the rows.

    Raises:
        ValueError: The data set is not what the recipe says, or nothing is left of it.
    """
    from ..data.adapters import load_prime_dataset
    from ..data.formats import DATASET_FORMATS
    from ..specs import parse_call

    name = parse_call(arguments.dataset_format or "")[0]
    if name in DATASET_FORMATS and "prompt" not in DATASET_FORMATS[name].features:
        raise ValueError(
            f"dataset_format is {name!r}, which makes finished conversations for supervised fine-tuning. Train on a format "
            "that makes prompts."
        )
    dataset = load_prime_dataset(
        arguments.dataset_name,
        arguments.dataset_format,
        split=split,
        config=arguments.dataset_config,
        streaming=arguments.dataset_streaming,
        system_prompt=arguments.system_prompt,
        prompt_suffix=arguments.prompt_suffix,
        plain_prompts=arguments.plain_prompts,
        on_error=arguments.on_malformed_row,
    )
    if arguments.dataset_ability is not None:
        dataset = dataset.filter(_has_ability, fn_kwargs={"ability": arguments.dataset_ability})
    if arguments.max_prompt_length is not None:
        from transformers import AutoTokenizer

        from ..texts import TextFormat

        tokenizer = AutoTokenizer.from_pretrained(tokenizer_name)
        text_format = TextFormat(chat_template_kwargs=chat_template_kwargs or {})
        limits = {"tokenizer": tokenizer, "text_format": text_format, "max_length": arguments.max_prompt_length}
        dataset = dataset.filter(_is_short, fn_kwargs=limits)
    if hasattr(dataset, "num_rows") and not dataset.num_rows:
        raise ValueError(
            f"No row of {arguments.dataset_name!r} is left: dataset_ability is {arguments.dataset_ability!r}, "
            f"max_prompt_length is {arguments.max_prompt_length}."
        )
    return dataset


def _has_ability(row: dict[str, Any], ability: str) -> bool:
    return row.get("ability") == ability


def _is_short(row: dict[str, Any], tokenizer: Any, text_format: TextFormat, max_length: int) -> bool:
    return len(encode_prompt(tokenizer, row["prompt"], text_format)) <= max_length
