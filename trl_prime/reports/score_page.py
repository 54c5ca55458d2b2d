"""The page of `trl-prime score --html`: completions of each prompt side by side, coloured by their process rewards."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import track

from ..implicit_prm.accuracies import absolute_accuracy, pairwise_wins
from ..texts import completion_text
from .heat_map import (
    NUM_BINS,
    colour_scale,
    curve_points,
    finite,
    intensities,
    lowest_step,
    mean_by_position,
    position_counts,
    relative_positions,
    visible_text,
)
from .page import render_page

if TYPE_CHECKING:
    from ..implicit_prm import ImplicitPRM, ScoredCompletion

CURVE_WIDTH, CURVE_HEIGHT = 300.0, 48.0


@dataclasses.dataclass(frozen=True)
class Completion:
    """
    A completion to show.

    Attributes:
        prompt (`str` or `list[dict]`): Its prompt.
        completion (`str` or `list[dict]`): The completion.
        outcome (`float`, *optional*): Its outcome reward; `None` if not known.
        truncated (`bool`): Whether it was cut off, so that no token ends it.
        scored ([`~trl_prime.implicit_prm.ScoredCompletion`], *optional*): The rewards that the PRM gives it.
        facts (`dict[str, str]`): More to show, by label.
    """

    prompt: Any
    completion: Any
    outcome: float | None = None
    truncated: bool = dataclasses.field(default=False, kw_only=True)
    scored: ScoredCompletion | None = None
    facts: dict[str, str] = dataclasses.field(default_factory=dict)


def score_completions(prm: ImplicitPRM, completions: Sequence[Completion]) -> list[Completion]:
    """
    Completions with what a PRM thinks of them; a progress bar is shown in a terminal.

    Args:
        prm ([`~trl_prime.ImplicitPRM`]): The PRM.
        completions (`list[Completion]`): Completions, scored or not.

    Returns:
        `list[Completion]`: the same, scored.
    """
    # A chunk is large enough that rows of like length meet in a forward pass, and small enough that the bar moves
    size = 4 * prm.micro_batch_size
    scored = []
    starts = range(0, len(completions), size)
    for start in track(starts, "scoring", transient=True, disable=not Console().is_terminal):
        chunk = completions[start : start + size]
        scored += prm.score([c.prompt for c in chunk], [c.completion for c in chunk], [c.truncated for c in chunk])
    return [dataclasses.replace(c, scored=result) for c, result in zip(completions, scored, strict=True)]


def by_prompt(completions: Iterable[Completion]) -> list[list[Completion]]:
    """Completions of equal prompts together, in the order in which the prompts come."""
    groups: dict[str, list[Completion]] = {}
    for completion in completions:
        groups.setdefault(json.dumps(completion.prompt, sort_keys=True), []).append(completion)
    return list(groups.values())


def prompt_parts(prompt: Any) -> list[tuple[str, str]]:
    """Role and text, both made visible, of each message of a prompt; a prompt that is text has the role `""`."""
    messages = [{"role": "", "content": prompt}] if isinstance(prompt, str) else prompt
    parts = [(message.get("role") or "", completion_text([message])) for message in messages]
    return [(visible_text(str(role)), visible_text(text, mark_whitespace=False)) for role, text in parts]


def outcome_kind(outcome: float | None) -> str:
    """Class of the badge: `"right"` above one half, as PRM labels are read, `"wrong"` else; `""` if not known."""
    if outcome is None:
        return ""
    return "right" if outcome > 0.5 else "wrong"


def token_scale(completions: Iterable[Completion]) -> float:
    """Token reward of full colour of all completions of a page."""
    return colour_scale([c.scored.token_rewards for c in completions if c.scored is not None])


def step_scale(completions: Iterable[Completion]) -> float:
    """Step reward of full colour of all completions of a page."""
    return colour_scale([c.scored.step_rewards for c in completions if c.scored is not None])


def visible_tokens(scored: ScoredCompletion) -> list[str]:
    """The tokens as they are shown, in rows of a step each: without the line break at the end of a step."""
    texts = [visible_text(token) for token in scored.tokens]
    ends = [*(step != following for step, following in itertools.pairwise(scored.step_ids)), True]
    return [text.removesuffix("\n") if end else text for text, end in zip(texts, ends, strict=True)]


def make_cards(completions: Sequence[Completion], full_token: float, full_step: float) -> list[dict[str, Any]]:
    """
    The cards of completions that stand side by side; their curves of the cumulated reward share an axis.

    Args:
        completions (`list[Completion]`): N completions, scored or not.
        full_token, full_step (`float`): Token and step reward of full colour.

    Returns:
        `list[dict]`: N cards for the macro `card` of `cards.html.jinja`.
    """
    curves = [_cumulated(c.scored) if c.scored is not None else [0.0] for c in completions]
    known = [value for curve in curves for value in curve if finite(value) is not None]
    low, high = min(known, default=0.0), max(known, default=0.0)
    cards = []
    for completion, curve in zip(completions, curves, strict=True):
        card = {
            "prompt": prompt_parts(completion.prompt),
            "text": visible_text(completion_text(completion.completion), mark_whitespace=False),
            "outcome": completion.outcome,
            "outcome_kind": outcome_kind(completion.outcome),
            "facts": completion.facts,
            "scored": completion.scored is not None,
        }
        if completion.scored is not None:
            card |= _scored_card(completion.scored, full_token, full_step)
            card |= {
                "curve": curve_points(curve, low, high, CURVE_WIDTH, CURVE_HEIGHT),
                "zero": curve_points([0.0, 0.0], low, high, CURVE_WIDTH, CURVE_HEIGHT),
                "curve_size": (CURVE_WIDTH, CURVE_HEIGHT),
            }
        cards.append(card)
    return cards


def _cumulated(scored: ScoredCompletion) -> list[float]:
    return [0.0, *scored.token_rewards.double().nan_to_num().cumsum(0).tolist()]


def _scored_card(scored: ScoredCompletion, full_token: float, full_step: float) -> dict[str, Any]:
    lowest = lowest_step(scored.step_rewards)
    steps: list[dict[str, Any]] = [
        {"reward": reward, "intensity": intensity, "lowest": i == lowest, "tokens": []}
        for i, (reward, intensity) in enumerate(
            zip(scored.step_rewards.tolist(), intensities(scored.step_rewards, full_step), strict=True)
        )
    ]
    token_intensities = intensities(scored.token_rewards, full_token)
    for text, step, intensity in zip(visible_tokens(scored), scored.step_ids, token_intensities, strict=True):
        steps[step]["tokens"].append({"text": text, "intensity": intensity})
    return {
        "q": scored.reward,
        "probability": scored.probability,
        "steps": steps,
        "lowest": None if lowest is None else lowest + 1,
        "lowest_reward": None if lowest is None else scored.step_rewards[lowest].item(),
    }


def card_data(completion: Completion) -> dict[str, Any] | None:
    """The numbers that `heat_map.js` shows of a completion's tokens; `None` if it is not scored."""
    if completion.scored is None:
        return None
    scored = completion.scored
    return {
        "rewards": [finite(value) for value in scored.token_rewards.tolist()],
        "prm": [finite(value) for value in scored.prm_logps.tolist()],
        "reference": [finite(value) for value in scored.ref_logps.tolist()],
        "steps": scored.step_ids,
        "stepRewards": [finite(value) for value in scored.step_rewards.tolist()],
    }


