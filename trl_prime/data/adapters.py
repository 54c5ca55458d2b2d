r"""Bring public data sets into TRL's conversational prompt format, with the columns that the verifiers read.

`load_prime_dataset` reads a data set, from the Hub or from local files, and adapts it by a named format; `DATASET_FORMATS`
lists them. Whatever the format, an adapted data set has the same columns of the same types, so that data sets of several
kinds can be concatenated:

| column | holds |
|---|---|
| `prompt` | messages, `[{"role": ..., "content": ...}]` |
| `solution` | right answer of a mathematics problem, as bare text or LaTeX, or None |
| `tests` | tests of a code problem as a JSON object (see `code_reward`), or None |
| `ability` | `"math"`, `"code"` or `"reasoning_gym"`: picks the verifier |
| `data_source` | name of the source |
| `index` | the row's id in its source, as a string, or None |

A column `image` or `images` stays beside them, for vision-language models: TRL puts the images before the text of the first user
message, and the marks `<image>` that some data sets have for them are taken out.

A row that cannot be adapted is refused with its index and the reason, or left out and counted.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.compute
from datasets import Dataset, Features, IterableDataset, Value, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError
from datasets.load import CachedDatasetModuleFactory

from ..specs import check_options, nearest, parse_call
from ..texts import is_text_or_messages, prompt_text
from ..version import __version__
from .formats import DATASET_FORMATS, PROMPT_SUFFIXES
from .rows import MalformedRow, with_system_prompt

if TYPE_CHECKING:
    from .rows import Messages

logger = logging.getLogger(__name__)

_READERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
# This column tells why a row could not be adapted; it exists while rows are adapted, and after that with on_error="mark"
MALFORMED = "__malformed__"
ON_ERROR = ("raise", "skip", "mark")
# TRL shows the policy what is in these columns
IMAGE_COLUMNS = ("image", "images")
_IMAGE_MARK = "<image>"


def load_prime_dataset(
    name_or_path: str,
    format: str | None = None,
    *,
    split: str = "train",
    config: str | None = None,
    streaming: bool = False,
    system_prompt: str | None = None,
    prompt_suffix: str | None = None,
    plain_prompts: bool = False,
    on_error: str = "raise",
    **options: Any,
) -> Dataset | IterableDataset:
    """
    Load a data set and bring it into the form that [`PRIMETrainer`] and the verifiers read.

    Args:
        name_or_path (`str`): Name on the Hub; a local JSON, JSONL, Parquet or CSV file; or a folder of such files or of
            `save_to_disk`. With the format `reasoning_gym`, the name of a task.
        format (`str`, *optional*): Key of `DATASET_FORMATS`, or its call form with options,
            `question_answer(question='problem', answer='expected_answer')`. None means that the data set is in TRL's
            form already, and only checks that it has a `prompt`.
        split (`str`): Split; a single file has only `"train"`.
        config (`str`, *optional*): Configuration of a data set on the Hub.
        streaming (`bool`): Read the rows as they are needed.
        system_prompt (`str`, *optional*): System prompt of every row; replaces the one that is there.
        prompt_suffix (`str`, *optional*): Appended to every prompt that does not hold it: `"math"` or `"code"` for the two
            that the paper's data has, or a text of one's own. A prompt that holds either of the two gets neither.
        plain_prompts (`bool`): Make prompts plain text, for base models without a chat template: the contents of the messages
            with blank lines between them.
        on_error (`str`): What to do about a malformed row: `"raise"`; `"skip"`, which logs how many there were; or
            `"mark"`, which keeps it empty and adds the column `MALFORMED` with the reason, None for all other rows.
        options: Options of the format: names of columns, and what its row function takes.

    Returns:
        [`~datasets.Dataset`] or [`~datasets.IterableDataset`]: the adapted rows. With a format it has the columns of
        `PROMPT_FEATURES` (of `SFT_FEATURES` for `eurus2_sft`); without one, its own.

    Raises:
        ValueError: The format, an option, the file or a column does not exist, or a row is malformed; the message tells
            the row's index.
    """
    if on_error not in ON_ERROR:
        raise ValueError(f"on_error is {on_error!r}, which is unknown. {nearest(on_error, ON_ERROR)}")
    if format is not None:
        format, given = parse_call(format)
        options = {**(given or {}), **options}
        if format not in DATASET_FORMATS:
            raise ValueError(f"dataset_format is {format!r}, which is unknown. {nearest(format, DATASET_FORMATS)}")
    elif options:
        raise ValueError(f"{', '.join(options)} given, but without a dataset_format there are no options.")
    if format is not None and DATASET_FORMATS[format].generate is not None:
        dataset = DATASET_FORMATS[format].generate(name_or_path, split, **options)
        dataset, options = dataset.to_iterable_dataset() if streaming else dataset, {}
    else:
        dataset = read_rows(name_or_path, split, config, streaming)
    return adapt_dataset(
        dataset,
        format,
        system_prompt=system_prompt,
        prompt_suffix=prompt_suffix,
        plain_prompts=plain_prompts,
        on_error=on_error,
        **options,
    )


def adapt_dataset(
    dataset: Dataset | IterableDataset,
    format: str | None = None,
    *,
    system_prompt: str | None = None,
    prompt_suffix: str | None = None,
    plain_prompts: bool = False,
    on_error: str = "raise",
    **options: Any,
) -> Dataset | IterableDataset:
    """
    Bring a loaded data set into the form that [`PRIMETrainer`] and the verifiers read.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]): The rows.
        format (`str`, *optional*): Key of `DATASET_FORMATS`, see `load_prime_dataset`, as are the other arguments.

    Returns:
        [`~datasets.Dataset`] or [`~datasets.IterableDataset`]: the adapted rows.

    Raises:
        ValueError: See `load_prime_dataset`.
    """
    present = _column_names(dataset)
    suffix = _suffix_text(prompt_suffix)
    if format is None:
        _check_trl_form(present)
        _check_prompts(dataset)
        if system_prompt or suffix:
            # No features are given, so that columns that the adapter does not know keep their types
            dataset = dataset.map(_dress, fn_kwargs={"system_prompt": system_prompt, "suffix": suffix})
        return dataset.map(_as_text) if plain_prompts else dataset
    known = DATASET_FORMATS[format]
    if (suffix or plain_prompts) and "prompt" not in known.features:
        option = "prompt_suffix" if suffix else "plain_prompts"
        raise ValueError(f"{option} is given, but dataset_format {format!r} has finished conversations. Leave it out.")
    columns, settings = _resolve(format, options, present)
    # The cache of `map` tells functions apart by their name only, so the version is part of the arguments
    adapt = functools.partial(
        _adapt_row,
        format=format,
        columns=columns,
        settings=settings,
        system_prompt=system_prompt,
        suffix=suffix,
        skip=on_error != "raise",
        version=__version__,
    )
    images = [name for name in IMAGE_COLUMNS if name in present and "prompt" in known.features]
    if images and dataset.features is None:
        raise ValueError(
            f"The column {images[0]!r} of a stream has no type, so that its images would be lost. Load it without streaming."
        )
    features = {**known.features, **{name: dataset.features[name] for name in images}}
    features = Features({**features, **({MALFORMED: Value("string")} if on_error != "raise" else {})})
    removed = [name for name in present if name not in images]
    adapted = dataset.map(adapt, with_indices=True, remove_columns=removed, features=features)
    adapted = adapted.map(_as_text) if plain_prompts else adapted
    return _without_malformed(adapted, format) if on_error == "skip" else adapted


def check_text_only(dataset: Dataset | IterableDataset, reader: str, remedy: str) -> None:
    """
    Refuse a data set with images where text only is read: its problems would be others.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]): The rows.
        reader (`str`): Who reads text only.
        remedy (`str`): A sentence.

    Raises:
        ValueError: It has a column of images.
    """
    found = [name for name in IMAGE_COLUMNS if name in (dataset.column_names or ())]
    if found:
        raise ValueError(f"The data set has images in its column {found[0]!r}, but {reader} reads text only. {remedy}")


def _as_text(row: dict[str, Any]) -> dict[str, Any]:
    return {"prompt": None if row["prompt"] is None else prompt_text(row["prompt"])}


def _adapt_row(
    row: dict[str, Any],
    i: int,
    *,
    format: str,
    columns: dict[str, str],
    settings: dict[str, Any],
    system_prompt: str | None,
    suffix: str | None,
    skip: bool,
    version: str,
) -> dict[str, Any]:
    known = DATASET_FORMATS[format]
    try:
        adapted = known.adapt(**{argument: row.get(column) for argument, column in columns.items()}, **settings)
    except MalformedRow as error:
        if not skip:
            raise ValueError(
                f"Row {i} is no {format!r} row: {error}. Mend it, or leave such rows out by on_malformed_row: skip."
            ) from error
        return dict.fromkeys(known.features) | {MALFORMED: f"row {i}: {error}"}
    messages = "prompt" if "prompt" in adapted else "messages"
    if messages == "prompt" and any(name in row for name in IMAGE_COLUMNS):
        adapted["prompt"] = [
            {**message, "content": message["content"].replace(_IMAGE_MARK, "").strip()}
            for message in adapted["prompt"]
        ]
    adapted[messages] = _dress_messages(adapted[messages], system_prompt, suffix)
    return adapted | ({MALFORMED: None} if skip else {})


def _without_malformed(dataset: Dataset | IterableDataset, format: str) -> Dataset | IterableDataset:
    if isinstance(dataset, IterableDataset):
        return dataset.filter(_keep_and_tell, input_columns=[MALFORMED]).remove_columns(MALFORMED)
    reasons = dataset[MALFORMED]
    kept = [i for i, reason in enumerate(reasons) if reason is None]
    malformed = [reason for reason in reasons if reason is not None]
    if not malformed:
        return dataset.remove_columns(MALFORMED)
    first = "; ".join(malformed[:5])
    if not kept:
        raise ValueError(f"None of the {len(malformed)} rows is a {format!r} row. The first: {first}.")
    logger.warning(
        f"Left out {len(malformed)} of {len(dataset)} rows that are no {format!r} rows. The first: {first}."
    )
    return dataset.select(kept).remove_columns(MALFORMED)


def _keep_and_tell(reason: str | None) -> bool:
    # A stream has no end at which to give a count
    if reason is not None:
        logger.warning(f"Left out {reason}.")
    return reason is None


def _resolve(format: str, options: dict[str, Any], present: list[str]) -> tuple[dict[str, str], dict[str, Any]]:
    """Find the column of each argument of a format, and the options that are not names of columns."""
    known = DATASET_FORMATS[format]
    settings = {
        name
        for name, parameter in inspect.signature(known.adapt).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    check_options(f"dataset_format {format!r}", options, [*known.columns, *known.optional, *sorted(settings)])
    columns = {}
    for argument, default in {**known.columns, **known.optional}.items():
        choices = options.get(argument, default)
        choices = (choices,) if isinstance(choices, str) else choices
        found = [column for column in choices if column in present]
        if found:
            columns[argument] = found[0]
        elif argument in known.columns or argument in options:
            raise ValueError(
                f"dataset_format {format!r} reads {argument} from the column {' or '.join(map(repr, choices))}, which is "
                f"not among the data set's: {', '.join(present)}. Name it, {format}({argument}='...'), or choose another "
                f"format{_guess(present)}."
            )
    return columns, {**known.options, **{name: options[name] for name in options if name in settings}}


def _check_trl_form(present: list[str]) -> None:
    guess = _guess(present)
    if "prompt" not in present:
        raise ValueError(
            f"The data set has no column 'prompt' but {', '.join(present)}{guess}. Give dataset_format, one of: "
            f"{', '.join(DATASET_FORMATS)}."
        )
    if guess and not {"solution", "tests"} & set(present):
        logger.warning(f"The data set{guess}; without dataset_format its columns are passed on as they are.")


def _check_prompts(dataset: Dataset | IterableDataset) -> None:
    """Refuse prompts that are neither text nor messages, and empty ones. Rows have one type, so the first shows the form."""
    prompt = next(iter(dataset), {}).get("prompt", "text")
    empty = [] if prompt else [0]
    if isinstance(dataset, Dataset) and len(dataset):
        column = dataset.with_format("arrow")[:]["prompt"]
        length = pyarrow.compute.list_value_length if isinstance(prompt, list) else pyarrow.compute.binary_length
        if isinstance(prompt, (list, str)):
            lengths = pyarrow.compute.fill_null(length(column), 0)
            empty = pyarrow.compute.indices_nonzero(pyarrow.compute.equal(lengths, 0)).to_pylist()
    if empty:
        raise ValueError(
            f"Row {empty[0]} has an empty prompt ({len(empty)} rows have). Take them out of the data set."
        )
    if not is_text_or_messages(prompt):
        raise ValueError(
            f"Row 0 has the prompt {str(prompt)[:80]!r}, which is neither text nor messages with a role and a content. Give "
            'dataset_format, or make prompts [{"role": "user", "content": ...}].'
        )


def guess_format(columns: Iterable[str]) -> str | None:
    """
    The data format that rows with these columns look like.

    Args:
        columns (`list[str]`): Names of the columns.

    Returns:
        `str`, *optional*: Key of `DATASET_FORMATS`; None if no format has all its columns among them.
    """
    present = set(columns)
    for name, known in DATASET_FORMATS.items():
        choices = [{column} if isinstance(column, str) else set(column) for column in known.columns.values()]
        if known.generate is None and all(names & present for names in choices):
            return name
    return None


def _guess(present: list[str]) -> str:
    guess = guess_format(present)
    return f" (looks like {guess!r})" if guess else ""


def _column_names(dataset: Dataset | IterableDataset) -> list[str]:
    if dataset.column_names is not None:
        return list(dataset.column_names)
    # A stream of JSON lines does not know its columns before the first row
    with _readable("the data set"):
        first = next(iter(dataset), None)
    if first is None:
        raise ValueError("The data set is empty.")
    return list(first)


@contextlib.contextmanager
def _readable(name: str) -> Iterator[None]:
    """Around reading of files: what is wrong with them is told in one sentence."""
    try:
        yield
    # A file without a row ends in a StopIteration, which must not leave a generator
    except (DatasetGenerationError, FileNotFoundError, UnicodeDecodeError, StopIteration) as error:
        cause = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = str(cause).splitlines()[0] if str(cause) else "it holds no row"
        remedy = "Save it as UTF-8." if isinstance(cause, UnicodeDecodeError) else "Mend the file."
        raise ValueError(
            f"dataset_name is {name!r}, which could not be read: {reason.rstrip('.')}. {remedy}"
        ) from error


def read_rows(
    name_or_path: str, split: str = "train", config: str | None = None, streaming: bool = False
) -> Dataset | IterableDataset:
    """Read a data set as it is, from the Hub or from local files; the arguments are those of [`load_prime_dataset`]."""
    path = Path(name_or_path).expanduser()
    suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
    if path.is_file():
        if suffix not in _READERS:
            raise ValueError(
                f"dataset_name is {name_or_path!r}, but files are read that end in {', '.join(_READERS)}."
            )
        if re.split(r"[\[+]", split)[0] != "train":
            raise ValueError(
                f"{name_or_path!r} is one file, which has only the split 'train' and no {split!r}. Give a folder with a "
                f"file for each split, train{suffix} and {split}{suffix}."
            )
        with _readable(name_or_path):
            return load_dataset(_READERS[suffix], data_files=str(path), split=split, streaming=streaming)
    if path.is_dir():
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            return _load_saved(path, split, streaming)
        with _readable(name_or_path):
            return load_dataset(str(path), name=config, split=split, streaming=streaming)
    if suffix in _READERS or path.is_absolute() or name_or_path.startswith((".", "~")):
        raise ValueError(f"dataset_name is {name_or_path!r}, but there is no such file or folder.")
    if not name_or_path.startswith(("hf://", "buckets/")):
        # Not at the top: reading local files loads no framework
        from ..hub import check_reachable

        try:
            check_reachable("dataset_name", name_or_path, ["README.md"], repo_type="dataset")
        except ValueError:
            if not _is_cached(name_or_path):
                raise
    return load_dataset(name_or_path, name=config, split=split, streaming=streaming)


def _is_cached(name: str) -> bool:
    """Whether `datasets` has loaded this data set before, so that it can do so again without the Hub."""
    try:
        CachedDatasetModuleFactory(name).get_module()
    except (AssertionError, FileNotFoundError):  # the first for a name that is none of the Hub
        return False
    return True


def _load_saved(path: Path, split: str, streaming: bool) -> Dataset | IterableDataset:
    saved = load_from_disk(str(path))
    if isinstance(saved, Dataset):
        saved = {"train": saved}
    if split not in saved:
        raise ValueError(f"The data set saved in '{path}' has no split {split!r}. {nearest(split, saved)}")
    return saved[split].to_iterable_dataset() if streaming else saved[split]


def _suffix_text(prompt_suffix: str | None) -> str | None:
    if prompt_suffix is None or prompt_suffix in PROMPT_SUFFIXES:
        return PROMPT_SUFFIXES.get(prompt_suffix)
    if not re.search(r"\s", prompt_suffix.strip()):
        # A single word is a misspelt name rather than an instruction
        hint = nearest(prompt_suffix, PROMPT_SUFFIXES)
        raise ValueError(f"prompt_suffix is {prompt_suffix!r}, which is unknown. {hint} Or give a sentence.")
    return prompt_suffix


def _dress(row: dict[str, Any], *, system_prompt: str | None, suffix: str | None) -> dict[str, Any]:
    prompt = row["prompt"]
    if isinstance(prompt, str):
        if system_prompt:
            raise ValueError(
                "system_prompt is given, but the prompts are strings. Give dataset_format, or make them messages, "
                '[{"role": "user", "content": ...}].'
            )
        return {"prompt": _with_suffix(prompt, suffix)}
    return {"prompt": _dress_messages(prompt, system_prompt, suffix)}


def _dress_messages(messages: Messages, system_prompt: str | None, suffix: str | None) -> Messages:
    if system_prompt:
        messages = with_system_prompt(messages, system_prompt)
    if suffix:
        *earlier, last = messages
        messages = [*earlier, {**last, "content": _with_suffix(last["content"], suffix)}]
    return messages


def _with_suffix(text: str, suffix: str | None) -> str:
    if not suffix:
        return text
    # The published data breaks lines differently here and there
    held = " ".join(text.split())
    others = PROMPT_SUFFIXES.values() if suffix in PROMPT_SUFFIXES.values() else [suffix]
    return text if any(" ".join(other.split()) in held for other in others) else f"{text.rstrip()}\n\n{suffix.strip()}"
