"""The page of `trl-prime report`: what the folder of a run tells, or those of several runs to compare.

Covered: the metrics of `trainer_state.json`, `results.json`, the settings that `trl-prime train` wrote, and the completions of
TRL's `log_completions`, with heat maps by the PRM of the run. Whatever is missing is left out, and a sentence says so. Not
covered: a run that is going on somewhere else; TRL's `report_to` (trackio, wandb, tensorboard) shows that.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers.trainer import TRAINER_STATE_NAME

from ..hub import SETTINGS
from ..implicit_prm.build import load_prm
from ..implicit_prm.files import is_saved_prm
from ..texts import can_be_scored, is_text_or_messages
from .heat_map import finite, visible_text
from .page import render_page
from .run_files import PRM_FOLDER, RESULTS_NAME, SETTINGS_NAME, TABLE_PREFIX, checkpoints
from .score_page import Completion, card_data, make_cards, score_completions, step_scale, token_scale

MAX_POINTS = 2000
# Few readers open the other charts, which get fewer points
MAX_OTHER_POINTS = 500
# Some data sets have worked solutions in the place of gold answers
MAX_ANSWER_LENGTH = 300


@dataclasses.dataclass(frozen=True)
class Panel:
    """
    A chart.

    Attributes:
        title (`str`): Its title.
        series (`dict[str, str]`): Metric to its label.
        note (`str`): A sentence about how to read it.
        share (`bool`): Whether the values lie between 0 and 1.
    """

    title: str
    series: Mapping[str, str]
    note: str = ""
    share: bool = False


PANELS = (
    Panel(
        "Outcome reward",
        {"reward": "rollouts", "eval_reward": "held out"},
        "Mean over all completions that were generated.",
    ),
    Panel(
        "Accuracy of the implicit PRM",
        {
            "prm/pairwise_accuracy": "pairs, before the update",
            "prm/pairwise_accuracy_after_update": "pairs, after it",
            "prm/accuracy": "right from wrong",
            "eval_prm/accuracy": "right from wrong, held out",
        },
        "One half is guessing. Judge it by the accuracy before the update.",
        share=True,
    ),
    Panel(
        "Prompt filter",
        {
            "filter/pass_rate": "groups in the band",
            "filter/trained": "completions trained on",
            "filter/judged": "completions judged",
        },
        "What does not pass teaches nothing.",
        share=True,
    ),
    Panel("Rounds of generation", {"filter/rounds": "mean"}, "What full batches cost."),
    Panel(
        "Weight of the process rewards",
        {"prm/trust": "trust", "advantage/process_share": "share of the advantages' variance"},
        "Trust is zero while the PRM guesses.",
        share=True,
    ),
    Panel("Process reward of a token", {"prm/process_reward": "mean"}, "In log-odds."),
    Panel(
        "Completion length",
        {
            "completions/mean_length": "mean",
            "completions/min_length": "shortest",
            "completions/max_length": "longest",
        },
        "In tokens.",
    ),
    Panel("Completions cut off", {"completions/clipped_ratio": "share"}, "At the longest length allowed.", share=True),
    Panel("Entropy of the policy", {"entropy": "mean"}, "In nats per token. A fall to zero ends exploration."),
    Panel(
        "What values explain",
        {"value/explained_variance": "outcome", "value/process_explained_variance": "process rewards"},
        "Share of the variance of what was still to come. Zero is what a constant explains.",
    ),
    Panel("PRM loss", {"prm/loss": "mean"}, "Below log 2 = 0.693 it knows more than a coin."),
    Panel("Loss of the value model", {"value/loss": "mean"}),
    Panel("Policy loss", {"loss": "loss"}, "Its size says little in reinforcement learning."),
    Panel("Gradient norm of the PRM", {"prm/grad_norm": "before clipping"}),
    Panel("Gradient norm of the value model", {"value/grad_norm": "before clipping"}),
    Panel("Gradient norm of the policy", {"grad_norm": "before clipping"}),
    Panel("Learning rates", {"learning_rate": "policy", "prm/learning_rate": "PRM", "value/learning_rate": "values"}),
    Panel(
        "Steps left out",
        {"prm/skipped_steps": "PRM", "filter/skipped_steps": "policy", "value/skipped_steps": "values"},
    ),
    Panel("KL to the reference", {"kl": "mean"}),
    Panel("Time of a step", {"step_time": "seconds"}),
)
RESULT_LABELS = {
    "before": "policy, before",
    "after": "policy, after",
    "prm": "PRM",
}


@dataclasses.dataclass
class Run:
    """
    The content of the folder of a run.

    Attributes:
        name (`str`): Short name.
        folder (`Path`): The folder.
        history (`list[dict]`): `log_history`, empty if there is none.
        results (`dict`): Content of `results.json`, empty if there is none.
        settings (`dict`): Content of `prime_config.json`, empty if there is none.
        completions (`list[dict]`): Rows of the last completions table.
        prm_folder (`Path`, *optional*): Folder of the PRM.
        missing (`list[str]`): Sentences about what was not found.
    """

    name: str
    folder: Path
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    results: dict[str, Any] = dataclasses.field(default_factory=dict)
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    completions: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    prm_folder: Path | None = None
    missing: list[str] = dataclasses.field(default_factory=list)


# --- Reading ---


def read_run(folder: str | os.PathLike, name: str | None = None) -> Run:
    """
    Read the folder of a run. Pickles are not opened.

    Args:
        folder (`str`): The run's `output_dir`.
        name (`str`, *optional*): Name to show; that of the folder if not given.

    Returns:
        [`Run`]: with sentences about what was not found or could not be read.

    Raises:
        ValueError: There is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"'{folder}' is no folder. Give the output_dir of a run.")
    run = Run(name or folder.resolve().name, folder)
    places = [folder, *checkpoints(folder)]
    state = _first_json(run, [place / TRAINER_STATE_NAME for place in places], "metrics")
    history = state.get("log_history")
    run.history = [row for row in history if isinstance(row, dict)] if isinstance(history, list) else []
    run.results = _first_json(run, [folder / RESULTS_NAME], "results on held-out problems")
    run.settings = _first_json(run, [folder / SETTINGS_NAME], "settings")
    run.completions = _read_completions(run)
    prm_folders = [place / PRM_FOLDER for place in places]
    run.prm_folder = next((folder for folder in prm_folders if is_saved_prm(str(folder))), None)
    return run


