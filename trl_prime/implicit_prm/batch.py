"""The rollouts of one generation batch as the implicit PRM reads them."""

from __future__ import annotations

import contextlib
import dataclasses
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch

from ..images import RowImages

if TYPE_CHECKING:
    from .trunk import TrunkStates


@dataclasses.dataclass(frozen=True)
class PRMBatch:
    """
    The rollouts of one generation batch on this process. B rows here, K completions per prompt, groups contiguous over all
    processes, so that a group may be split between two.

    Attributes:
        prompt_ids, prompt_mask (`torch.Tensor`): `(B, P)`, padded on the left.
        completion_ids, completion_mask (`torch.Tensor`): `(B, T)`, padded on the right.
        policy_mask (`torch.Tensor`): `(B, T)` bool, true where the policy wrote the token, in rows that are trained on.
        ref_logps (`torch.Tensor`): `(B, T)` reference log-probabilities, computed once however often the batch is used.
        labels (`torch.Tensor`): `(B,)` outcomes between 0 and 1; NaN rows are not trained on.
        group_labels (`torch.Tensor`): `(B, K)` labels of each row's whole group.
        group_scores (`torch.Tensor`, *optional*): `(B, K)` scores q of each row's whole group by the PRM as it was before it saw
            the batch. `None` where they come out of the first update (see [`~PRMUpdater.can_score`]).
        images ([`~trl_prime.images.RowImages`], *optional*): What the policy was shown in each row. `None` where that was text only.
        trunk ([`~trl_prime.implicit_prm.trunk.TrunkStates`], *optional*): Hidden states with which the PRM's passes begin.
            `None` where it computes all of its layers.
        ref_entropies (`torch.Tensor`, *optional*): `(B, T)` entropies of the reference's distributions, in nats, where its
            confidence is taken against what it expects.
    """

    prompt_ids: torch.Tensor
    prompt_mask: torch.Tensor
    completion_ids: torch.Tensor
    completion_mask: torch.Tensor
    policy_mask: torch.Tensor
    ref_logps: torch.Tensor
    labels: torch.Tensor
    group_labels: torch.Tensor
    group_scores: torch.Tensor | None = None
    images: RowImages | None = None
    trunk: TrunkStates | None = None
    ref_entropies: torch.Tensor | None = None

    @property
    def confidences(self) -> torch.Tensor:
        """
        `(B, T)` confidence c of the reference in each token: its log-probability, plus its entropy there if that is known, so
        that the expected value is 0. Zero where the policy did not write the token.
        """
        confidences = self.ref_logps if self.ref_entropies is None else self.ref_logps + self.ref_entropies
        return confidences.masked_fill(~self.policy_mask, 0.0)

    @property
    def inputs(self) -> tuple[Any, ...]:
        """What a model reads, each of it by row: prompt ids and mask, completion ids and mask, and images if there are any."""
        text = self.prompt_ids, self.prompt_mask, self.completion_ids, self.completion_mask
        return text if self.images is None else (*text, self.images)

    def for_replay(self) -> PRMBatch:
        """The batch as it is kept for later updates: its images, which are large beside all else, are on the CPU."""
        return self if self.images is None else dataclasses.replace(self, images=self.images.on_cpu())

    @property
    def saved_fields(self) -> dict[str, Any]:
        """The fields by name that a checkpoint keeps: hidden states are computed again."""
        fields = {name: value for name, value in vars(self).items() if name != "trunk"}
        return fields if self.images is None else {**fields, "images": self.images.rows}

    @classmethod
    def from_saved(cls, fields: dict[str, Any], device: torch.device) -> PRMBatch:
        """The batch of [`saved_fields`], as it is kept for replay on a device."""
        fields = {
            name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in fields.items()
        }
        rows = fields.get("images")
        return cls(**{**fields, "images": None if rows is None else RowImages(rows)})

    def around(self, rows: torch.Tensor) -> AbstractContextManager:
        """The context of the PRM's pass over `(b,)` rows of the batch."""
        return contextlib.nullcontext() if self.trunk is None else self.trunk.use(rows)

    @property
    def has_tokens(self) -> torch.Tensor:
        """`(B,)` bool: whether the policy wrote any token of the row that is trained on."""
        return self.policy_mask.any(1)