def summarize(groups: Sequence[Sequence[Completion]]) -> dict[str, Any]:
    """
    Where the reward falls, and how well it agrees with the outcomes that are known.

    Args:
        groups (`list[list[Completion]]`): Scored completions of each prompt.

    Returns:
        `dict`: `lowest` (for each kind of outcome the counts of [`position_counts`] of the steps with the lowest reward),
        `by_position` ([`mean_by_position`]), `accuracy` and `pairwise_accuracy` (`None` if they cannot be told).
    """
    completions = [completion for group in groups for completion in group]
    positions: dict[str, list[float]] = {"right": [], "wrong": [], "": []}
    for completion in completions:
        step_rewards = completion.scored.step_rewards
        lowest = lowest_step(step_rewards)
        if lowest is not None:
            positions[outcome_kind(completion.outcome)].append(relative_positions(len(step_rewards))[lowest])
    wins, pairs = 0.0, 0
    for group in groups:
        group_wins, group_pairs = pairwise_wins(*_scores_and_outcomes(group), len(group))
        wins, pairs = wins + group_wins, pairs + group_pairs
    return {
        "lowest": {kind: position_counts(found) for kind, found in positions.items() if found},
        "by_position": mean_by_position([completion.scored.token_rewards for completion in completions]),
        "accuracy": finite(absolute_accuracy(*_scores_and_outcomes(completions))),
        "pairwise_accuracy": finite(wins / pairs) if pairs else None,
    }