def _first_json(run: Run, paths: Sequence[Path], what: str) -> dict[str, Any]:
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        run.missing.append(f"No {what}: there is no {paths[0].name}{' in any checkpoint' * (len(paths) > 1)}.")
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        run.missing.append(f"No {what}: {path.name} could not be read ({error}).")
        return {}
    if not isinstance(found, dict):
        run.missing.append(f"No {what}: {path.name} holds no object.")
        return {}
    return found


def _read_completions(run: Run) -> list[dict[str, Any]]:
    """The rows of the last table that TRL wrote, `completions/completions_STEP.parquet`."""
    import pyarrow
    import pyarrow.parquet

    tables = sorted(
        (run.folder / "completions").glob("completions_*.parquet"),
        key=lambda path: [int(number) for number in re.findall(r"\d+", path.stem)],
    )
    if not tables:
        run.missing.append("No completions: train with `log_completions: true` to have them written.")
        return []
    try:
        rows = pyarrow.parquet.read_table(tables[-1]).to_pylist()
    except (pyarrow.ArrowInvalid, OSError) as error:
        run.missing.append(f"No completions: {tables[-1].name} could not be read ({error}).")
        return []
    return [_clean(row) for row in rows if row.get("prompt") is not None and row.get("completion") is not None]


def _clean(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as it was logged: what was not scored by the PRM has no process reward, and messages only their own keys."""
    # PRIME's columns lose their prefix and take the place of a user's column of that name
    ours = {name.removeprefix(TABLE_PREFIX): value for name, value in row.items() if name.startswith(TABLE_PREFIX)}
    row = {**row, **ours}
    # Rows that were not trained on have a zero there; a real sum of rewards is never exactly that
    if not row.get("trained") and row.get("process_reward") == 0:
        row["process_reward"] = None
    for column in ("prompt", "completion"):
        if isinstance(row[column], list):
            row[column] = [
                {key: value for key, value in message.items() if value is not None} for message in row[column]
            ]
    return row


# --- Curves ---


def downsample(steps: Sequence[float], values: Sequence[float], max_points: int) -> tuple[list[float], list[float]]:
    """
    Thin out a curve so that its outline stays: the lowest and the highest value of every stretch, and both ends.

    Args:
        steps, values (`list[float]`): n points, in order.
        max_points (`int`): Points to keep, at least 4. Fewer are returned as they are.

    Returns:
        `tuple[list[float], list[float]]`: at most `max_points` of the points, in order.
    """
    if len(values) <= max_points:
        return list(steps), list(values)
    values_array = np.asarray(values, dtype=float)
    # The ends stand aside, so that they are kept without being counted twice
    stretches = np.array_split(np.arange(1, len(values) - 1), (max_points - 2) // 2)
    kept = {0, len(values) - 1}
    for stretch in stretches:
        kept |= {int(stretch[values_array[stretch].argmin()]), int(stretch[values_array[stretch].argmax()])}
    chosen = sorted(kept)
    return [steps[i] for i in chosen], [values[i] for i in chosen]


def curve(history: Sequence[Mapping[str, Any]], metric: str) -> tuple[list[float], list[float]]:
    """
    Steps and values of a metric; where a step was logged twice, as after a resumption, the later value counts.

    Args:
        history (`list[dict]`): `log_history`.
        metric (`str`): Key.

    Returns:
        `tuple[list[float], list[float]]`: in the order of the steps; values that are not finite numbers are left out.
    """
    points = {}
    for row in history:
        step, value = row.get("step"), row.get(metric)
        if _is_number(step) and _is_number(value):
            points[step] = value
    ordered = sorted(points.items())
    return [step for step, _ in ordered], [value for _, value in ordered]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def panel_data(runs: Sequence[Run], panel: Panel, max_points: int = MAX_POINTS) -> dict[str, Any] | None:
    """A chart with the curves of all runs, for `curves.js`; `None` if no run has logged any of its metrics."""
    series = []
    for line, (metric, label) in enumerate(panel.series.items()):
        for number, run in enumerate(runs):
            steps, values = downsample(*curve(run.history, metric), max_points)
            if steps:
                series.append(
                    {
                        "run": number,
                        "line": line,
                        "label": label,
                        "x": [finite(step, 9) for step in steps],
                        "y": [finite(value, 5) for value in values],
                    }
                )
    if not series:
        return None
    return {"title": panel.title, "note": panel.note, "share": panel.share, "series": series}


def other_panels(runs: Sequence[Run]) -> list[Panel]:
    """A chart for each metric that was logged at two steps or more and has no place in `PANELS`."""
    shown = {metric for panel in PANELS for metric in panel.series} | {"step", "epoch"}
    names = sorted({name for run in runs for row in run.history for name in row} - shown)
    return [
        Panel(name, {name: "value"}) for name in names if any(len(curve(run.history, name)[0]) > 1 for run in runs)
    ]


# --- Tables ---


def start_and_end(values: Sequence[float], share: float = 0.1) -> tuple[float, float]:
    """Means of the first and of the last tenth of a curve, of one value at least."""
    size = max(1, round(len(values) * share))
    return float(np.mean(values[:size])), float(np.mean(values[-size:]))


def statistics(history: Sequence[Mapping[str, Any]], metrics: Mapping[str, str]) -> list[dict[str, Any]]:
    """
    A row for each metric that was logged.

    Args:
        history (`list[dict]`): `log_history`.
        metrics (`dict[str, str]`): Metric to its label.

    Returns:
        `list[dict]`: `label`; `start` and `end`, see [`start_and_end`]; `mean`, `lowest` and `highest` over all steps.
    """
    rows = []
    for metric, label in metrics.items():
        values = curve(history, metric)[1]
        if values:
            start, end = start_and_end(values)
            rows.append(
                {
                    "label": label,
                    "start": start,
                    "end": end,
                    "mean": float(np.mean(values)),
                    "lowest": min(values),
                    "highest": max(values),
                }
            )
    return rows


FILTER_METRICS = {
    "filter/pass_rate": "groups inside the accuracy band",
    "filter/trained": "completions trained on",
    "filter/judged": "completions that a reward function could judge",
    "frac_reward_zero_std": "groups whose rewards are all equal",
}


def result_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A row for each number of any `results.json`, with the numbers of all runs, `None` where a run has it not."""
    flat = [
        {
            f"{RESULT_LABELS.get(part, part)}: {name.replace('_', ' ')}": value
            for part, numbers in run.results.items()
            if isinstance(numbers, dict)
            for name, value in numbers.items()
            if _is_number(value)
        }
        for run in runs
    ]
    labels = dict.fromkeys(label for numbers in flat for label in numbers)
    return [{"label": label, "values": [numbers.get(label) for numbers in flat]} for label in labels]


def setting_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """
    A row for each setting: what differs between the runs first, then what a result depends on most, then the rest by name.

    Returns:
        `list[dict]`: `name`, `values` (text for each run), `differs`, `main`.
    """
    with_settings = [run for run in runs if run.settings]
    rows = []
    for name in sorted({name for run in with_settings for name in run.settings}):
        values = [_setting_text(run.settings[name]) if name in run.settings else "–" for run in runs]
        differs = len({_setting_text(run.settings.get(name)) for run in with_settings}) > 1
        rows.append({"name": name, "values": values, "differs": differs, "main": name in SETTINGS})
    return sorted(rows, key=lambda row: (not row["differs"], not row["main"]))


def _setting_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


# --- Completions ---

# Each list is ordered by the first of these columns, and among equals by the second
LISTS = (
    ("Highest outcome", ("outcome", "process_reward"), True),
    ("Lowest outcome", ("outcome", "process_reward"), False),
    ("Highest process reward", ("process_reward", "outcome"), True),
    ("Lowest process reward", ("process_reward", "outcome"), False),
)


def best_and_worst(rows: Sequence[Mapping[str, Any]], num: int) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """
    The completions at the ends of the outcomes and of the process rewards. A completion is shown once: in a later list the
    next one takes its place. Equal texts to equal prompts count as one completion. What got no reward is not among the highest
    outcomes, however few there are.

    Args:
        rows (`list[dict]`): Rows of a completions table. Those without the number that orders a list are left out of it.
        num (`int`): Completions of a list.

    Returns:
        `list[tuple[str, list[dict]]]`: title and rows of each list that is not empty.
    """
    lists, shown = [], set()
    for title, columns, descending in LISTS:
        first, second = columns
        known = [row for row in rows if _is_number(row.get(first))]
        if title == "Highest outcome":
            known = [row for row in known if row[first] > 0]
        keys = [(row[first], row[second] if _is_number(row.get(second)) else 0.0) for row in known]
        chosen: list[Mapping[str, Any]] = []
        for i in sorted(range(len(known)), key=keys.__getitem__, reverse=descending):
            row = known[i]
            identity = json.dumps([row["prompt"], row["completion"]], sort_keys=True, default=str)
            if len(chosen) < num and identity not in shown:
                shown.add(identity)
                chosen.append(row)
        if chosen:
            lists.append((title, chosen))
    return lists


def completion_lists(run: Run, num: int) -> list[tuple[str, list[Completion]]]:
    """
    The lists of [`best_and_worst`], scored by the PRM of the run if there is one; why not is added to `run.missing`.

    Args:
        run ([`Run`]): The run.
        num (`int`): Completions of a list.

    Returns:
        `list[tuple[str, list[Completion]]]`: title and completions of each list.
    """
    lists = [(title, [_shown(row) for row in rows]) for title, rows in best_and_worst(run.completions, num)]
    shown = [completion for _, completions in lists for completion in completions]
    if not shown:
        return lists
    if run.prm_folder is None:
        run.missing.append("No heat maps: there is no prm/ folder.")
        return lists
    can_be = [is_text_or_messages(c.prompt) and can_be_scored(c.completion) for c in shown]
    if not all(can_be):
        run.missing.append(
            f"{can_be.count(False)} of the completions have no heat map: they are not text throughout, as where tools were called."
        )
    try:
        scored = score_completions(
            load_prm(str(run.prm_folder)), [c for c, ok in zip(shown, can_be, strict=True) if ok]
        )
    # The folder of another run, machine or version may fail in any way, and the curves are still worth a page
    except Exception as error:
        run.missing.append(f"No heat maps: the PRM could not score the completions ({type(error).__name__}: {error}).")
        return lists
    remaining = iter(scored)
    all_shown = iter([next(remaining) if ok else completion for completion, ok in zip(shown, can_be, strict=True)])
    return [(title, [next(all_shown) for _ in completions]) for title, completions in lists]


def _shown(row: Mapping[str, Any]) -> Completion:
    facts = {}
    # The second is what this package's verifiers log
    for column, label in (("gold", "gold answer"), ("answer", "answer found")):
        if row.get(column) is not None:
            facts[label] = visible_text(str(row[column])[:MAX_ANSWER_LENGTH], mark_whitespace=False)
    if row.get("turn_rewards"):
        facts["process rewards of the turns then"] = str(row["turn_rewards"])[:MAX_ANSWER_LENGTH].replace("-", "−")
    for column, label in (("process_reward", "process reward then"), ("advantage", "advantage")):
        if _is_number(row.get(column)):
            facts[label] = f"{row[column]:+.3f}".replace("-", "−")
    if "trained" in row:
        facts["trained on"] = "yes" if row["trained"] else "no"
    outcome = row["outcome"] if _is_number(row.get("outcome")) else None
    return Completion(row["prompt"], row["completion"], outcome, facts=facts)


# --- The page ---


def run_names(folders: Sequence[str | os.PathLike]) -> list[str]:
    """Short names of runs that differ: the last part of each path, and as many before it as it takes."""
    parts = [Path(folder).resolve().parts for folder in folders]
    length = 1
    while length < max(map(len, parts)) and len({part[-length:] for part in parts}) < len(set(parts)):
        length += 1
    return ["/".join(part[-length:]) for part in parts]


def run_report(runs: Sequence[Run], num_completions: int) -> str:
    """
    The page as HTML.

    Args:
        runs (`list[Run]`): The runs; their curves lie over each other.
        num_completions (`int`): Completions to show in each list, with heat maps by the run's PRM; 0 for none, and then no
            model is loaded.

    Returns:
        `str`: HTML that needs no other file.
    """
    lists = [completion_lists(run, num_completions) if num_completions else [] for run in runs]
    cards: list[Any] = []
    sections = []
    for run, run_lists in zip(runs, lists, strict=True):
        shown = [completion for _, completions in run_lists for completion in completions]
        scales = (token_scale(shown), step_scale(shown))
        section = {
            "name": run.name,
            "step": run.completions[0].get("step") if run.completions else None,
            "scored": any(completion.scored is not None for completion in shown),
            "scales": scales,
            "lists": [],
        }
        for title, completions in run_lists:
            section["lists"].append((title, len(cards), make_cards(completions, *scales)))
            cards += [card_data(completion) for completion in completions]
        sections.append(section)
    panels = [data for panel in PANELS if (data := panel_data(runs, panel))]
    others = [data for panel in other_panels(runs) if (data := panel_data(runs, panel, MAX_OTHER_POINTS))]
    settings = setting_rows(runs)
    return render_page(
        "report.html.jinja",
        ["heat_map.js", "curves.js"],
        {"cards": cards, "runs": [run.name for run in runs], "panels": panels, "others": others},
        title=" and ".join(run.name for run in runs),
        runs=runs,
        tiles=[(run.name, _tiles(run)) for run in runs],
        num_panels=len(panels),
        num_others=len(others),
        filters=[(run.name, rows) for run in runs if (rows := statistics(run.history, FILTER_METRICS))],
        results=result_rows(runs),
        settings=settings,
        first_settings=[row for row in settings if row["differs"] or row["main"]],
        sections=sections,
    )


def _tiles(run: Run) -> list[tuple[str, str]]:
    """The numbers that stand at the top, each with its label."""
    tiles = []
    steps = [row["step"] for row in run.history if _is_number(row.get("step"))]
    if steps:
        tiles.append((f"{max(steps):g}", "steps"))
    for metric, label in (
        ("reward", "outcome reward, first and last tenth"),
        ("prm/pairwise_accuracy", "pairs that the PRM ranks right"),
        ("filter/pass_rate", "groups in the accuracy band"),
    ):
        values = curve(run.history, metric)[1]
        if values:
            start, end = start_and_end(values)
            tiles.append((f"{start:.2f} → {end:.2f}", label))
    runtime = curve(run.history, "train_runtime")[1]
    if runtime:
        seconds = round(runtime[-1])
        hours, minutes = divmod(seconds // 60, 60)
        tiles.append((f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds % 60} s", "training"))
    return tiles
