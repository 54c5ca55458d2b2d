"""Load the data that an implicit PRM is trained on offline: completions whose outcome is known, and preference pairs.

Both forms are TRL's own. *Labelled*: `prompt`, `completion`, `label` (unpaired preference; a label is a bool or a number
between 0 and 1, None where it is not known). *Pairs*: `prompt`, `chosen`, `rejected` (preference). Prompts and completions
are text or messages. Covered: reading both, and two published layouts of labelled completions; making one form of the
other. Not covered: a held-out part (`data/splits.py`); tokens, lengths and what is dropped for them (`offline_prm_trainer.py`).
"""

from __future__ import annotations

import functools
import inspect
import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from datasets import Dataset, Value
from trl import extract_prompt, unpair_preference_dataset

from ..data.adapters import adapt_dataset, check_text_only, read_rows
from ..data.rows import MalformedRow
from ..specs import check_options, nearest, parse_call
from ..version import __version__

LABELLED, PAIRS = {"prompt", "completion", "label"}, {"chosen", "rejected"}


def load_outcome_dataset(
    name_or_path: str,
    format: str | None = None,
    *,
    split: str = "train",
    config: str | None = None,
    system_prompt: str | None = None,
    prompt_suffix: str | None = None,
) -> Dataset:
    """
    Load labelled completions or preference pairs.

    Args:
        name_or_path (`str`): Name on the Hub, or a local file or folder, as in
            [`~trl_prime.data.adapters.load_prime_dataset`].
        format (`str`, *optional*): Key of `OUTCOME_FORMATS`, or its call form with options,
            `labelled(prompt='problem', label='correct')`. None means that the data set is in one of TRL's two forms.
        split, config (`str`): of a data set on the Hub.
        system_prompt, prompt_suffix (`str`, *optional*): as in [`~trl_prime.data.adapters.load_prime_dataset`]. They should
            be those under which the policy of an online run is going to answer.

    Returns:
        [`~datasets.Dataset`]: Labelled completions or pairs.

    Raises:
        ValueError: The format, the file or a column does not exist, or a row is malformed; the message tells its index.
    """
    dataset = read_rows(name_or_path, split, config)
    check_text_only(dataset, "a PRM that is trained offline", "Remove the column if the problems make sense without.")
    if format is not None:
        dataset = adapt_outcomes(dataset, format)
    elif set(dataset.column_names) >= PAIRS and "prompt" not in dataset.column_names:
        dataset = dataset.map(extract_prompt)
    check_form(dataset)
    if system_prompt or prompt_suffix:
        dataset = adapt_dataset(dataset, system_prompt=system_prompt, prompt_suffix=prompt_suffix)
    return dataset


def adapt_outcomes(dataset: Dataset, format: str) -> Dataset:
    """
    Bring labelled completions of another layout into the form `prompt`, `completion`, `label`. Text stays text,
    which the PRM reads without the chat template, and messages stay messages.

    Args:
        dataset ([`~datasets.Dataset`]): The rows.
        format (`str`): as in [`load_outcome_dataset`].

    Returns:
        [`~datasets.Dataset`]: with the columns `prompt`, `completion` and `label`; one row can become several, or none.

    Raises:
        ValueError: see [`load_outcome_dataset`].
    """
    format, options = parse_call(format)
    if format not in OUTCOME_FORMATS:
        raise ValueError(f"dataset_format is {format!r}, which is unknown. {nearest(format, OUTCOME_FORMATS)}")
    options = options or {}
    check_options(
        f"dataset_format {format!r}", options, list(inspect.signature(OUTCOME_FORMATS[format]).parameters)[1:]
    )
    # The cache of `map` tells functions apart by their name only, so the version is part of the arguments
    adapt_batch = functools.partial(_adapt_batch, format=format, options=options, version=__version__)
    adapted = dataset.map(adapt_batch, batched=True, with_indices=True, remove_columns=dataset.column_names)
    return adapted.cast_column("label", Value("float64"))


def _adapt_batch(
    batch: dict[str, list], indices: list[int], format: str, options: dict[str, Any], version: str
) -> dict[str, list]:
    adapted: dict[str, list] = {"prompt": [], "completion": [], "label": []}
    for place, i in enumerate(indices):
        try:
            triples = OUTCOME_FORMATS[format]({name: column[place] for name, column in batch.items()}, **options)
        except MalformedRow as error:
            raise ValueError(f"Row {i} is no {format!r} row: {error}.") from error
        for prompt, completion, label in triples:
            adapted["prompt"].append(prompt)
            adapted["completion"].append(completion)
            adapted["label"].append(None if label is None else float(label))
    return adapted


# ---------------------------------------------------------------------------------------------------------------------
# Formats turn a row into prompts, completions and labels; the arguments after the row are options


def labelled(
    row: Mapping[str, Any], prompt: str | None = None, completion: str | None = None, label: str | None = None
) -> list[tuple[Any, Any, Any]]:
    """
    Read a completion and its label from columns of any name, or a prompt's completions and their labels as two lists.

    Args:
        row (`dict`): The row.
        prompt, completion, label (`str`, *optional*): Names of the columns; the usual ones are found by themselves.

    Returns:
        `list[tuple]`: prompt, completion and label of each.

    Raises:
        MalformedRow: A column is missing, or the two lists are of different lengths.
    """
    given, values = {"prompt": prompt, "completion": completion, "label": label}, {}
    for argument, usual in _USUAL_COLUMNS.items():
        names = usual if given[argument] is None else (given[argument],)
        found = [name for name in names if name in row]
        if not found:
            raise MalformedRow(
                f"it has no column {' or '.join(map(repr, names))} for the {argument} among {', '.join(row)}; name it by "
                f"labelled({argument}='...')"
            )
        values[argument] = row[found[0]]
    if not isinstance(values["label"], list):
        return [(values["prompt"], values["completion"], values["label"])]
    if not isinstance(values["completion"], list) or len(values["completion"]) != len(values["label"]):
        raise MalformedRow("the completions and their labels are not lists of the same length")
    return [(values["prompt"], *pair) for pair in zip(values["completion"], values["label"], strict=True)]


