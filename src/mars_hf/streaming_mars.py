"""
Previews of pictures while they are drawn: by a callback, which can also cancel, or as an iterator.

A preview is approximate: codes that are not there yet are copied from the row above. The final picture never comes
from here, `generate` returns its codes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from queue import Queue
from typing import TYPE_CHECKING, Any

import torch
from transformers.generation import BaseStreamer
from transformers.utils import logging

from .code_order_mars import emission_order
from .image_processing_mars import decode_codes

if TYPE_CHECKING:
    from diffusers.models.autoencoders.vq_model import VQModel


@dataclass
class Preview:
    """
    What is drawn so far, of all rows.

    Args:
        pixels (`list[torch.Tensor]`): For each row `(3, height, width)`, about [-1, 1]; approximate.
        num_codes (`list[int]`): Codes drawn in each row.
        total_codes (`list[int]`): Codes of each row's picture.
    """

    pixels: list[torch.Tensor]
    num_codes: list[int]
    total_codes: list[int]


def fill_missing(codes: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """
    Fill cells that have no code yet: from the row above, in a first row from the left, else from the next known one.

    Args:
        codes (`torch.LongTensor` of shape `(rows, columns)`): Codes; what is not known is not read.
        known (`torch.BoolTensor` of shape `(rows, columns)`): At least one.

    Returns:
        `torch.LongTensor` of shape `(rows, columns)`.
    """
    codes, known = codes.clone(), known.clone()
    for lines, marks in ((codes, known), (codes.T, known.T)):  # downwards, then to the right
        for line in range(1, len(lines)):
            take = ~marks[line] & marks[line - 1]
            lines[line] = torch.where(take, lines[line - 1], lines[line])
            marks[line] |= take
    first = codes.flatten()[known.flatten().long().argmax()]
    return torch.where(known, codes, first)


class ImageStreamer(BaseStreamer):
    """
    Decodes pictures while `generate` draws them and hands them to a callback.

    Args:
        vqgan (`VQModel`): `model.vqgan`.
        callback (`Callable`):
            Called with a [`Preview`]. If it returns `False`, drawing stops and what there is comes back without
            `</img>`. What it raises ends `generate` and reaches its caller.
        every (`int`, defaults to 1): Rows of codes between two previews, of the row of the batch with the most codes.
        progress (`bool`, defaults to `False`): Show a progress bar.

    Example:
        >>> streamer = ImageStreamer(model.vqgan, lambda preview: show(preview.pixels[0]), every=2)
        >>> model.generate(**inputs, generation_mode="image", streamer=streamer)
    """

    def __init__(
        self, vqgan: "VQModel", callback: Callable[[Preview], Any] | None, every: int = 1, progress: bool = False
    ):
        if every < 1:
            raise ValueError(f"`every` must be 1 or more rows of codes, got {every}.")
        self.vqgan, self.callback, self.every, self.progress = vqgan, callback, every, progress
        self.cancelled = False
        self._bar: Any = None
        self._grids: list[tuple[int, int]] = []
        self._waiting, self._total = 1, 0
        self._columns: list[torch.Tensor] = []

    def begin(
        self, grids: list[tuple[int, int]], codes_per_step: int, code_order: str, image_token_offset: int
    ) -> None:
        """Called by `generate` before the first code: what will be drawn."""
        self._grids, self._offset, self.cancelled = grids, image_token_offset, False
        self._orders = [emission_order(*grid, codes_per_step, code_order) for grid in grids]
        self._waiting = codes_per_step  # copies of `<img>` come first
        self._columns = []
        widest = max(width for _, width in grids)
        self._step, self._next = self.every * widest, self.every * widest
        self._total = max(height * width for height, width in grids)
        if self.progress:
            self._bar = logging.tqdm(total=self._total, desc="Drawing", unit="code")

    def put(self, value: torch.Tensor) -> None:
        """Take the next token `(batch,)` of every row."""
        if self._waiting or len(self._columns) == self._total:
            self._waiting = max(self._waiting - 1, 0)
            return
        self._columns.append(value.cpu())
        if self._bar is not None:
            self._bar.update()
        if len(self._columns) >= self._next and len(self._columns) < self._total:
            self._next = len(self._columns) + self._step
            self._show()

    def _show(self) -> None:
        if self.callback is not None and self.callback(self.preview()) is False:
            self.cancelled = True

    def preview(self) -> Preview:
        """Decode what is there."""
        drawn = torch.stack(self._columns, dim=1) - self._offset  # (batch, codes)
        grids = []
        for row, (grid, order) in enumerate(zip(self._grids, self._orders, strict=True)):
            there = order[: drawn.shape[1]]
            codes = torch.zeros(grid, dtype=torch.long)
            known = torch.zeros(grid, dtype=torch.bool)
            codes.view(-1)[there], known.view(-1)[there] = drawn[row, : len(there)], True
            grids.append(fill_missing(codes, known))
        totals = [height * width for height, width in self._grids]
        return Preview(decode_codes(self.vqgan, grids), [min(drawn.shape[1], total) for total in totals], totals)

    def end(self) -> None:
        """The drawing is over, or was cancelled."""
        if self._bar is not None:
            self._bar.close()


class ImageIteratorStreamer(ImageStreamer):
    """
    Gives previews as an iterator, while `generate` runs in another thread.

    Args:
        vqgan (`VQModel`): `model.vqgan`.
        every (`int`, defaults to 1): Rows of codes between two previews.
        timeout (`float`, *optional*): Seconds to wait for the next preview before `queue.Empty` is raised.

    Example:
        >>> streamer = ImageIteratorStreamer(model.vqgan)
        >>> threading.Thread(target=model.generate, kwargs={**inputs, "streamer": streamer}).start()
        >>> for preview in streamer:
        ...     show(preview.pixels[0])
    """

    def __init__(self, vqgan: "VQModel", every: int = 1, timeout: float | None = None, progress: bool = False):
        self._queue: Queue[Preview | None] = Queue()
        self.timeout = timeout
        super().__init__(vqgan, self._queue.put, every, progress)

    def cancel(self) -> None:
        """Stop the drawing after its present step."""
        self.cancelled = True

    def end(self) -> None:
        super().end()
        self._queue.put(None)

    def __iter__(self) -> Iterator[Preview]:
        while (preview := self._queue.get(timeout=self.timeout)) is not None:
            yield preview


__all__ = ["ImageIteratorStreamer", "ImageStreamer", "Preview", "fill_missing"]