def _scores_and_outcomes(completions: Sequence[Completion]) -> tuple[torch.Tensor, torch.Tensor]:
    scores = torch.tensor([completion.scored.reward for completion in completions])
    outcomes = [float("nan") if completion.outcome is None else completion.outcome for completion in completions]
    return scores, torch.tensor(outcomes)


def _bars(summary: dict[str, Any]) -> dict[str, Any]:
    """Heights, between 0 and 1, of the bars of the two histograms."""
    tallest = max((sum(column) for column in zip(*summary["lowest"].values(), strict=True)), default=0) or 1
    largest = max((abs(mean) for mean in summary["by_position"] if mean is not None), default=0.0) or 1.0
    return {
        "lowest": [
            [(kind, counts[i], counts[i] / tallest) for kind, counts in summary["lowest"].items()]
            for i in range(NUM_BINS)
        ],
        "by_position": [(mean, (mean or 0.0) / largest) for mean in summary["by_position"]],
    }


def score_page(completions: Sequence[Completion], *, prm: str, beta: float) -> str:
    """
    The page as HTML.

    Args:
        completions (`list[Completion]`): Scored completions, in any order.
        prm (`str`): Name of the PRM.
        beta (`float`): Its reward scale, in log-odds per nat.

    Returns:
        `str`: HTML that needs no other file.
    """
    groups = by_prompt(completions)
    full_token, full_step = token_scale(completions), step_scale(completions)
    summary = summarize(groups)
    return render_page(
        "score.html.jinja",
        ["heat_map.js"],
        {"cards": [card_data(completion) for group in groups for completion in group]},
        title="What the implicit PRM sees",
        prm=prm,
        beta=beta,
        full_token=full_token,
        full_step=full_step,
        summary=summary,
        bars=_bars(summary),
        num_completions=len(completions),
        groups=[
            {"prompt": prompt_parts(group[0].prompt), "cards": make_cards(group, full_token, full_step)}
            for group in groups
        ],
    )


def numbers(completions: Sequence[Completion], *, prm: str, beta: float, step_delimiter: str) -> dict[str, Any]:
    """The content of the file of `--json`: all that the page shows, in full precision; a number that is not finite is `None`."""

    def listed(values: torch.Tensor) -> list[float | None]:
        return [finite(value, 9) for value in values.tolist()]

    return {
        "prm": prm,
        "beta": beta,
        "step_delimiter": step_delimiter,
        "completions": [
            {
                "prompt": completion.prompt,
                "completion": completion.completion,
                "outcome": completion.outcome,
                "q": finite(completion.scored.reward, 9),
                "probability": finite(completion.scored.probability, 9),
                "tokens": completion.scored.tokens,
                "token_rewards": listed(completion.scored.token_rewards),
                "prm_logps": listed(completion.scored.prm_logps),
                "ref_logps": listed(completion.scored.ref_logps),
                "steps": completion.scored.steps,
                "step_ids": completion.scored.step_ids,
                "step_rewards": listed(completion.scored.step_rewards),
            }
            for completion in completions
        ],
    }
