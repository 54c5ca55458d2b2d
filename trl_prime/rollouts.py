"""One generation batch: which outcomes its completions have, and which of its rows are trained on.

Covered: weighted sums of rewards and what a missing reward (None) means; labels of the PRM; tokens that the policy wrote,
truncated completions; prompts of further rounds of generation, taking rows out of the rounds of all processes, and their rows
in TRL's completions table. Not covered: reward functions (`rewards/`), which groups are worth learning from
(`prompt_filter.py`), advantages (`advantages.py`). B = completions of all processes, F = reward functions, K = completions of
a prompt, T = completion tokens; groups are contiguous.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from transformers.utils import logging

from .images import IMAGES, select_images
from .process_rewards import aggregate_process_rewards, reward_positions
from .processes import gather_padded, local_rows
from .prompt_filter import rows_to_train_on

if TYPE_CHECKING:
    from accelerate import Accelerator
    from datasets import Dataset

    from .advantages import RolloutRewards

logger = logging.get_logger(__name__)


@dataclasses.dataclass(frozen=True)
class Rollouts:
    """
    The rows of a generation batch that make up the training batch. B of N generated rows, over all rounds and processes: those
    of the first round before those of the second.

    Attributes:
        output (`dict`): This process's rows, as TRL returns them.
        outcomes (`torch.Tensor`): `(B,)` outcomes; NaN = not trained on.
        labels (`torch.Tensor`): `(B,)` labels of the PRM; NaN = not trained on.
        trains (`torch.Tensor`): `(B,)` bool, whether the row carries a gradient.
        rewards_per_func (`torch.Tensor`): `(B, F)` rewards; NaN = None.
        rows (`torch.Tensor`): `(B,)` places of these rows among the N generated ones.
        generated_outcomes (`torch.Tensor`): `(N,)` outcomes of all generated rows.
    """

    output: dict[str, Any]
    outcomes: torch.Tensor
    labels: torch.Tensor
    trains: torch.Tensor
    rewards_per_func: torch.Tensor
    rows: torch.Tensor
    generated_outcomes: torch.Tensor

    @classmethod
    def of_rounds(
        cls,
        rounds: Sequence[tuple[dict[str, Any], torch.Tensor, torch.Tensor, torch.Tensor]],
        passed: torch.Tensor,
        num_groups: int,
        num_generations: int,
        accelerator: Accelerator,
        pad_token_id: int,
    ) -> Rollouts:
        """
        Groups that passed the prompt filter, in the order of their generation; where there are too few, others too.

        Args:
            rounds (`list[tuple]`): Of each round this process's rows, as TRL returns them, and of all processes outcomes, labels
                and rewards of each function.
            passed (`torch.Tensor`): `(G,)` bool, whether a group passed, of all rounds one after the other.
            num_groups (`int`): Groups of the training batch.
            num_generations (`int`): K.
            accelerator ([`~accelerate.Accelerator`]): Of the trainer.
            pad_token_id (`int`): Fills up token ids.

        Returns:
            [`Rollouts`]: with `num_groups * num_generations` rows.
        """
        outputs, *columns = zip(*rounds, strict=True)
        outcomes, labels, rewards_per_func = map(torch.cat, columns)
        rows = rows_to_train_on(passed, num_groups, num_generations)
        trains = passed.repeat_interleave(num_generations) & ~outcomes.isnan()
        return cls(
            output=select_rows(outputs, rows, accelerator, pad_token_id),
            outcomes=outcomes.masked_fill(~trains, torch.nan)[rows],
            labels=labels.masked_fill(~trains, torch.nan)[rows],
            trains=trains[rows],
            rewards_per_func=rewards_per_func[rows],
            rows=rows,
            generated_outcomes=outcomes,
        )

    def shown_to_hook(
        self, rewards: RolloutRewards, logs: dict[str, Any], accelerator: Accelerator, pad_token_id: int
    ) -> RolloutRewards:
        """
        Rewards with what only a hook needs: the rollouts as ids, and as TRL has just logged them.

        Args:
            rewards ([`~trl_prime.advantages.RolloutRewards`]): Of these rows.
            logs (`dict`): What TRL makes the completions table of.
            accelerator ([`~accelerate.Accelerator`]): Of the trainer.
            pad_token_id (`int`): Fills up token ids.

        Returns:
            [`~trl_prime.advantages.RolloutRewards`]
        """
        texts, num_generated = {}, len(self.generated_outcomes)
        for column in ("prompt", "completion"):
            logged = list(logs[column])[-num_generated:]
            texts[f"{column}s"] = [logged[row] for row in self.rows.tolist()]
        ids = gather_padded(self.output["completion_ids"], accelerator, pad_token_id)
        return dataclasses.replace(rewards, completion_ids=ids, **texts)

    def table_columns(
        self, token_rewards: torch.Tensor, advantages: torch.Tensor, accelerator: Accelerator
    ) -> tuple[dict[str, list], torch.Tensor]:
        """
        What the completions table shows of all N generated rows; those that were left out have no process reward and no
        advantage.

        Args:
            token_rewards (`torch.Tensor`): Process rewards of this process's tokens.
            advantages (`torch.Tensor`): Mean of each row of this process.
            accelerator ([`~accelerate.Accelerator`]): Of the trainer.

        Returns:
            `tuple`: columns by name and advantages, `(N,)` each.
        """
        all_process, all_advantages = (
            torch.zeros(len(self.generated_outcomes), device=self.rows.device).index_copy(
                0, self.rows, accelerator.gather(values.float())
            )
            for values in (token_rewards.sum(1), advantages)
        )
        trained = torch.zeros_like(self.generated_outcomes, dtype=torch.bool).index_copy(0, self.rows, self.trains)
        columns = {"outcome": self.generated_outcomes, "process_reward": all_process, "trained": trained}
        columns = {name: values.tolist() for name, values in columns.items()}
        for name, values in _turn_columns(self.output, token_rewards, accelerator).items():
            by_row = dict(zip(self.rows.tolist(), values, strict=True))
            columns[name] = [by_row.get(row, "") for row in range(len(self.generated_outcomes))]
        return columns, all_advantages

    @staticmethod
    def evaluation_columns(
        output: dict[str, Any], outcomes: torch.Tensor, token_rewards: torch.Tensor, accelerator: Accelerator
    ) -> dict[str, list]:
        """
        The same of held-out completions, of which none is trained on.

        Args:
            output (`dict`): Rows of this process, as TRL returns them.
            outcomes (`torch.Tensor`): `(N,)` outcomes of the rows of all processes.
            token_rewards (`torch.Tensor`): Process rewards of this process's tokens.
            accelerator ([`~accelerate.Accelerator`]): Of the trainer.

        Returns:
            `dict`: columns by name, of N values each.
        """
        sums, trained = accelerator.gather(token_rewards.sum(1)), [False] * len(outcomes)
        columns = {"outcome": outcomes.tolist(), "process_reward": sums.tolist(), "trained": trained}
        return {**columns, **_turn_columns(output, token_rewards, accelerator)}

    @staticmethod
    def log_rows(
        logs: dict[str, Any], prefix: str, columns: dict[str, list], advantages: torch.Tensor | None = None
    ) -> None:
        """
        Complete the rows of TRL's completions table that a generation batch has added.

        Args:
            logs (`dict`): What TRL makes the table of.
            prefix (`str`): Of the names of columns.
            columns (`dict`): Columns by name, of N values each.
            advantages (`torch.Tensor`, *optional*): `(N,)`, in the place of those that TRL has logged.
        """
        if advantages is not None:
            for _ in range(len(advantages)):
                logs["advantages"].pop()
            logs["advantages"].extend(advantages.tolist())
        for name, values in columns.items():
            logs["extra"][prefix + name].extend(values)


def _turn_columns(
    output: dict[str, Any], token_rewards: torch.Tensor, accelerator: Accelerator
) -> dict[str, list[str]]:
    """The process rewards of the turns of all processes' rows, as text; no column where nobody speaks between turns."""
    if "tool_mask" not in output:
        return {}
    mask = policy_mask(output)
    sums, ends = (
        gather_padded(values, accelerator)
        for values in (aggregate_process_rewards(token_rewards, mask, "turn"), reward_positions(mask, "turn"))
    )
    rows = [row[end].tolist() for row, end in zip(sums, ends, strict=True)]
    return {"turn_rewards": [" ".join(f"{value:+.3f}" for value in row) for row in rows]}


