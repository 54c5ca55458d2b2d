"""The paired comparison of two evaluations of the same problems.

Covered: reading what `trl-prime eval` has written, refusing what cannot be paired, the differences with their intervals. Not
covered: evaluations by ProcessBench, and choices by a PRM.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .end_to_end import SampleTable, values_by_metric
from .statistics import mean_with_interval, sizes_up_to


@dataclass(frozen=True)
class Evaluation:
    """
    What a finished evaluation of a policy has left in its folder.

    Attributes:
        path (`str`): The folder.
        settings (`dict`): What the samples depend on; `problems` is a hash of the problems.
        rows (`list[dict]`): Those of `samples.jsonl`.
    """

    path: str
    settings: dict[str, Any]
    rows: list[dict[str, Any]]


def read_evaluation(path: str | Path) -> Evaluation:
    """
    Read a finished evaluation of a policy.

    Args:
        path (`str`): Output folder of `trl-prime eval`, or the file `samples.jsonl` in it.

    Raises:
        ValueError: There is none, or it was not finished.
    """
    folder = Path(path).parent if Path(path).name == "samples.jsonl" else Path(path)
    samples, settings, summary = (folder / name for name in ("samples.jsonl", "samples.settings.json", "summary.json"))
    if not samples.is_file() or not settings.is_file():
        raise ValueError(
            f"compare has '{path}', which holds no samples.jsonl with its settings. Give the output folder of a `trl-prime eval` "
            "that has sampled a policy."
        )
    # Not `str.splitlines`, which also breaks at characters that completions may hold
    with samples.open(encoding="utf-8") as file:
        lines = list(file)
    expected = json.loads(summary.read_text())["num_completions"] if summary.is_file() else None
    if len(lines) != expected:
        raise ValueError(
            f"compare has '{path}', whose evaluation was not finished: {len(lines)} completions are there. Start the command that "
            "made it again, which goes on where it stopped."
        )
    return Evaluation(str(folder), json.loads(settings.read_text()), [json.loads(line) for line in lines])


def check_same_problems(first: Evaluation, second: Evaluation) -> None:
    """Raise a ValueError if two evaluations are of different problems; prompts are a part of them."""
    if first.settings["problems"] == second.settings["problems"]:
        return
    names = ("benchmark", "dataset_name", "dataset_config", "dataset_split", "dataset_format", "limit")
    names += ("system_prompt", "prompt_suffix", "plain_prompts")
    differing = differing_settings(first, second, names)
    raise ValueError(
        f"'{first.path}' and '{second.path}' are evaluations of different problems or prompts ({differing or 'their data changed'}), "
        "so their results cannot be paired. Evaluate both on the same ones."
    )


def differing_settings(first: Evaluation, second: Evaluation, names: Sequence[str] | None = None) -> str:
    """Say which of the named settings, or of all but hashes, two evaluations differ in, and the values."""
    if names is None:
        names = [name for name in {**first.settings, **second.settings} if name not in ("problems", "model_version")]
    pairs = [(name, first.settings.get(name), second.settings.get(name)) for name in names]
    return ", ".join(f"{name}: {one!r} and {other!r}" for name, one, other in pairs if one != other)


def compare_samples(
    first: SampleTable, second: SampleTable, ks: Sequence[int] | None = None, seed: int = 0
) -> dict[str, dict[str, float]]:
    """
    Differences of two policies on the same problems, each with its 95 % paired bootstrap interval: problems are drawn, and both
    policies are taken on those, so that how hard the problems are drops out.

    Args:
        first, second ([`~trl_prime.evaluation.end_to_end.SampleTable`]): Samples of the same P problems.
        ks (`list[int]`, *optional*): For pass@k. Defaults to 1, 2, 4, ... up to the smaller number of samples.
        seed (`int`): Seed of the bootstrap.

    Returns:
        `dict`: for each metric that both have, `first` and `second`, their means over the problems that have it in both, and
        the second less the first, `value`, with `low` and `high`.

    Raises:
        ValueError: They have no metric in common, or k is larger than a number of samples.
    """
    fewest = min(first.n, second.n)
    if ks and not 1 <= max(ks) <= fewest:
        raise ValueError(f"k has {max(ks)}, but of one of the evaluations there are {fewest} samples of a problem.")
    tables = [values_by_metric(table, ks or sizes_up_to(fewest)) for table in (first, second)]
    result = {}
    for name in [name for name in tables[0] if name in tables[1]]:
        pairs = np.stack([table[name] for table in tables])
        pairs = pairs[:, ~np.isnan(pairs).any(axis=0)]
        one, other = pairs.mean(axis=1).tolist()
        result[name] = {"first": one, "second": other, **mean_with_interval(pairs[1] - pairs[0], seed=seed)}
    if not result:
        raise ValueError(
            "One of the evaluations has greedy completions alone and the other has none: nothing can be compared."
        )
    return result


def compare(
    paths: Sequence[str], equal: Callable, ks: Sequence[int] | None = None, seed: int = 0
) -> tuple[list[Evaluation], dict[str, dict[str, float]]]:
    """
    Read two evaluations and compare them.

    Args:
        paths (`list[str]`): Their folders.
        equal (`Callable`): Whether two answers are the same, see [`~trl_prime.evaluation.statistics.group_answers`].
        ks, seed: See [`compare_samples`].

    Returns:
        `tuple`: both evaluations, and what [`compare_samples`] returns.

    Raises:
        ValueError: One of them is not there or not finished, or they cannot be compared.
    """
    first, second = map(read_evaluation, paths)
    check_same_problems(first, second)
    return [first, second], compare_samples(SampleTable(first.rows, equal), SampleTable(second.rows, equal), ks, seed)
