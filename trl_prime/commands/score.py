"""`trl-prime score`: what an implicit PRM thinks of completions, token by token.

`trl-prime score --prm_name_or_path RUN --input FILE.jsonl --html OUT.html`, or `--prompt TEXT --completion TEXT`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import parse_arguments
from .models import check_prm

if TYPE_CHECKING:
    from ..reports.score_page import Completion

# The first of these fields that a row has is its outcome
OUTCOME_FIELDS = ("outcome", "label", "reward")


@dataclass
class ScoreArguments:
    """
    Arguments of `trl-prime score`.

    Parameters:
        prm_name_or_path (`str`): Folder or Hub id of the PRM, or of a run whose `prm/` holds it.
        input (`str`, *optional*): JSONL file. A row has a `prompt` (text or messages), a `completion` or a list of
            `completions` (text, or messages of text from an assistant's on), and may have an `outcome`, `label` or `reward`, and `truncated`,
            whether the completion was cut off (lists next to `completions`).
        prompt (`str`, *optional*): A prompt in the place of a file: the user's message where the PRM was trained on messages.
        completion (`list[str]`, *optional*): Its completions.
        html (`str`, *optional*): Page to write.
        json (`str`, *optional*): File to write the numbers to.
        show (`int`): Completions to print in the terminal.
        reference (`str`, *optional*): The PRM's reference model, where the PRM does not name its own.
        beta (`float`, *optional*): Reward scale; that of the PRM if not given.
        step_delimiter (`str`, *optional*): Text that ends a step; that of the PRM if not given.
        batch_size (`int`): Completions of one forward pass.
    """

    prm_name_or_path: str = field(
        metadata={"help": "Folder or Hub id of the PRM, or of a run whose prm/ folder holds it."}
    )
    input: str | None = field(
        default=None,
        metadata={
            "help": "JSONL file: rows with a prompt (text or messages), a completion or a list of completions (text, or messages "
            "of text from an assistant's on), and, if known, an outcome, label or reward, and truncated (lists next to completions)."
        },
    )
    prompt: str | None = field(
        default=None,
        metadata={
            "help": "A prompt in the place of a file: the user's message where the PRM was trained on messages."
        },
    )
    completion: list[str] | None = field(default=None, metadata={"help": "Completions of that prompt."})
    html: str | None = field(default=None, metadata={"help": "Write a page with the heat maps to this file."})
    json: str | None = field(default=None, metadata={"help": "Write the numbers to this file."})
    show: int = field(default=8, metadata={"help": "Completions to print in the terminal."})
    reference: str | None = field(
        default=None, metadata={"help": "The PRM's reference model, where the PRM does not name its own."}
    )
    beta: float | None = field(default=None, metadata={"help": "Reward scale. Defaults to that of the PRM."})
    step_delimiter: str | None = field(
        default=None, metadata={"help": "Text that ends a step. Defaults to that of the PRM."}
    )
    batch_size: int = field(default=8, metadata={"help": "Completions of one forward pass."})

    def __post_init__(self):
        if (self.input is None) == (self.prompt is None):
            raise ValueError("Give either --input, a JSONL file, or --prompt with --completion.")
        if (self.prompt is None) != (self.completion is None):
            raise ValueError("--prompt and --completion go together: give both, or --input.")
        if self.batch_size < 1:
            raise ValueError(
                f"--batch_size is {self.batch_size}, but at least one completion has to fit: give 1 or more."
            )
        if self.show < 0:
            raise ValueError(f"--show is {self.show}; give the number of completions to print, 0 for none.")
        if self.beta is not None and self.beta <= 0:
            raise ValueError(f"--beta is {self.beta}, but the reward scale must be positive. The paper uses 0.05.")
        if self.step_delimiter == "":
            raise ValueError("--step_delimiter is empty: give the text that ends a step, such as $'\\n'.")


def prepare(argv: list[str]) -> Callable[[], int]:
    """The job of scoring completions."""
    (args,) = parse_arguments([ScoreArguments], argv, prog="trl-prime score")
    if args.input is not None:
        completions = read_rows(args.input)
    else:
        completions = _row_completions({"prompt": args.prompt, "completions": args.completion}, "--completion")
    check_prm("prm_name_or_path", args.prm_name_or_path, reference_option="reference", reference=args.reference)

    from rich.console import Console
    from rich.markup import escape

    from ..implicit_prm.build import load_prm
    from ..reports.page import write_page
    from ..reports.score_page import numbers, score_completions, score_page
    from ..reports.terminal import print_completions

    try:
        prm = load_prm(
            args.prm_name_or_path,
            reference=args.reference,
            beta=args.beta,
            step_delimiter=args.step_delimiter,
            micro_batch_size=args.batch_size,
        )
    except OSError as error:
        raise ValueError(f"The PRM '{args.prm_name_or_path}' could not be loaded: {error}") from error

    if args.prompt is not None and prm.text_format.messages:
        messages = [{"role": "user", "content": args.prompt}]
        completions = [replace(completion, prompt=messages) for completion in completions]

    def job() -> int:
        scored = score_completions(prm, completions)
        console = Console()
        print_completions(scored, console, args.show)
        about = {"prm": args.prm_name_or_path, "beta": prm.beta}
        if args.html is not None:
            write_page(score_page(scored, **about), args.html)
            console.print(f"page: [bold]{escape(args.html)}[/bold]", soft_wrap=True)
        if args.json is not None:
            Path(args.json).parent.mkdir(parents=True, exist_ok=True)
            written = numbers(scored, **about, step_delimiter=prm.step_delimiter)
            Path(args.json).write_text(json.dumps(written, indent=1) + "\n")
            console.print(f"numbers: [bold]{escape(args.json)}[/bold]", soft_wrap=True)
        return 0

    return job


def read_rows(path: str) -> list[Completion]:
    """
    The completions of a JSONL file, not scored yet.

    Args:
        path (`str`): The file.

    Returns:
        `list[Completion]`

    Raises:
        ValueError: There is no such file, or a row is malformed; the message names its line.
    """
    if not Path(path).is_file():
        raise ValueError(f"--input is {path!r}, which is no file. Give a JSONL file.")
    completions = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        where = f"Line {number} of {path}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where} is no JSON ({error}). Give one JSON object a line.") from error
        completions += _row_completions(row, where)
    if not completions:
        raise ValueError(f"--input is {path!r}, which has no rows.")
    return completions


def _row_completions(row: Any, where: str) -> list[Completion]:
    from ..reports.score_page import Completion
    from ..texts import can_be_scored, is_text_or_messages

    if not isinstance(row, dict) or "prompt" not in row or ("completion" in row) == ("completions" in row):
        raise ValueError(f"{where} must be an object with a `prompt` and either a `completion` or `completions`.")
    prompt = row["prompt"]
    if not is_text_or_messages(prompt):
        raise ValueError(
            f"{where} has a `prompt` that is neither text nor a list of messages with a role and a content."
        )
    if "image" in row or "images" in row:
        raise ValueError(
            f"{where} has images, but trl-prime score reads text only. Use ImplicitPRM.score from Python."
        )
    completions = row["completions"] if "completions" in row else [row["completion"]]
    outcomes = next((row[name] for name in OUTCOME_FIELDS if row.get(name) is not None), None)
    if "completions" not in row or outcomes is None:
        outcomes = [outcomes] * max(len(completions), 1) if isinstance(completions, list) else None
    if not isinstance(completions, list) or not isinstance(outcomes, list) or len(outcomes) != len(completions):
        raise ValueError(f"{where} must have `completions` that are a list, and as many outcomes if there are any.")
    truncated = row.get("truncated", False)
    truncated = truncated if isinstance(truncated, list) else [truncated] * len(completions)
    if len(truncated) != len(completions) or not all(isinstance(value, bool) for value in truncated):
        raise ValueError(f"{where} must have `truncated` that is true or false, or as many of these as completions.")
    for completion in completions:
        if not can_be_scored(completion):
            raise ValueError(
                f"{where} has a completion that is neither text nor messages of text of which the first is the assistant's."
            )
    return [
        Completion(prompt, completion, _number(outcome, where), truncated=cut)
        for completion, outcome, cut in zip(completions, outcomes, truncated, strict=True)
    ]


def _number(outcome: Any, where: str) -> float | None:
    if outcome is None or (isinstance(outcome, float) and math.isnan(outcome)):
        return None
    if not isinstance(outcome, (bool, int, float)):
        raise ValueError(f"{where} has the outcome {outcome!r}, which is no number.")
    return float(outcome)
