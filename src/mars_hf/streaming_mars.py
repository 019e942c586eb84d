"""
Previews of pictures while they are drawn: by a callback, which can also cancel, or as an iterator.

A preview is approximate: codes that are not there yet are copied from the row above. The final picture never comes
from here, `generate` returns its codes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from queue import Queue
from typing import TYPE_CHECKING, Any

import torch
from transformers.generation import BaseStreamer
from transformers.utils import logging

from .code_order_mars import emission_order
from .configuration_mars import MarsConfig
from .image_processing_mars import decode_codes

if TYPE_CHECKING:
    from diffusers.models.autoencoders.vq_model import VQModel


@dataclass
class Preview:
    """
    The latest picture of each row, as far as it is drawn.

    Args:
        pixels (`list[torch.Tensor | None]`):
            For each row `(3, height, width)`, about [-1, 1]; approximate. `None` before a document's first picture.
        num_codes (`list[int]`): Codes drawn of each row's picture.
        total_codes (`list[int]`): Codes of each row's picture.
        picture (`list[int]`): The picture's number in its row, from 0, pictures of the prompt included.
    """

    pixels: list[torch.Tensor | None]
    num_codes: list[int]
    total_codes: list[int]
    picture: list[int]


@dataclass
class _Row:
    """Where the tokens of a row stand."""

    grids: list[tuple[int, int]]
    number: int  # pictures that are complete
    codes: list[int] = field(default_factory=list)  # of the latest picture
    is_open: bool = False
    due: int = 0  # codes at which a preview is wanted

    @property
    def picture(self) -> int:
        """Number of the latest picture."""
        return max(self.number - (not self.is_open), 0)

    @property
    def grid(self) -> tuple[int, int]:
        return self.grids[min(self.picture, len(self.grids) - 1)]

    @property
    def total(self) -> int:
        height, width = self.grid
        return height * width


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
        every (`int`, defaults to 1): Rows of codes that a picture gets, at least, between two previews.
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
        self._rows: list[_Row] = []

    def begin(
        self, grids: list[list[tuple[int, int]]], number: list[int], codes_per_step: int, config: MarsConfig
    ) -> None:
        """
        Called by `generate` before the first new token.

        Args:
            grids (`list[list[tuple[int, int]]]`): Rows and columns of each row's pictures; later ones as the last.
            number (`list[int]`): Pictures that each row's prompt holds already.
            codes_per_step (`int`): The paper's K.
            config ([`MarsConfig`]): Tells ids and order.
        """
        self._rows = [_Row(own, before) for own, before in zip(grids, number, strict=True)]
        self._k, self._config, self.cancelled = codes_per_step, config, False
        if self.progress:
            total = max(row.total for row in self._rows) if all(len(own) == 1 for own in grids) else None
            self._bar = logging.tqdm(total=total, desc="Drawing", unit="code")

    def put(self, value: torch.Tensor) -> None:
        """Take the next token `(batch,)` of every row."""
        if value.ndim != 1:
            return  # the prompt
        tokens = value.tolist()
        is_code = [self._take(row, token) for row, token in zip(self._rows, tokens, strict=True)]
        if self._bar is not None and any(is_code):
            self._bar.update()
        if any(row.is_open and row.due <= len(row.codes) < row.total for row in self._rows):
            for row in self._rows:
                row.due = len(row.codes) + self.every * row.grid[1]
            self._show()

    def _take(self, row: _Row, token: int) -> bool:
        """Say whether a token is the code of a picture that is being drawn, and keep it then."""
        config = self._config
        if token == config.image_start_token_id and not (row.is_open and not row.codes):
            row.codes, row.is_open = [], True
            row.due = self.every * row.grid[1]
        elif token == config.image_end_token_id and row.is_open:
            row.is_open, row.number = False, row.number + 1
        elif row.is_open and 0 <= token - config.image_token_offset < config.codebook_size:
            row.codes.append(token - config.image_token_offset)
            return True
        return False

    def _show(self) -> None:
        if self.callback is not None and self.callback(self.preview()) is False:
            self.cancelled = True

    def preview(self) -> Preview:
        """Decode what is there."""
        begun = [index for index, row in enumerate(self._rows) if row.codes]
        decoded = decode_codes(self.vqgan, [self._filled(self._rows[index]) for index in begun])
        pixels: list[torch.Tensor | None] = [None] * len(self._rows)
        for index, picture in zip(begun, decoded, strict=True):
            pixels[index] = picture
        rows = self._rows
        return Preview(
            pixels, [len(row.codes) for row in rows], [row.total for row in rows], [row.picture for row in rows]
        )

    def _filled(self, row: _Row) -> torch.Tensor:
        there = emission_order(*row.grid, self._k, self._config.code_order)[: len(row.codes)]
        codes, known = torch.zeros(row.grid, dtype=torch.long), torch.zeros(row.grid, dtype=torch.bool)
        codes.view(-1)[there], known.view(-1)[there] = torch.tensor(row.codes), True
        return fill_missing(codes, known)

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
        >>> asked = {**inputs, "generation_mode": "image", "streamer": streamer}
        >>> threading.Thread(target=model.generate, kwargs=asked).start()
        >>> for preview in streamer:
        ...     show(preview.pixels[0])
    """

    def __init__(self, vqgan: "VQModel", every: int = 1, timeout: float | None = None, progress: bool = False):
        self._queue: Queue[Preview | None] = Queue()
        self.timeout = timeout
        super().__init__(vqgan, self._queue.put, every, progress)

    def begin(
        self, grids: list[list[tuple[int, int]]], number: list[int], codes_per_step: int, config: MarsConfig
    ) -> None:
        was_cancelled = self.cancelled  # by another thread, while the prompt was read
        super().begin(grids, number, codes_per_step, config)
        self.cancelled = was_cancelled

    def cancel(self) -> None:
        """Stop the drawing after its present step, or after the first if it has not begun."""
        self.cancelled = True

    def end(self) -> None:
        super().end()
        self._queue.put(None)

    def __iter__(self) -> Iterator[Preview]:
        while (preview := self._queue.get(timeout=self.timeout)) is not None:
            yield preview


__all__ = ["ImageIteratorStreamer", "ImageStreamer", "Preview", "fill_missing"]