def draw_rows(
    dataset: Dataset, num_rows: int, num_generations: int, seed: str, accelerator: Accelerator
) -> list[dict[str, Any]]:
    """
    Prompts of a further round of generation, drawn from the training data, no prompt twice in a round.

    Args:
        dataset ([`~datasets.Dataset`]): Training data, with as many rows as the round has groups, or more.
        num_rows (`int`): Completions of this process.
        num_generations (`int`): K.
        seed (`str`): Decides the draw; the same on all processes.
        accelerator ([`~accelerate.Accelerator`]): Of the trainer.

    Returns:
        `list[dict]`: This process's rows, one for each completion, in TRL's order: the rows of all processes, one process after
        the other, are whole groups.
    """
    num_groups = num_rows * accelerator.num_processes // num_generations
    prompts = torch.tensor(random.Random(seed).sample(range(len(dataset)), num_groups))
    rows = local_rows(prompts.repeat_interleave(num_generations), accelerator)
    return [dataset[row] for row in rows.tolist()]


@contextlib.contextmanager
def table_room(logs: dict[str, Any], num_rows: int, num_earlier_rounds: int) -> Iterator[None]:
    """
    While a round of generation is logged: size TRL's completions table to the rounds of this generation batch, where TRL's has
    the size of one training batch. Then fill up the columns that the round has not written.

    Args:
        logs (`dict`): What TRL makes the table of.
        num_rows (`int`): Rows of a round.
        num_earlier_rounds (`int`): Rounds of this generation batch that the table has.
    """
    num_earlier = num_rows * num_earlier_rounds
    size = num_earlier + num_rows

    def new_column() -> deque:
        return deque([None] * num_earlier, maxlen=size)

    for name, column in logs.items():
        if isinstance(column, deque):
            logs[name] = deque(column, maxlen=size)
        else:
            column.default_factory = new_column
            column.update({key: deque(values, maxlen=size) for key, values in column.items()})
    yield
    for column in logs["extra"].values():
        column.extend([None] * (len(logs["prompt"]) - len(column)))


