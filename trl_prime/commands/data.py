"""`trl-prime data ACTION NAME`: look at a data set as the trainer will read it, check it, or write it to a file.

`show` prints the first rows, with `--tokenizer` as its chat template writes them. `check` goes over all rows: what cannot be
adapted and why, how long the prompts are, and whether each gold answer can be judged. `convert` writes the adapted rows to the
file `--output`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..texts import encode_prompt
from .arguments import parse_arguments
from .dataset_arguments import FORMAT_HELP
from .models import TOKENIZER_FILES, check_model

if TYPE_CHECKING:
    from datasets import Dataset

    from ..texts import TextFormat

ACTIONS = ("show", "check", "convert")
# So many rows are shown where no number is given
_SHOWN = 3
WRITERS = {".jsonl": "to_json", ".parquet": "to_parquet"}
# So many of the bad rows are named
_NAMED = 10
# This is nobody's gold answer: a verifier that understands the gold answer can say that it is wrong
_WRONG = r"\boxed{-987654321}"


@dataclass
class DataArguments:
    """
    What is done, and the data set.

    Parameters:
        action (`str`): `"show"`: print the first rows. `"check"`: check all rows; the exit code is 2 if one is not as it has to
            be. `"convert"`: write the rows to a file.
        dataset_name (`str`): Name on the Hub, or a local file or folder.
        dataset_config (`str`, *optional*): Configuration of a data set on the Hub.
        dataset_split (`str`): Split.
        dataset_format (`str`, *optional*): How its rows are adapted, see [`~trl_prime.data.formats.DATASET_FORMATS`].
        system_prompt (`str`, *optional*): System prompt of every row.
        prompt_suffix (`str`, *optional*): Appended to every prompt.
        max_rows (`int`, *optional*): Use only the first rows. Defaults to 3 for `"show"`, and to all.
        tokenizer (`str`, *optional*): Model, or folder of a run, whose chat template and tokens are meant.
        max_prompt_length (`int`, *optional*): For `"check"`: prompts with more tokens count as too long.
        output (`str`, *optional*): For `"convert"`: file for the adapted rows without the malformed ones, `.jsonl` or `.parquet`.
    """

    action: str = field(
        metadata={
            "help": "show: print the first rows. check: find malformed rows, long prompts and gold answers that cannot be "
            "judged; exit code 2 if there is one. convert: write the rows to a file.",
            "choices": ACTIONS,
        }
    )
    dataset_name: str = field(metadata={"help": "Name on the Hub, or a local file or folder."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a data set on the Hub."})
    dataset_split: str = field(default="train", metadata={"help": "Split."})
    dataset_format: str | None = field(default=None, metadata={"help": FORMAT_HELP})
    system_prompt: str | None = field(default=None, metadata={"help": "System prompt of every row."})
    prompt_suffix: str | None = field(
        default=None, metadata={"help": "Appended to every prompt: 'math' or 'code', the paper's, or a text."}
    )
    max_rows: int | None = field(
        default=None, metadata={"help": f"Use only the first rows. Defaults to {_SHOWN} for show, and to all."}
    )
    tokenizer: str | None = field(
        default=None,
        metadata={"help": "Model, or folder of a run, whose chat template is shown and whose tokens are counted."},
    )
    max_prompt_length: int | None = field(
        default=None, metadata={"help": "For check: prompts with more tokens count as too long; needs --tokenizer."}
    )
    output: str | None = field(
        default=None,
        metadata={"help": "For convert: file of the rows, without malformed ones: FILE.jsonl or FILE.parquet."},
    )

    def __post_init__(self):
        for name in ("max_rows", "max_prompt_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, but must be at least 1.")
        if self.action == "show" and self.max_rows is None:
            self.max_rows = _SHOWN
        if self.max_prompt_length is not None and not (self.tokenizer and self.action == "check"):
            raise ValueError("max_prompt_length counts tokens while checking: it goes with `check` and --tokenizer.")
        if self.tokenizer is not None and self.action == "convert":
            raise ValueError("convert writes messages, which no chat template has rendered: leave --tokenizer out.")
        if self.output is None and self.action == "convert":
            raise ValueError("convert needs --output, the file that it writes: FILE.jsonl or FILE.parquet.")
        if self.output is not None and self.action != "convert":
            raise ValueError(f"output is {self.output!r}, but {self.action} writes no file: use convert.")
        if self.output is not None and Path(self.output).suffix not in WRITERS:
            raise ValueError(f"output is {self.output!r}, but files are written that end in {' or '.join(WRITERS)}.")
        if self.output is not None and Path(self.output).exists():
            raise ValueError(f"output is {self.output!r}, which is there already. Remove it, or give another name.")


def prepare(argv: list[str]) -> Callable[[], int]:
    """The job of showing, checking or converting a data set."""
    (arguments,) = parse_arguments([DataArguments], argv, prog="trl-prime data", positional=["action", "dataset_name"])
    check_model("tokenizer", arguments.tokenizer, filenames=TOKENIZER_FILES)

    from transformers import AutoTokenizer

    from ..data.adapters import MALFORMED, load_prime_dataset
    from ..implicit_prm.files import saved_text_format
    from ..texts import TextFormat

    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer) if arguments.tokenizer else None
    text_format = (saved_text_format(arguments.tokenizer) if arguments.tokenizer else None) or TextFormat()
    dataset = load_prime_dataset(
        arguments.dataset_name,
        arguments.dataset_format,
        split=arguments.dataset_split,
        config=arguments.dataset_config,
        system_prompt=arguments.system_prompt,
        prompt_suffix=arguments.prompt_suffix,
        on_error="mark",
    )
    if arguments.max_rows is not None:
        dataset = dataset.select(range(min(arguments.max_rows, len(dataset))))
    malformed: dict[int, str] = {}
    if MALFORMED in dataset.column_names:
        malformed = {i: reason for i, reason in enumerate(dataset[MALFORMED]) if reason is not None}
        dataset = dataset.remove_columns(MALFORMED)
    numbers = [i for i in range(len(dataset)) if i not in malformed]
    dataset = dataset.select(numbers)

    def job() -> int:
        if arguments.action == "show":
            show_rows(dataset, numbers, malformed, tokenizer, text_format)
        elif arguments.action == "check":
            is_sound = check_rows(dataset, numbers, malformed, tokenizer, arguments.max_prompt_length, text_format)
            return 0 if is_sound else 2
        else:
            getattr(dataset, WRITERS[Path(arguments.output).suffix])(arguments.output)
            print(f"{len(dataset)} rows in {arguments.output}; {len(malformed)} malformed ones are left out.")
        return 0

    return job


def show_rows(
    dataset: Dataset,
    numbers: list[int],
    malformed: dict[int, str],
    tokenizer: Any = None,
    text_format: TextFormat | None = None,
) -> None:
    """
    Print rows.

    Args:
        dataset (`Dataset`): Adapted rows, without malformed ones.
        numbers (`list[int]`): Number of each of these rows in the source.
        malformed (`dict[int, str]`): The malformed rows of the source: number and reason.
        tokenizer (*optional*): Its chat template writes the messages.
        text_format ([`~trl_prime.texts.TextFormat`], *optional*): How a run has rendered them.
    """
    from rich.console import Console
    from rich.panel import Panel
    from rich.text import Text

    console = Console()
    for number, row in zip(numbers, dataset, strict=True):
        text = Text()
        for name, value in row.items():
            if name in ("prompt", "messages"):
                text.append(f"{_written(value, tokenizer, text_format, name == 'prompt')}\n")
            elif value is not None:
                text.append(f"\n{name}: ", style="bold").append(_shortened(str(value)))
        console.print(Panel(text, title=f"row {number}", title_align="left"))
    if malformed:
        print(f"{len(malformed)} malformed:")
        _name(malformed.values())


def check_rows(
    dataset: Dataset,
    numbers: list[int],
    malformed: dict[int, str],
    tokenizer: Any = None,
    max_prompt_length: int | None = None,
    text_format: TextFormat | None = None,
) -> bool:
    """
    Check rows and print what was found.

    Args:
        dataset (`Dataset`): Adapted rows, without malformed ones.
        numbers (`list[int]`): Number of each of these rows in the source.
        malformed (`dict[int, str]`): The malformed rows of the source: number and reason.
        tokenizer (*optional*): Counts the tokens of the prompts.
        max_prompt_length (`int`, *optional*): Longer prompts are too long.
        text_format ([`~trl_prime.texts.TextFormat`], *optional*): How a run has rendered the prompts.

    Returns:
        `bool`: whether everything is as it has to be.
    """
    print(f"{len(numbers) + len(malformed)} rows, {len(malformed)} malformed")
    _name(malformed.values())
    abilities = Counter(dataset["ability"]) if "ability" in dataset.column_names else {}
    for ability, count in sorted(abilities.items(), key=str):
        print(f"  {ability}: {count}")
    too_long: list[str] = []
    if tokenizer is not None and "prompt" in dataset.column_names and len(dataset):
        from ..texts import TextFormat

        form = text_format or TextFormat()
        lengths = [len(encode_prompt(tokenizer, prompt, form)) for prompt in _tracked(dataset["prompt"], "tokens")]
        ordered = sorted(lengths)
        median, high = (ordered[min(int(share * len(ordered)), len(ordered) - 1)] for share in (0.5, 0.95))
        print(f"prompts of {ordered[0]} to {ordered[-1]} tokens, median {median}, 95 % up to {high}")
        if max_prompt_length is not None:
            too_long = [
                f"row {i}: {length} tokens"
                for i, length in zip(numbers, lengths, strict=True)
                if length > max_prompt_length
            ]
            print(f"{len(too_long)} prompts with more than {max_prompt_length} tokens")
            _name(too_long)
    unjudged: list[str] = []
    if "prompt" in dataset.column_names and not {"solution", "tests"} & set(dataset.column_names):
        print(
            f"{len(dataset)} rows without 'solution' and 'tests', which the verifiers read: name the column of the gold answer "
            "(dataset_format: question_answer(answer='...')), or judge them by a reward function of your own"
        )
    else:
        unjudged = [f"row {numbers[i]}: {reason}" for i, reason in unjudged_rows(dataset)]
        print(f"{len(unjudged)} rows whose gold answer or tests cannot be judged")
        _name(unjudged)
    return not (malformed or too_long or unjudged)


def unjudged_rows(dataset: Dataset, batch_size: int = 256) -> Iterator[tuple[int, str]]:
    """
    Rows that a verifier could not judge by.

    A gold answer has to be judged equal to itself, and another answer to be judged at all; tests have to be of a form that the
    code reward reads. Whether they are right is not checked.

    Args:
        dataset (`Dataset`): Adapted rows; columns `solution`, `tests` and `ability`, as far as there are any.
        batch_size (`int`): Answers judged at a time.

    Yields:
        `tuple[int, str]`: place in the data set, and the reason.
    """
    from ..rewards.answers import extract_gold
    from ..rewards.code_tests import read_tests
    from ..rewards.math_rewards import MathReward

    columns = {name: dataset[name] for name in ("solution", "tests", "ability") if name in dataset.column_names}
    if not {"solution", "tests"} & set(columns):
        return  # finished conversations
    abilities = columns.get("ability", [None] * len(dataset))
    solutions, tests = (columns.get(name, [None] * len(dataset)) for name in ("solution", "tests"))
    golds = []
    for i, (ability, solution, test) in enumerate(zip(abilities, solutions, tests, strict=True)):
        if ability == "reasoning_gym":
            continue  # its adapter has asked the scorer
        if ability == "math" or (ability is None and solution is not None):
            golds.append((i, solution))
            continue
        try:
            if read_tests(test) is None:
                yield i, "no tests"
        except ValueError as error:
            yield i, str(error)
    if not golds:
        return
    reward = MathReward()
    for start in _tracked(range(0, len(golds), batch_size), "gold answers"):
        batch = golds[start : start + batch_size]
        texts = [gold for _, gold in batch]
        same = reward([rf"\boxed{{{extract_gold(gold)}}}" for gold in texts], texts)
        wrong = reward([_WRONG] * len(batch), texts)
        for (i, gold), is_same, is_wrong in zip(batch, same, wrong, strict=True):
            if is_same is None or is_wrong is None:
                yield i, f"the gold answer {str(gold)[:80]!r} is not understood"
            elif is_same != 1:
                yield i, f"the gold answer {str(gold)[:80]!r} does not equal itself"
    reward.close()


def _written(messages: Any, tokenizer: Any, text_format: Any, add_generation_prompt: bool) -> str:
    if isinstance(messages, str):
        return messages
    if tokenizer is not None:
        from ..texts import TextFormat

        form = text_format or TextFormat()
        return form.render(tokenizer, messages, add_generation_prompt=add_generation_prompt)
    return "\n".join(f"[{message['role']}] {message['content']}" for message in messages)


def _shortened(text: str, length: int = 500) -> str:
    return text if len(text) <= length else f"{text[:length]}... ({len(text)} characters)"


def _tracked(items: Any, description: str) -> Any:
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(items, description, console=console, transient=True, disable=not console.is_terminal)


def _name(reasons: Any) -> None:
    reasons = list(reasons)
    for reason in reasons[:_NAMED]:
        print(f"  {reason}")
    if len(reasons) > _NAMED:
        print(f"  ... and {len(reasons) - _NAMED} more")
