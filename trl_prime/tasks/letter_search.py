"""Letter search: a built-in task of several turns, on which a PRIME run works with no network on a CPU.

The environment has drawn a letter from a to h. In each turn the policy asks by a tool call whether the letter comes after
one of its choice, `?d`, and is told `+` (it does) or `-`. After at most three questions it answers, `=f`, and only the
answer is judged. Whoever halves what is left is always right; a question about what is known already is a wasted turn.

It is not a benchmark of agents. It shows that training over turns works and lets it be measured. The base model is made on
the spot and asks badly on purpose: see `make_demonstrations`.
"""

from __future__ import annotations

import importlib.util
import random
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..texts import completion_text
from .task import Task, made_once
from .tiny_model import build_model, build_tokenizer
from .warm_up import warm_up

if TYPE_CHECKING:
    from datasets import Dataset

LETTERS = "abcdefgh"
NUM_QUESTIONS = 3
PROMPT = "a-h"
CHARACTERS = f"{LETTERS}?=+->"
# A step of the warm-up has so many demonstrations
BATCH_SIZE = 64

# A turn of the policy begins after `>` and ends by the end-of-sequence token
_CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ '>' + message['content'] }}"
    "{% for call in message['tool_calls'] or [] %}"
    "{{ '?' + call['function']['name'] + call['function']['arguments'] | tojson }}{% endfor %}{{ '<eos>' }}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '>' }}{% endif %}"
)
# How transformers reads a question as a tool call
_RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": ">",
    "fields": {
        "tool_calls": {
            "open_pattern": r"\?(?P<letter>[a-h])",
            "close_pattern": r"<eos>|$",
            "repeats": True,
            "content": "text",
            "transform": {"type": "function", "function": {"name": "ask", "arguments": {"letter": "{letter}"}}},
        },
        "content": {"close_pattern": r"<eos>|$", "content": "text"},
    },
}


class LetterSearch:
    """The environment, as TRL's `environment_factory` takes it: one game at a time, of the letter in the row's `secret`."""

    def reset(self, secret: str, **kwargs: Any) -> None:
        self._secret = secret

    def ask(self, letter: str) -> str:
        """
        Ask whether the secret letter comes after another.

        Args:
            letter: The other letter.
        """
        return "+" if self._secret > letter else "-"


def answer_reward(completions: list[list[dict[str, Any]]], secret: list[str], **kwargs: Any) -> list[float]:
    """Outcome reward: is the last turn the answer, and is it right?

    Args:
        completions: The turns of each completion; the last one is read.
        secret: The letter of each game.
        **kwargs: Other columns that TRL passes; not used.

    Returns:
        1.0 or 0.0 for each completion.
    """
    return [
        float(completion_text(completion) == f"={letter}")
        for completion, letter in zip(completions, secret, strict=True)
    ]


def make_dataset(num_games: int, *, seed: int = 0) -> Dataset:
    """Draw games.

    Args:
        num_games: How many.
        seed: Same seed, same games.

    Returns:
        Data set with the columns `prompt` (messages, the same in all rows) and `secret`.
    """
    from datasets import Dataset

    rng = random.Random(seed)
    prompt = [{"role": "user", "content": PROMPT}]
    return Dataset.from_list([{"prompt": prompt, "secret": rng.choice(LETTERS)} for _ in range(num_games)])


def _demonstration(waste_rate: float, rng: random.Random) -> str:
    secret, low, high, turns = rng.randrange(len(LETTERS)), 0, len(LETTERS) - 1, []
    for _ in range(NUM_QUESTIONS):
        if low == high:
            break
        asked = rng.randrange(len(LETTERS)) if rng.random() < waste_rate else rng.randrange(low, high)
        after = secret > asked
        low, high = (max(low, asked + 1), high) if after else (low, min(high, asked))
        turns.append(f"?{LETTERS[asked]}<eos>{'+' if after else '-'}>")
    return "".join(turns) + f"={LETTERS[rng.randint(low, high)]}"


def make_demonstrations(count: int, *, seed: int = 0, waste_rate: float = 0.5) -> Dataset:
    """Draw demonstrations of a player who knows the rules and asks badly.

    The question is about any letter of which the answer is not known yet, not the one in the middle, and at the rate
    `waste_rate` about any letter at all. The answer is one of the letters that are left.

    Args:
        count: How many.
        seed: Same seed, same demonstrations.
        waste_rate: Share of the questions without thought, from 0 to 1.

    Returns:
        Data set with the columns `prompt` and `completion`, both text.

    Raises:
        ValueError: If `waste_rate` is out of range.
    """
    from datasets import Dataset

    if not 0 <= waste_rate <= 1:
        raise ValueError(f"waste_rate must be from 0 to 1, got {waste_rate}")
    rng = random.Random(f"warm-up {seed}")
    return Dataset.from_list(
        [{"prompt": f"{PROMPT}>", "completion": _demonstration(waste_rate, rng)} for _ in range(count)]
    )


def prepare(
    output_dir: str | Path,
    *,
    seed: int = 0,
    num_train: int = 4096,
    num_test: int = 256,
    warm_up_steps: int = 300,
    waste_rate: float = 0.5,
) -> Task:
    """Make the task: draw the games, and train and save the base model unless that was done before.

    The base goes to `<output_dir>/sft`, as that of the running sums does. Call it from one process only.

    Args:
        output_dir: Folder to work in.
        seed: Seed of the games, the initial weights and the warm-up.
        num_train: Games to train on.
        num_test: Held-out games.
        warm_up_steps: Optimizer steps of the warm-up.
        waste_rate: See `make_demonstrations`.

    Returns:
        The task, with this base model, its environment and the outcome reward.

    Raises:
        ValueError: If a number is out of range, or transformers is older than 5.13.
    """
    if importlib.util.find_spec("transformers.utils.chat_parsing") is None:
        raise ValueError(
            f"The task 'letter_search' has tool calls of its own form, which transformers {version('transformers')} cannot read. "
            "Install transformers 5.13 or newer."
        )
    base = Path(output_dir) / "sft"

    def make() -> None:
        tokenizer = build_tokenizer(CHARACTERS)
        tokenizer.chat_template, tokenizer.response_template = _CHAT_TEMPLATE, _RESPONSE_TEMPLATE
        warm_up(
            build_model(tokenizer, seed=seed, hidden_size=64),
            tokenizer,
            make_demonstrations(warm_up_steps * BATCH_SIZE, seed=seed, waste_rate=waste_rate),
            base,
            steps=warm_up_steps,
            batch_size=BATCH_SIZE,
            learning_rate=2e-3,
            warmup_steps=min(20, warm_up_steps // 10),
            seed=seed,
        )

    settings = {"format": 1, "task": "letter_search", "seed": seed, "waste_rate": waste_rate}
    made_once(base, {**settings, "warm_up_steps": warm_up_steps}, make)
    return Task(
        name="letter_search",
        model=str(base),
        train_dataset=make_dataset(num_train, seed=2 * seed),
        eval_dataset=make_dataset(num_test, seed=2 * seed + 1),
        reward_funcs=[answer_reward],
        environment=LetterSearch,
    )
