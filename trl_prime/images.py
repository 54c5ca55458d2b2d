"""Images of a vision-language model by row, as everything else of a rollout is.

TRL hands on what a processor makes of all prompts at once: patches, tiles or images of all rows one after the other, and counts.
Right after generation that becomes a list of rows, each with the tensors of its own images, which can be selected, moved between
processes and kept on the CPU. Where a model reads them, the rows of the micro-batch are put together again.

Covered: every layout that TRL's rollouts have, from and to; the inputs of a micro-batch of any rows. Not covered: what a processor
does, and images as a user has them (`texts.py`). B = rows, P = prompt tokens, T = completion tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import trl
from accelerate.utils import gather_object
from trl.trainer.utils import split_pixel_values_by_grid

from .processes import local_rows

if TYPE_CHECKING:
    from accelerate import Accelerator

# What a model reads of images, with what fills up a tensor that is smaller than its neighbours
_PIXELS = {
    "pixel_values": 0,
    "pixel_attention_mask": 0,
    "image_grid_thw": 0,
    "image_sizes": 0,
    "image_position_ids": -1,
    "spatial_shapes": 0,
}
# A number for each token, prompt and completion; 0 is text
_TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")
# What TRL cuts a batch by: how many images, and tiles of images, each row has
_COUNTS = ("num_images", "num_tiles")
# Key of a batch by row, in the place of all of these
IMAGES = "images"


class RowImages:
    """
    What a vision-language model reads beside text, by row.

    Args:
        rows (`list[dict]`): For each of the B rows its tensors by the name that the model knows them by: those of its images, whose
            first dimension counts patches, tiles or images; `(n,)` types of its tokens from the first of the prompt on; and TRL's
            counts. A row without images has none of them or empty ones. Rows of one prompt may share tensors.
    """

    def __init__(self, rows: Sequence[dict[str, Any]]):
        self.rows = list(rows)

    @classmethod
    def of_prompts(cls, prompts: Sequence[dict[str, torch.Tensor] | None]) -> RowImages:
        """Rows from what a processor made of each prompt alone, without padding; `None` for a prompt without images."""
        rows: list[dict[str, Any]] = []
        for prompt in prompts:
            found = prompt or {}
            rows.append({name: found[name] for name in _PIXELS if name in found})
            rows[-1].update({name: found[name][0] for name in _TOKEN_TYPES if name in found})
        return cls(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: torch.Tensor | slice) -> RowImages:
        """Some of the rows, by a slice or by a tensor of their numbers."""
        index = index.cpu() if isinstance(index, torch.Tensor) else index
        return RowImages([self.rows[number] for number in torch.arange(len(self))[index].tolist()])

    @property
    def is_shown(self) -> torch.Tensor:
        """`(B,)` bool: whether the row has an image."""
        return torch.tensor([_has_image(row) for row in self.rows], dtype=torch.bool)

    def on_cpu(self) -> RowImages:
        """A copy in the CPU's memory that holds nothing else alive; tensors that rows share are copied once."""
        copies: dict[int, torch.Tensor] = {}

        def copied(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            if id(value) not in copies:
                copies[id(value)] = value.detach().to("cpu", copy=True)
            return copies[id(value)]

        return RowImages([{name: copied(value) for name, value in row.items()} for row in self.rows])

    def inputs(self, prompt_mask: torch.Tensor, completion_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        The arguments of a forward pass over all rows, beside token ids and attention mask.

        Args:
            prompt_mask, completion_mask (`torch.Tensor`): `(B, P)` padded on the left and `(B, T)`, as the pass has them.

        Returns:
            `dict[str, torch.Tensor]`: by the model's names for them, on the masks' device.
        """
        device, found = prompt_mask.device, {}
        if any(map(_has_image, self.rows)):
            for name, padding in _PIXELS.items():
                parts = [row[name].to(device) for row in self.rows if name in row]
                if parts:
                    found[name] = _concatenated(parts, padding)
        for name in _TOKEN_TYPES:
            if any(name in row for row in self.rows):
                found[name] = self._token_types(name, prompt_mask, completion_mask)
        return found

    def _token_types(self, name: str, prompt_mask: torch.Tensor, completion_mask: torch.Tensor) -> torch.Tensor:
        num_prompt, num_tokens = prompt_mask.shape[1], prompt_mask.shape[1] + completion_mask.shape[1]
        types = torch.zeros(len(self), num_tokens, dtype=torch.long, device=prompt_mask.device)
        for i, (row, length) in enumerate(zip(self.rows, prompt_mask.sum(1).tolist(), strict=True)):
            if name in row:
                place = types[i, num_prompt - length :]
                own = row[name][: len(place)].to(types)
                place[: len(own)] = own
        return types

    def in_trl_form(self, output: dict[str, Any]) -> dict[str, Any]:
        """
        The images as TRL's rollouts have them.

        Args:
            output (`dict`): The rows, with all that TRL's rollouts have beside images.

        Returns:
            `dict`: the keys that images add.
        """
        counts = {
            name: [row.get(name, 0) for row in self.rows] for name in _COUNTS if any(name in r for r in self.rows)
        }
        return {**self.inputs(output["prompt_mask"], output["completion_mask"]), **counts}


def images_by_row(output: dict[str, Any]) -> dict[str, Any]:
    """
    Rollouts with their images by row.

    Args:
        output (`dict`): Rows of this process, as TRL returns them.

    Returns:
        `dict`: The same where they have no images, else all of TRL's keys for images replaced by one, [`RowImages`].

    Raises:
        NotImplementedError: The installed TRL would give images to rows that they do not belong to, or has inputs of images that are
            not known here.
    """
    unknown = [name for name in output if name.startswith(("pixel_", "image_", "video_")) and name not in _PIXELS]
    if unknown:
        raise NotImplementedError(
            f"The rollouts have {unknown}, which the policy reads and this version of trl-prime would not give to the implicit PRM and "
            "its reference. Take a model of another architecture, or TRL 1.16."
        )
    names = [name for name in (*_PIXELS, *_TOKEN_TYPES, *_COUNTS) if output.get(name) is not None]
    if not names:
        return output
    _check_layout(output)
    num_rows = len(output["prompt_ids"])
    rows: list[dict[str, Any]] = [{} for _ in range(num_rows)]
    for name, parts in _split(output).items():
        for row, part in zip(rows, parts, strict=True):
            row[name] = part
    for before, row in itertools.pairwise(rows):
        # Completions of one prompt were given the same images
        same = all(
            name in before and before[name].shape == row[name].shape and torch.equal(before[name], row[name])
            for name in _PIXELS
            if name in row
        )
        if same:
            row.update({name: before[name] for name in _PIXELS if name in row})
    for name in _TOKEN_TYPES:
        if name in names:
            # By the end of the prompt: a processor may write a second beginning-of-sequence token before a rendered one
            ends = output[name].shape[1] - output["completion_ids"].shape[1]
            starts = ends - output["prompt_mask"].sum(1)
            for row, values, start in zip(rows, output[name], starts.tolist(), strict=True):
                found = values[start:].nonzero()
                row[name] = values[start : start + int(found.max()) + 1] if len(found) else values[:0]
    rest = {name: value for name, value in output.items() if name not in (*_PIXELS, *_TOKEN_TYPES, *_COUNTS)}
    return {**rest, IMAGES: RowImages(rows)}


def in_trl_form(output: dict[str, Any]) -> dict[str, Any]:
    """The opposite of [`images_by_row`]: rollouts as TRL has them."""
    rest = {name: value for name, value in output.items() if name != IMAGES}
    return {**rest, **output[IMAGES].in_trl_form(rest)} if IMAGES in output else rest


def without_empty_images(inputs: dict[str, Any]) -> dict[str, Any]:
    """
    A micro-batch of the policy's loss without the tensors that TRL cuts for rows of which none has an image: empty ones, or empty
    images, which vision towers do not take.
    """
    pixels = inputs.get("pixel_values")
    if pixels is None or (pixels.numel() and (pixels.ndim < 5 or pixels.any())):
        return inputs
    return {name: value for name, value in inputs.items() if name not in _PIXELS}


def select_images(
    rounds: Sequence[dict[str, Any]], rows: torch.Tensor, accelerator: Accelerator
) -> dict[str, RowImages]:
    """
    Images of some rows of all rounds and processes.

    Args:
        rounds (`list[dict]`): Rows of this process of each round of generation.
        rows (`torch.Tensor`): `(B,)` places of the rows to keep among those of all processes in the first round, then in the
            second, and so on.
        accelerator ([`~accelerate.Accelerator`]): Of the trainer.

    Returns:
        `dict`: with this process's part of the kept rows as its only item; empty if no process has images.
    """
    has_images = torch.tensor([any(IMAGES in output for output in rounds)], device=accelerator.device)
    if not accelerator.gather(has_images).any():
        return {}
    held: dict[int, dict[str, Any]] = {}
    holder: list[int] = []
    for output in rounds:
        num_rows = len(output["prompt_ids"])
        first = len(holder) + accelerator.process_index * num_rows
        held.update(enumerate(output[IMAGES].rows if IMAGES in output else [{}] * num_rows, start=first))
        holder += [process for process in range(accelerator.num_processes) for _ in range(num_rows)]
    size = len(rows) // accelerator.num_processes
    moved = {row for i, row in enumerate(rows.tolist()) if holder[row] != i // size}
    if moved:
        # The only joint act, and only of rows that change their process
        sent = [row for row in moved if row in held]
        copies = RowImages([held[row] for row in sent]).on_cpu()
        for part in gather_object([dict(zip(sent, copies.rows, strict=True))]):
            held = {**part, **held}
    return {IMAGES: RowImages([held[row] for row in local_rows(rows, accelerator).tolist()])}


def _has_image(row: dict[str, Any]) -> bool:
    pixels = row.get("pixel_values")
    return pixels is not None and pixels.numel() > 0


def _concatenated(parts: Sequence[torch.Tensor], padding: int) -> torch.Tensor:
    """Tensors one after the other, each filled up at its ends to the largest of all."""
    shape = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
    filled = []
    for part in parts:
        missing = [size - own for size, own in zip(shape, part.shape[1:], strict=True)]
        ends = [side for size in reversed(missing) for side in (0, size)]
        filled.append(torch.nn.functional.pad(part, ends, value=padding) if any(missing) else part)
    return torch.cat(filled)


def _is_padded(output: dict[str, Any]) -> bool:
    """Whether each row has one entry with all of its images, filled up by empty ones (Idefics, SmolVLM)."""
    pixels = output["pixel_values"]
    return pixels.ndim == 5 and "image_sizes" not in output and len(pixels) == len(output["prompt_ids"])


def _check_layout(output: dict[str, Any]) -> None:
    """Refuse batches that the installed TRL cuts by another layout than they have."""
    pixels, num_images = output.get("pixel_values"), output.get("num_images")
    if pixels is None or _is_padded(output) or isinstance(split_pixel_values_by_grid(output)["pixel_values"], list):
        return
    if num_images is not None and len(pixels) == len(num_images) and all(number == 1 for number in num_images):
        return
    raise NotImplementedError(
        f"The rows of a batch have {num_images} images and together pixel_values of the shape {tuple(pixels.shape)}, which TRL "
        f"{trl.__version__} would cut at other places than between rows: completions would be trained on others' images. Give each "
        "row of the data set one image, or install TRL 1.16."
    )


def _split(output: dict[str, Any]) -> dict[str, list]:
    """By key of images the part of each row."""
    counts = {name: list(output[name]) for name in _COUNTS if output.get(name) is not None}
    if output.get("pixel_values") is None:
        return counts
    pixels = {name: output[name] for name in _PIXELS if output.get(name) is not None}
    if _is_padded(output):
        mask = output.get("pixel_attention_mask")
        numbers = [_num_shown(values) for values in output["pixel_values"]]
        parts = {"pixel_values": [v[None, :n] for v, n in zip(output["pixel_values"], numbers, strict=True)]}
        if mask is not None:
            parts["pixel_attention_mask"] = [m[None, :n] for m, n in zip(mask, numbers, strict=True)]
        # TRL is told of one entry a row: by the number of images it could take this layout for one of an entry an image
        return {**parts, "num_images": [1] * len(numbers)}
    split = split_pixel_values_by_grid(output)
    # TRL before 1.16 leaves tensors of one image a row as they are
    return {name: _as_list(split[name], counts["num_images"]) for name in pixels} | counts


def _as_list(values: Any, num_images: list[int]) -> list[torch.Tensor]:
    return values if isinstance(values, list) else list(torch.split(values, num_images))


def _num_shown(images: torch.Tensor) -> int:
    """How many of a row's `(n, ...)` images there are up to the last that is not filling, which models know by its zeros."""
    shown = images.flatten(1).any(1).nonzero()
    return int(shown.max()) + 1 if len(shown) else 0