_USUAL_COLUMNS = {
    "prompt": ("prompt", "question", "problem"),
    "completion": ("completion", "completions", "response", "responses", "solution", "solutions"),
    "label": ("label", "labels", "is_correct", "correct", "correctness", "reward", "rewards"),
}


def gsm8k_solutions(row: Mapping[str, Any]) -> list[tuple[Any, Any, Any]]:
    """
    Read the example solutions that were published with GSM8K: a `question`, and for each of several models a column with a
    `solution` and whether it `is_correct`. They become messages, and the calculator's annotations, `<<2*3=6>>`, are taken out.

    Args:
        row (`dict`): The row.

    Returns:
        `list[tuple]`: prompt, completion and label of each solution.

    Raises:
        MalformedRow: There is no question, or no model's solution.
    """
    solved = [
        value for value in row.values() if isinstance(value, Mapping) and {"solution", "is_correct"} <= set(value)
    ]
    if not isinstance(row.get("question"), str) or not solved:
        raise MalformedRow("it has no question, or no column with a solution and is_correct")
    prompt = [{"role": "user", "content": row["question"]}]
    texts = [
        (re.sub(r"<<[^<>]*>>", "", value["solution"]), value["is_correct"])
        for value in solved
        if value["solution"] is not None
    ]
    return [(prompt, [{"role": "assistant", "content": text}], is_correct) for text, is_correct in texts]


OUTCOME_FORMATS: dict[str, Callable[..., list[tuple[Any, Any, Any]]]] = {
    "labelled": labelled,
    "gsm8k_solutions": gsm8k_solutions,
}


# ---------------------------------------------------------------------------------------------------------------------
# One form is made of the other


def check_form(dataset: Dataset) -> None:
    """Raise a ValueError that says what is missing unless this is a data set of one of the two forms."""
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"The data set is a {type(dataset).__name__}, but groups and lengths have to be known before training: load it as "
            "a datasets.Dataset, without streaming."
        )
    columns = set(dataset.column_names)
    if not (columns >= LABELLED or columns >= PAIRS):
        raise ValueError(
            f"The data set has the columns {', '.join(sorted(columns))}. Needed are prompt, completion and label, or prompt, "
            f"chosen and rejected; or give dataset_format, one of: {', '.join(OUTCOME_FORMATS)}."
        )


def to_labelled(dataset: Dataset) -> Dataset:
    """Return labelled completions as they are; pairs become a chosen one labelled true and a rejected one labelled false."""
    check_form(dataset)
    if set(dataset.column_names) >= LABELLED:
        return dataset
    return unpair_preference_dataset(with_prompt(dataset))


def to_pairs(dataset: Dataset, max_pairs_per_prompt: int | None = None, seed: int = 0) -> Dataset:
    """Return pairs as they are, and of labelled completions the pairs of [`pairs_of_labelled`]."""
    check_form(dataset)
    if set(dataset.column_names) >= PAIRS:
        return with_prompt(dataset)
    return pairs_of_labelled(dataset, max_pairs_per_prompt, seed)


def with_prompt(dataset: Dataset) -> Dataset:
    """Take the prompt out of pairs that hold it inside `chosen` and `rejected`; other rows are returned as they are."""
    return dataset if "prompt" in dataset.column_names else dataset.map(extract_prompt)


def pairs_of_labelled(dataset: Dataset, max_pairs_per_prompt: int | None = None, seed: int = 0) -> Dataset:
    """
    Pair every completion with every worse one of the same prompt.

    Args:
        dataset ([`~datasets.Dataset`]): Labelled completions; those without a label are in no pair.
        max_pairs_per_prompt (`int`, *optional*): Where there are more, this many are drawn.
        seed (`int`): Seed of that draw.

    Returns:
        [`~datasets.Dataset`]: `prompt`, `chosen`, `rejected`; prompts in the order of their first completion.

    Raises:
        ValueError: No prompt has completions with different labels.
    """
    rng = random.Random(seed)
    labels = dataset["label"][:]
    pairs = []
    for rows in group_by_prompt(dataset["prompt"][:]):
        of_prompt = [(i, j) for i in rows for j in rows if _is_better(labels[i], labels[j])]
        if max_pairs_per_prompt is not None and len(of_prompt) > max_pairs_per_prompt:
            of_prompt = rng.sample(of_prompt, max_pairs_per_prompt)
        pairs += of_prompt
    if not pairs:
        raise ValueError(
            "No prompt of the data set has completions with different labels, so there are no pairs. Use loss_type='ce' or 'kto'."
        )
    chosen, rejected = (dataset.select(rows) for rows in zip(*pairs, strict=True))
    return Dataset.from_dict(
        {"prompt": chosen["prompt"][:], "chosen": chosen["completion"][:], "rejected": rejected["completion"][:]}
    )


def _is_better(label: float | bool | None, other: float | bool | None) -> bool:
    return label is not None and other is not None and float(label) > float(other)  # NaN is not


def group_by_prompt(prompts: Sequence[Any]) -> list[list[int]]:
    """List the rows of each prompt, text or messages; prompts are in the order of their first row."""
    rows: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        rows.setdefault(json.dumps(prompt, sort_keys=True), []).append(i)
    return list(rows.values())
