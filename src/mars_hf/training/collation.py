"""
Rows to batches: padded so that prompts end in one column, or packed without attention between examples.

A row is what [`MarsProcessor.training_example`] writes: `input_ids` and `labels`, which stand at the place of their
own token, and `image_sizes`. Labels are shifted here, by one and inside pictures by K, because a row is cut behind its
last label: what follows predicts nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from ..code_order_mars import PictureLayout, find_cells
from ..configuration_mars import MarsConfig
from .losses import IGNORED_LABEL

Row = dict[str, Any]


@dataclass
class ShiftedRow:
    """
    A row whose labels stand where they are predicted, cut behind the last of them.

    Args:
        input_ids (`torch.LongTensor` of shape `(seq,)`): What is fed.
        shift_labels (`torch.LongTensor` of shape `(seq,)`): What each token predicts, or -100.
        prompt_length (`int`): Text tokens before the first visual one.
        image_sizes (`list[tuple[int, int]]`): Of the pictures, in pixels.
        enlarged (`list[torch.LongTensor]`): Codes of what they are drawn from, enlarged; see `lowres_embedding`.
    """

    input_ids: torch.Tensor
    shift_labels: torch.Tensor
    prompt_length: int
    image_sizes: list[tuple[int, int]]
    enlarged: list[torch.Tensor]

    @classmethod
    def of(cls, row: Row, config: MarsConfig) -> "ShiftedRow":
        """
        Shift and cut a row. One without pictures teaches nothing: its text is the frozen language model's.

        Raises:
            ValueError: If `input_ids` and `labels` differ in length, or a label is no word, code or `<img>`.
        """
        ids, labels = torch.as_tensor(row["input_ids"]), torch.as_tensor(row["labels"])
        if ids.shape != labels.shape or ids.ndim != 1:
            raise ValueError(
                f"A row needs `input_ids` and `labels` of one length, got shapes {tuple(ids.shape)} and "
                f"{tuple(labels.shape)}."
            )
        if bool((labels > config.image_start_token_id).any()):
            raise ValueError(
                "`labels` hold specials that are never predicted, such as `</img>`. Label them -100, as the processor "
                "does."
            )
        layout = PictureLayout.of(ids[None], config.image_token_offset, config.image_start_token_id)
        shifted, blocks = layout.shift_labels(labels[None])[0], layout.block_ids[0]
        is_visual = ids >= config.image_token_offset
        if not bool(is_visual.any()):
            shifted = torch.full_like(shifted, IGNORED_LABEL)
        learns = (shifted != IGNORED_LABEL).nonzero().flatten()
        end = int(learns[-1]) + 1 if len(learns) else 1
        while end < len(ids) and blocks[end] == blocks[end - 1] >= 0:
            end += 1  # a block is never cut: its tokens see each other
        prompt_length = int(is_visual[:end].float().argmax()) if bool(is_visual[:end].any()) else end
        sizes = [tuple(size) for size in row.get("image_sizes", [])]
        unit, enlarged = config.downsample_factor, row.get("enlarged_codes", [])
        grids = [
            torch.as_tensor(codes).view(height // unit, width // unit)
            for codes, (height, width) in zip(enlarged, sizes, strict=bool(enlarged))
        ]
        return cls(ids[:end], shifted[:end], prompt_length, sizes, grids)

    def __len__(self) -> int:
        return len(self.input_ids)


class AlignedCollator:
    """
    Pads rows so that all prompts end in one column: on the left before it, on the right after it.

    Args:
        config ([`MarsConfig`]): Of the model.
        pad_token_id (`int`): Fills up; masked.
        prompt_multiple (`int`, defaults to 24): Prompts take a multiple of so many columns: few shapes to compile.
    """

    def __init__(self, config: MarsConfig, pad_token_id: int, prompt_multiple: int = 24):
        self.config, self.pad, self.multiple = config, pad_token_id, prompt_multiple

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """
        Returns:
            `dict`: `input_ids`, `attention_mask`, `position_ids`, `shift_labels` (and the same as `labels`, by which
            Trainer counts), `block_ids` and `cells` where the model needs them, and for the trainer `task`,
            `prompt_length` (columns; 0 if something in them is labelled or nothing follows) and `num_drawn` (if every
            column behind the prompts is visual, and the last so many are all labelled with codes and no others; else
            0).
        """
        shifted = [ShiftedRow.of(row, self.config) for row in rows]
        longest = max(row.prompt_length for row in shifted)
        prompt = -(-longest // self.multiple) * self.multiple
        rest = max(len(row) - row.prompt_length for row in shifted)

        def aligned(values: list[torch.Tensor], fill: int) -> torch.Tensor:
            pads = [(prompt - row.prompt_length, rest - len(row) + row.prompt_length) for row in shifted]
            return torch.stack([F.pad(value, pad, value=fill) for value, pad in zip(values, pads, strict=True)])

        ids = aligned([row.input_ids for row in shifted], self.pad)
        mask = aligned([torch.ones_like(row.input_ids) for row in shifted], 0)
        labels = aligned([row.shift_labels for row in shifted], IGNORED_LABEL)
        batch = {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": (mask.cumsum(1) - 1).clamp_min(0),
            "labels": labels,
            "shift_labels": labels,
            "prompt_length": prompt if rest and bool((labels[:, :prompt] == IGNORED_LABEL).all()) else 0,
            "num_drawn": _num_drawn(ids[:, prompt:], labels[:, prompt:], self.config.image_token_offset),
            "task": "+".join(sorted({row.get("task", "rows") for row in rows})),
        }
        of_rows = [row.image_sizes for row in shifted], [row.enlarged for row in shifted]
        return {**batch, **picture_inputs(self.config, ids, *of_rows)}


def _num_drawn(ids: torch.Tensor, labels: torch.Tensor, offset: int) -> int:
    is_code = labels >= offset
    num_drawn = int(is_code.any(0).sum())
    is_dense = bool(is_code[:, labels.shape[1] - num_drawn :].all() and (ids >= offset).all())
    return num_drawn if is_dense else 0


class PackedCollator:
    """
    Puts rows one behind the other, without attention between them: positions begin anew, which the library's masks
    read as packing. Blocks of pictures get numbers that are unique in their row.

    Args:
        config ([`MarsConfig`]): Of the model.
        pad_token_id (`int`): Fills up; an example of its own that teaches nothing.
        max_length (`int`): Tokens of a packed row.

    Raises:
        ValueError: If a row is longer than `max_length`.
    """

    def __init__(self, config: MarsConfig, pad_token_id: int, max_length: int):
        self.config, self.pad, self.max_length = config, pad_token_id, max_length

    def __call__(self, packs: Sequence[Sequence[Row]]) -> dict[str, Any]:
        """
        Pack lists of rows, as [`pack_rows`] makes them, one list a packed row; see [`AlignedCollator`]. Those of a
        [`PackedStream`] tell their `window`, and empty ones, which stand for what a resumed run has behind it, nothing
        else.
        """
        window = {"window": first} if (first := getattr(packs[0], "window", None)) else {}
        if not any(packs):
            return window
        lines = [[ShiftedRow.of(row, self.config) for row in pack] for pack in packs]
        ids = torch.full((len(packs), self.max_length), self.pad)
        labels = torch.full_like(ids, IGNORED_LABEL)
        positions = torch.zeros_like(ids)
        for line, rows in enumerate(lines):
            start = 0
            for row in rows:
                place = slice(start, start + len(row))
                if place.stop > self.max_length:
                    raise ValueError(f"A pack of {place.stop} tokens does not fit `max_length={self.max_length}`.")
                ids[line, place], labels[line, place] = row.input_ids, row.shift_labels
                positions[line, place] = torch.arange(len(row))
                start = place.stop
            positions[line, start:] = torch.arange(self.max_length - start)
        tasks = {row.get("task", "rows") for pack in packs for row in pack}
        batch = {
            "input_ids": ids,
            "position_ids": positions,
            "labels": labels,
            "shift_labels": labels,
            "task": "+".join(sorted(tasks)),
        }
        sizes = [[size for row in rows for size in row.image_sizes] for rows in lines]
        enlarged = [[grid for row in rows for grid in row.enlarged] for rows in lines]
        return {**batch, **window, **picture_inputs(self.config, ids, sizes, enlarged)}


def picture_inputs(
    config: MarsConfig,
    input_ids: torch.Tensor,
    image_sizes: list[list[tuple[int, int]]],
    enlarged: list[list[torch.Tensor]],
) -> dict[str, torch.Tensor]:
    """Give `block_ids` where blocks are longer than a token, and `cells` where the model embeds them."""
    layout = PictureLayout.of(input_ids, config.image_token_offset, config.image_start_token_id)
    inputs = {}
    if int(layout.codes_per_step.max()) > 1:
        inputs["block_ids"] = layout.block_ids
    if config.cell_embedding and bool((layout.place >= 0).any()):
        inputs["cells"] = find_cells(config, input_ids, layout, image_sizes, enlarged)
    return inputs


def pack_rows(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """
    Pack rows: the longest ones that leave room for two more, then the one or two that fill the rest best.

    Args:
        lengths (`Sequence[int]`): Tokens of each row.
        max_length (`int`): Tokens of a pack.

    Returns:
        `list[list[int]]`: Indices of the rows of each pack, the longest one first; every row stands in one. Packs are
        sorted by that index, which has nothing to do with lengths.

    Raises:
        ValueError: If a row is longer than `max_length`.

    Example:
        >>> pack_rows([3, 6, 4, 5], max_length=9)
        [[1, 0], [3, 2]]
    """
    for index, length in enumerate(lengths):
        if length > max_length:
            raise ValueError(
                f"Row {index} has {length} tokens and does not fit a pack of {max_length}: raise `max_length` or "
                "shorten captions."
            )
    order = np.array(sorted(range(len(lengths)), key=lambda index: (lengths[index], -index)), dtype=np.int64)
    sizes = np.array(lengths, dtype=np.int64)[order]
    packs: list[list[int]] = []
    while len(order):
        places, room = [len(order) - 1], max_length - sizes[-1]
        while (place := np.searchsorted(sizes[: places[-1]], room - sizes[:2].sum(), side="right") - 1) > 1:
            places.append(int(place))
            room -= sizes[place]
        small = sizes[: places[-1]]
        small = small[small <= room]
        partner = np.minimum(np.searchsorted(small, room - small, side="right"), np.arange(len(small))) - 1
        if len(small):
            filled = small + np.where(partner < 0, 0, small[partner])
            best = int((filled == filled.max()).nonzero()[0][-1])  # of equal ones those that come first
            places += [best, int(partner[best])] if partner[best] >= 0 else [best]
        packs.append(order[places].tolist())
        order, sizes = np.delete(order, places), np.delete(sizes, places)
    return sorted(packs)


__all__ = ["AlignedCollator", "PackedCollator", "ShiftedRow", "pack_rows", "picture_inputs"]