def log_gold_answers(logs: dict[str, Any], name: str, inputs: Sequence[dict[str, Any]]) -> None:
    """
    Add the gold answers of a batch to TRL's completions table, after TRL has added its prompts; where there are none, as for
    code, the table has no such column.

    Args:
        logs (`dict`): What TRL makes the table of; the column goes to its `"extra"`.
        name (`str`): Name of the column.
        inputs (`list[dict]`): This process's rows of the data set, one for each completion. Gold answers are in `solution`.
    """
    gold = gather_object([None if row.get("solution") is None else str(row["solution"]) for row in inputs])
    column = logs["extra"][name]
    column.extend(gold)
    column.extendleft([None] * (len(logs["prompt"]) - len(column)))
    if all(answer is None for answer in column):
        del logs["extra"][name]


def policy_mask(output: dict[str, Any]) -> torch.Tensor:
    """`(B, T)` bool: the tokens that the policy wrote; what tools answered and padding is false."""
    return (output["completion_mask"] * output.get("tool_mask", 1)).bool()


def outcomes_and_labels(
    rewards_per_func: torch.Tensor, weights: torch.Tensor, names: Sequence[str], prm_label: str, num_generations: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The outcome of every completion, and the label that the PRM learns from.

    Args:
        rewards_per_func (`torch.Tensor`): `(B, F)`; NaN = the function returned None.
        weights (`torch.Tensor`): `(F,)`.
        names (`list[str]`): Names of the reward functions.
        prm_label (`str`): `"reward"` for the outcome, or one of the names.
        num_generations (`int`): K.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: `(B,)` outcomes and `(B,)` labels between 0 and 1; NaN = could not be judged.

    Raises:
        ValueError: A reward is infinite, or a label outside of [0, 1].
    """
    if rewards_per_func.isinf().any():
        column = rewards_per_func.isinf().any(0).nonzero()[0].item()
        raise ValueError(
            f"The reward function '{names[column]}' returned infinity. Return None for a completion that it cannot judge."
        )
    column = None if prm_label == "reward" else list(names).index(prm_label)
    outcomes, applies = combine_outcomes(rewards_per_func, weights, num_generations, column)
    labels = outcomes if column is None else rewards_per_func[:, column]
    if num_generations > 1 and column is None:
        left_out = (~applies[~outcomes.isnan()]).any(0) & (weights != 0).to(applies.device)
        if left_out.any():
            without = [name for name, is_out in zip(names, left_out.tolist(), strict=True) if is_out]
            logger.warning_once(
                f"{without} returned None for all completions of a prompt, so that its outcome is the sum of the other reward "
                "functions. That is right where a function is not for that prompt. If it says right or wrong and could not "
                "judge, set prm_label to its name, and such prompts are left out."
            )
    outside = (labels < -1e-6) | (labels > 1 + 1e-6)
    if outside.any():
        raise ValueError(
            f"The outcome label {labels[outside][0].item():g} is outside [0, 1], but the implicit PRM is trained on "
            f"probabilities of success. prm_label is {prm_label!r}: set it to the name of the reward function that says "
            f"right or wrong (one of {names}), or choose reward_weights so that the sum stays between 0 and 1."
        )
    return outcomes, labels.clamp(0, 1)


def combine_outcomes(
    rewards_per_func: torch.Tensor, weights: torch.Tensor, num_generations: int, label: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The outcome of every completion: the weighted sum of the reward functions that apply to its prompt.

    A function that gave none of a prompt's completions a reward does not apply to the prompt: TRL's convention for several
    tasks. Where it gave some of them one, or where there is only one completion to tell by, a missing reward means that this
    completion could not be judged, and a sum without it would be an outcome of another kind than those of its peers.

    Args:
        rewards_per_func (`torch.Tensor`): `(B, F)`; NaN = the function returned None.
        weights (`torch.Tensor`): `(F,)`. A function of weight 0 is measured only: it never makes a completion unjudged.
        num_generations (`int`): K. B is a multiple of it.
        label (`int`, *optional*): Column of the function that says right or wrong. What it did not judge has no outcome.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: `(B,)` outcomes, NaN = could not be judged; `(B, F)` bool, whether a function
        counts and applies.
    """
    weights = weights.to(rewards_per_func)
    judged = ~rewards_per_func.isnan()
    applies = (weights != 0).expand_as(judged)
    if num_generations > 1:
        in_group = judged.view(-1, num_generations, judged.shape[1]).any(1)
        applies = applies & in_group.repeat_interleave(num_generations, dim=0)
    unjudged = ~applies.any(1) | (applies & ~judged).any(1)
    if label is not None:
        unjudged |= ~judged[:, label]
    outcomes = (rewards_per_func * weights).nansum(1).masked_fill(unjudged, torch.nan)
    return outcomes, applies


def is_truncated(output: dict[str, Any], end_token_ids: Sequence[int]) -> torch.Tensor:
    """
    `(B,)` bool: the completion ran into the length limit.

    Args:
        output (`dict`): Rows of this process, as TRL returns them.
        end_token_ids (`list[int]`): Tokens that end a completion, and the padding token.
    """
    completion_ids, mask = output["completion_ids"], output["completion_mask"]
    last = (mask.sum(1) - 1).clamp(min=0)
    last_ids = completion_ids.gather(1, last[:, None]).squeeze(1)
    # An empty mask is a completion that TRL has masked because it was truncated
    return ~torch.isin(last_ids, torch.tensor(end_token_ids, device=mask.device)) | (mask.sum(1) == 0)


def select_rows(
    outputs: Sequence[dict[str, Any]], rows: torch.Tensor, accelerator: Accelerator, pad_token_id: int
) -> dict[str, Any]:
    """
    Keep some rows of the batches of all rounds and processes, spread evenly over the processes, without padding that no row
    needs.

    Args:
        outputs (`list[dict]`): Rows of this process of each round of generation, as TRL returns them.
        rows (`torch.Tensor`): `(B,)` places of the rows to keep among those of all processes in the first round, then in the
            second, and so on.
        accelerator ([`~accelerate.Accelerator`]): Of the trainer.
        pad_token_id (`int`): Fills up token ids.

    Returns:
        `dict`: The same keys, with this process's part of the kept rows.
    """
    first = outputs[0]
    if len(outputs) == 1 and len(rows) == len(first["completion_ids"]) * accelerator.num_processes:
        return first
    selected: dict[str, Any] = {**select_images(outputs, rows, accelerator)}
    for key, value in first.items():
        if key == IMAGES:
            continue
        if isinstance(value, torch.Tensor) and value.ndim > 1:
            is_prompt, pad_index = key.startswith("prompt_"), pad_token_id if key.endswith("_ids") else 0
            rounds = [gather_padded(output[key], accelerator, pad_index, pad_first=is_prompt) for output in outputs]
            length = max(values.shape[1] for values in rounds)
            rounds = [_padded(values, length, pad_index, pad_first=is_prompt) for values in rounds]
            value = local_rows(torch.cat(rounds)[rows], accelerator)
        elif isinstance(value, torch.Tensor) and value.ndim == 1:
            value = local_rows(torch.cat([accelerator.gather(output[key]) for output in outputs])[rows], accelerator)
        selected[key] = value
    prompt_len = int(selected["prompt_mask"].sum(1).amax())
    num_tokens = selected["completion_ids"].shape[1]
    completion_len = max(int((selected["completion_ids"] != pad_token_id).sum(1).amax()), 1)
    completion_len = max(int(selected["completion_mask"].sum(1).amax()), completion_len)
    for key, value in selected.items():
        if not isinstance(value, torch.Tensor) or value.ndim < 2:
            continue
        if key.startswith("prompt_"):
            selected[key] = value[:, -prompt_len:]
        elif value.shape[1] == num_tokens:
            selected[key] = value[:, :completion_len]
    return selected


def _padded(values: torch.Tensor, length: int, pad_index: int, pad_first: bool) -> torch.Tensor:
    """`(B, T)` values filled up to `(B, length)`."""
    missing = length - values.shape[1]
    return torch.nn.functional.pad(values, (missing, 0) if pad_first else (0, missing), value=pad_index)
