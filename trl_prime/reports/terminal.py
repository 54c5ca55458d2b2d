"""Heat maps in a terminal. Colours bring their own background, because a terminal's is not known."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console, Group
from rich.style import Style
from rich.table import Table
from rich.text import Text

from .heat_map import THEMES, colour, intensities, lowest_step
from .score_page import Completion, by_prompt, outcome_kind, prompt_parts, step_scale, token_scale, visible_tokens

THEME = THEMES["terminal"]


def _style(intensity: float) -> Style:
    red, green, blue = colour(intensity, THEME)
    return Style(color="rgb({},{},{})".format(*THEME.text), bgcolor=f"rgb({red},{green},{blue})")


def heat_map(completion: Completion, full_token: float, full_step: float) -> Table:
    """
    A scored completion, a row for each step: its reward, the lowest one marked, and its tokens coloured.

    Args:
        completion ([`Completion`]): A scored completion.
        full_token, full_step (`float`): Token and step reward of full colour.

    Returns:
        [`~rich.table.Table`]
    """
    scored = completion.scored
    lines = [Text() for _ in scored.steps]
    token_intensities = intensities(scored.token_rewards, full_token)
    for text, step, intensity in zip(visible_tokens(scored), scored.step_ids, token_intensities, strict=True):
        lines[step].append(text, _style(intensity))
    table = Table.grid(padding=(0, 1))
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    lowest = lowest_step(scored.step_rewards)
    step_intensities = intensities(scored.step_rewards, full_step)
    for i, (line, reward) in enumerate(zip(lines, scored.step_rewards.tolist(), strict=True)):
        mark = Text("▶ " if i == lowest else "")
        table.add_row(mark.append(f" {reward:+.3f} ", _style(step_intensities[i])), line)
    return table


def print_completions(completions: Sequence[Completion], console: Console, num_shown: int) -> None:
    """
    Print scored completions under their prompts.

    Args:
        completions (`list[Completion]`): Scored completions; all share one scale, also those that are not shown.
        console ([`~rich.console.Console`]): The terminal to print to.
        num_shown (`int`): How many are printed, from the first on; a last line says how many are left out.
    """
    full_token, full_step = token_scale(completions), step_scale(completions)
    shown = completions[:num_shown]
    if shown:
        scale = Text("process reward in log-odds ")
        for tenth in range(-10, 11):
            scale.append(" ", _style(tenth / 10))
        console.print(
            scale.append(f" ±{full_token:.3g} for a token,\n±{full_step:.3g} for a step; ▶ marks the lowest step")
        )
    for group in by_prompt(shown):
        console.print()
        for role, text in prompt_parts(group[0].prompt):
            console.print(Text(f"{role}: " if role else "", style="bold").append(text, "default"))
        for number, completion in enumerate(group, 1):
            scored, kind = completion.scored, outcome_kind(completion.outcome)
            header = Text(f"\ncompletion {number}", style="bold")
            header.append(f"  q {scored.reward:+.3f}  probability {scored.probability:.1%}", "default")
            if kind:
                header.append(f"  outcome {completion.outcome:.3g} {'✓' if kind == 'right' else '✗'}")
            console.print(Group(header, heat_map(completion, full_token, full_step)))
    if 0 < len(shown) < len(completions):
        console.print(f"\n{len(completions) - len(shown)} more are not shown; --show shows more.")
