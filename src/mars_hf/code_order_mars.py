"""
Next-K-token prediction: the order in which the codes of a picture are emitted, K at a time, and what each token of a
row then sees and predicts (the paper's section 3.4).

The paper draws K codes a step and does not say which. Three orders are offered; in each the codes of step `t` are
elements `t * K` to `t * K + K - 1`, and only the last step may be shorter:

- `"raster"`: row by row. Neighbouring codes share a step, which is fast and coarse for K > 1.
- `"region"`: the picture is cut into K regions, and each step takes one code of every region, so that codes of one
  step lie far apart (as in PAR, arXiv 2412.15119). The order depends on K.
- `"block2x2"`: squares of 2 x 2 codes, row by row: the four children of one code of half the resolution.

Image codes are always stored in raster order; token ids, labels and what is drawn are in emission order.

In a row, a picture is `<img>` K times, its codes, `</img>`. Start slots and codes together are cut into blocks of K.
Inside a block every token sees every other, between blocks and outside pictures attention is causal; a token predicts
the code K places further on. With K = 1 this is plain next-token prediction.

[`PictureTokens`] finds pictures in finished rows and reads their codes, for the model and for the processor.
"""

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import isqrt
from typing import Any, NamedTuple

import torch

from .configuration_mars import MarsConfig

CODE_ORDERS = ("raster", "region", "block2x2")
# Above this share of steps with touching codes, a region order has lost its point.
_TOUCHING_SHARE = 0.1


def check_code_order(height: int, width: int, codes_per_step: int, code_order: str) -> None:
    """
    Refuse an order that a grid of codes does not have.

    Args:
        height (`int`): Rows of the grid, in codes.
        width (`int`): Columns of the grid, in codes.
        codes_per_step (`int`): The paper's K.
        code_order (`str`): `"raster"`, `"region"` or `"block2x2"`.

    Raises:
        ValueError: If the order is unknown, K is not in `[1, height * width]`, or `"block2x2"` meets an odd side or a
            K other than 1, 2 and multiples of 4.
    """
    if code_order not in CODE_ORDERS:
        raise ValueError(f"`code_order` must be one of {', '.join(CODE_ORDERS)}, got {code_order!r}.")
    if not 1 <= codes_per_step <= height * width:
        raise ValueError(
            f"`codes_per_step` must be between 1 and the picture's number of codes ({height}x{width} = "
            f"{height * width}), got {codes_per_step}."
        )
    if code_order == "block2x2":
        if height % 2 or width % 2:
            raise ValueError(
                f"`code_order='block2x2'` needs an even number of rows and columns of codes, got {height}x{width}. "
                "Choose sides that are multiples of twice the downsampling factor, or another order."
            )
        if codes_per_step not in (1, 2) and codes_per_step % 4:
            raise ValueError(
                f"`code_order='block2x2'` takes 1, 2 or a multiple of 4 codes a step, got {codes_per_step}."
            )


@lru_cache(maxsize=256)
def emission_order(height: int, width: int, codes_per_step: int = 1, code_order: str = "raster") -> torch.LongTensor:
    """
    Give the raster index of each emitted code.

    Args:
        height, width, codes_per_step, code_order: See [`check_code_order`].

    Returns:
        `torch.LongTensor` of shape `(height * width,)`: A permutation; `order.argsort()` is its inverse. It is
        cached: do not change it in place.

    Raises:
        ValueError: See [`check_code_order`].

    Example:
        >>> emission_order(2, 4, 2, "region").tolist()
        [0, 2, 1, 3, 4, 6, 5, 7]
    """
    check_code_order(height, width, codes_per_step, code_order)
    cells = [(y, x) for y in range(height) for x in range(width)]
    if code_order == "block2x2":
        cells.sort(key=lambda cell: (cell[0] // 2, cell[1] // 2, cell))
    elif code_order == "region":
        cells = _region_order(height, width, codes_per_step, cells)
        _warn_if_steps_touch(height, width, codes_per_step, cells)
    order = torch.tensor([y * width + x for y, x in cells])
    return order  # type: ignore[return-value]


def to_emission_order(codes: torch.Tensor, codes_per_step: int = 1, code_order: str = "raster") -> torch.Tensor:
    """
    Line the codes of a picture `(height, width)` up as they are emitted; see [`check_code_order`].

    Example:
        >>> to_emission_order(torch.arange(8).view(2, 4), 2, "region").tolist()
        [0, 2, 1, 3, 4, 6, 5, 7]
    """
    height, width = codes.shape
    return codes.flatten()[emission_order(height, width, codes_per_step, code_order).to(codes.device)]


def to_raster_order(
    codes: torch.Tensor, height: int, width: int, codes_per_step: int = 1, code_order: str = "raster"
) -> torch.Tensor:
    """Lay emitted codes `(height * width,)` out as `(height, width)`: the inverse of [`to_emission_order`]."""
    order = emission_order(height, width, codes_per_step, code_order).to(codes.device)
    return torch.empty_like(codes).index_copy_(0, order, codes).view(height, width)


def _region_order(height: int, width: int, k: int, cells: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """
    Walk K regions in parallel. Where K does not divide the grid, the codes in region order are cut into K runs whose
    lengths differ by one at most, so that a slot stays in its own run for the whole picture.
    """
    short = max(divisor for divisor in range(1, isqrt(k) + 1) if k % divisor == 0)
    rows, columns = (short, k // short) if width >= height else (k // short, short)
    line = sorted(cells, key=lambda cell: (cell[0] * rows // height, cell[1] * columns // width, cell))
    length, longer = divmod(len(line), k)
    starts = [run * length + min(run, longer) for run in range(k + 1)]
    steps = range(length + (longer > 0))
    return [line[starts[run] + t] for t in steps for run in range(k) if starts[run] + t < starts[run + 1]]


def _warn_if_steps_touch(height: int, width: int, k: int, cells: list[tuple[int, int]]) -> None:
    steps = [cells[start : start + k] for start in range(0, len(cells), k)]
    touching = sum(
        any(abs(a[0] - b[0]) <= 1 and abs(a[1] - b[1]) <= 1 for n, a in enumerate(step) for b in step[:n])
        for step in steps
    )
    if touching > _TOUCHING_SHARE * len(steps):
        warnings.warn(
            f"In {touching} of {len(steps)} steps of a {height}x{width} grid, `code_order='region'` with "
            f"`codes_per_step={k}` emits neighbouring codes at once. Take a smaller K, or sides that it divides.",
            stacklevel=4,
        )


@dataclass
class PictureLayout:
    """
    Where each token of a row stands in its picture. All tensors are of shape `(batch, seq)`.

    Args:
        picture (`torch.LongTensor`): Number of the picture in the row, -1 outside pictures (`</img>` is outside).
        place (`torch.LongTensor`): Place among the picture's start slots and codes, -1 outside.
        codes_per_step (`torch.LongTensor`): Length of the picture's run of `<img>`, 1 outside.
        num_codes (`torch.LongTensor`): Codes that the row holds of the picture, 0 outside.
    """

    picture: torch.Tensor
    place: torch.Tensor
    codes_per_step: torch.Tensor
    num_codes: torch.Tensor

    @classmethod
    def of(cls, input_ids: torch.Tensor, image_token_offset: int, image_start_token_id: int) -> "PictureLayout":
        """
        Read the layout off ids; nothing of it is computed on the host.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, seq)`): Rows in emission order.
            image_token_offset (`int`): Id of code 0; codes end where `<img>` begins.
            image_start_token_id (`int`): Id of `<img>`.
        """
        index = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        is_start = input_ids == image_start_token_id
        is_inner = (input_ids >= image_token_offset) & (input_ids <= image_start_token_id)
        before = torch.nn.functional.pad(is_start[:, :-1], (1, 0))
        begins = is_start & ~before
        begin = torch.where(begins, index, -1).cummax(1).values
        breaks = torch.where(is_inner, -1, index).cummax(1).values  # the last token that stands in no picture
        inside = (begin > breaks) & (begin >= 0)
        number = begins.long().cumsum(1)  # 1 for the first picture

        def count(tokens: torch.Tensor) -> torch.Tensor:
            totals = torch.zeros(len(input_ids), input_ids.shape[1] + 1, dtype=torch.long, device=input_ids.device)
            return totals.scatter_add(1, number, (tokens & inside).long()).gather(1, number)

        return cls(
            picture=torch.where(inside, number - 1, -1),
            place=torch.where(inside, index - begin, -1),
            codes_per_step=torch.where(inside, count(is_start), 1).clamp_min(1),
            num_codes=torch.where(inside, count(~is_start), 0),
        )

    @property
    def block_ids(self) -> torch.Tensor:
        """Numbers that tell the blocks of a row apart, -1 outside pictures; see `create_causal_mask`."""
        index = torch.arange(self.place.shape[1], device=self.place.device).expand_as(self.place)
        first = index - self.place
        return torch.where(self.place >= 0, first + self.place // self.codes_per_step, -1)

    @property
    def targets(self) -> torch.Tensor:
        """Index of the token that each token predicts, -1 where it predicts none."""
        index = torch.arange(self.place.shape[1], device=self.place.device).expand_as(self.place)
        following = torch.where(index + 1 < self.place.shape[1], index + 1, -1)
        is_last = self.place == self.codes_per_step + self.num_codes - 1  # what comes next is `</img>`
        in_picture = torch.where(self.place < self.num_codes, index + self.codes_per_step, -1)
        return torch.where(self.place >= 0, in_picture.where(~is_last, following), following)

    def shift_labels(self, labels: torch.Tensor, ignore_index: int = -100) -> torch.Tensor:
        """Put labels `(batch, seq)`, which stand at the place of the token itself, where they are predicted."""
        targets = self.targets
        return labels.gather(1, targets.clamp_min(0)).masked_fill(targets < 0, ignore_index)


def cell_table(
    grids: Sequence[Sequence[tuple[int, int]]], codes_per_step: int | Sequence[Sequence[int]], code_order: str
) -> torch.LongTensor:
    """
    List, for each place of each picture, the cell that a token there holds and the cell that it predicts.

    Args:
        grids (`list[list[tuple[int, int]]]`):
            For each row, rows and columns of its pictures, in codes. Pictures beyond the last take its size.
        codes_per_step (`int` or `list[list[int]]`): The paper's K, one for all or for each picture.
        code_order (`str`): See `emission_order`.

    Returns:
        `torch.LongTensor` of shape `(batch, pictures, places, 4)`: Row and column of the cell held, row and column of
        the cell predicted; -1 where there is none.
    """
    steps = [[codes_per_step]] * len(grids) if isinstance(codes_per_step, int) else codes_per_step
    places = max(height * width for row in grids for height, width in row) + max(map(max, steps))
    table = torch.full((len(grids), max(map(len, grids)), places, 4), -1)
    for row, (sizes, ks) in enumerate(zip(grids, steps, strict=True)):
        for number in range(table.shape[1]):
            height, width = sizes[min(number, len(sizes) - 1)]
            k = ks[min(number, len(ks) - 1)]
            order = emission_order(height, width, k, code_order)
            cells = torch.stack([order // width, order % width], dim=-1)
            table[row, number, k : k + len(order), :2] = cells
            table[row, number, : len(order), 2:] = cells
    return table  # type: ignore[return-value]


def look_up_cells(table: torch.Tensor, picture: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """
    Give the cells `(batch, seq, 4)` of tokens.

    Args:
        table (`torch.LongTensor` of shape `(batch, pictures, places, 4)`): From `cell_table`.
        picture, place (`torch.LongTensor` of shape `(batch, seq)`): See [`PictureLayout`]; place -1 has no cell.
    """
    rows = torch.arange(len(table), device=table.device)[:, None]
    cells = table[rows, picture.clamp(0, table.shape[1] - 1), place.clamp(0, table.shape[2] - 1)]
    return cells.masked_fill((place < 0)[..., None], -1)


def find_cells(
    config: MarsConfig,
    input_ids: torch.Tensor,
    layout: PictureLayout,
    image_sizes: Sequence[Sequence[tuple[int, int]]],
    enlarged: Sequence[Sequence[torch.Tensor]] | None = None,
) -> torch.LongTensor:
    """
    Give the cells `(batch, seq, 4)` of all tokens of whole rows: of pictures, and of what super-resolution starts
    from, whose codes hold the upper left one of the cells that come of each.

    With `config.lowres_embedding` there is a fifth column, see [`add_lowres_codes`].

    Args:
        config ([`MarsConfig`]): Of the model.
        input_ids (`torch.LongTensor` of shape `(batch, seq)`): Rows in emission order.
        layout ([`PictureLayout`]): Of these rows.
        image_sizes (`list[list[tuple[int, int]]]`): Heights and widths in pixels of the pictures of each row.
        enlarged (`list[list[torch.LongTensor]]`, *optional*): For each row, the codes of its enlarged small pictures.

    Raises:
        ValueError: If a picture is larger than the cell embeddings know, or the enlarged ones are missing.
    """
    factor = config.downsample_factor
    grids = [[(height // factor, width // factor) for height, width in row] for row in image_sizes]
    if (side := max((max(grid) for row in grids for grid in row), default=0)) > config.max_grid_size:
        raise ValueError(
            f"A picture has {side} codes a side, but the cell embeddings know {config.max_grid_size} "
            "(`config.max_grid_size`). Give a smaller picture, or train a model with more."
        )
    grids = [row or [(2, 2)] for row in grids]  # any that each order has: nothing of it is looked up
    # Every picture has its own K, read off its run of `<img>`.
    steps = [k[place == 0].tolist() or [1] for k, place in zip(layout.codes_per_step, layout.place, strict=True)]
    table = cell_table(grids, steps, config.code_order).to(input_ids.device)
    cells = look_up_cells(table, layout.picture, layout.place)
    if config.super_resolution_factor is None:
        return cells  # type: ignore[return-value]
    scale, longest = config.super_resolution_factor, max(map(len, grids))
    padded = [row + row[-1:] * (longest - len(row)) for row in grids]
    widths = torch.tensor([[width // scale for _, width in row] for row in padded], device=input_ids.device)
    ends = (config.lowres_start_token_id, config.lowres_end_token_id)
    number, place = _lowres_places(input_ids, *ends, config.image_start_token_id)
    width = widths.clamp_min(1).gather(1, number.clamp_max(longest - 1))
    held = torch.stack([place // width * scale, place % width * scale], dim=-1)
    held = torch.cat([held, torch.full_like(held, -1)], dim=-1)
    cells = torch.where((place >= 0)[..., None], held, cells)
    if not config.lowres_embedding:
        return cells  # type: ignore[return-value]
    last = layout.picture.amax(1).tolist()
    if enlarged is None or any(len(row) <= number for row, number in zip(enlarged, last, strict=True)):
        raise ValueError("A model with `lowres_embedding` needs the `enlarged` codes of every small picture.")
    return add_lowres_codes(cells, layout.picture, enlarged)


def add_lowres_codes(
    cells: torch.Tensor, picture: torch.Tensor, enlarged: Sequence[Sequence[torch.Tensor]]
) -> torch.LongTensor:
    """
    Add to cells a fifth column: the code that the enlarged small picture has in the cell that is predicted.

    Args:
        cells (`torch.LongTensor` of shape `(batch, seq, 4)`): See `look_up_cells`.
        picture (`torch.LongTensor` of shape `(batch, seq)`): See [`PictureLayout`].
        enlarged (`list[list[torch.LongTensor]]`): For each row, codes `(rows, columns)` of each of its pictures.

    Returns:
        `torch.LongTensor` of shape `(batch, seq, 5)`: -1 where no cell is predicted or there is no small picture.
    """
    every = [grid.shape for row in enlarged for grid in row]
    side = max(int(cells.max()) + 1, *(max(shape) for shape in every), 0)
    # One more of each than there is: index -1 finds -1.
    table = torch.full((len(cells), int(picture.max()) + 2, side + 1, side + 1), -1, device=cells.device)
    for row, grids in enumerate(enlarged):
        for number, grid in enumerate(grids):
            table[row, number, : grid.shape[0], : grid.shape[1]] = grid.to(table)
    rows = torch.arange(len(cells), device=cells.device)[:, None]
    codes = table[rows, picture, cells[..., 2], cells[..., 3]]
    return torch.cat([cells, codes[..., None]], dim=-1)  # type: ignore[return-value]


def find_small_pictures(
    config: MarsConfig, input_ids: torch.Tensor, image_sizes: Sequence[Sequence[tuple[int, int]]]
) -> list[list[torch.LongTensor]]:
    """
    Read what super-resolution starts from off rows.

    Args:
        config ([`MarsConfig`]): Of a model with `super_resolution_factor`.
        input_ids (`torch.LongTensor` of shape `(batch, seq)`): Prompts or whole rows.
        image_sizes (`list[list[tuple[int, int]]]`): Heights and widths in pixels of what is drawn of them.

    Returns:
        `list[list[torch.LongTensor]]`: For each row, codes `(rows, columns)` of each of its small pictures.

    Raises:
        ValueError: If the codes between `<lowres>` and `</lowres>` do not fit the size of their picture.
    """
    unit = config.downsample_factor * (config.super_resolution_factor or 1)
    found: list[list[Any]] = []
    for ids, sizes in zip(input_ids, image_sizes, strict=True):
        starts = (ids == config.lowres_start_token_id).nonzero().flatten().tolist()
        ends = (ids == config.lowres_end_token_id).nonzero().flatten().tolist()
        runs = [ids[start + 1 : end] - config.image_token_offset for start, end in zip(starts, ends, strict=False)]
        grids = [(height // unit, width // unit) for height, width in sizes]
        lengths, wanted = [len(run) for run in runs], [height * width for height, width in grids]
        are_codes = all(bool(((run >= 0) & (run < config.codebook_size)).all()) for run in runs)
        if len(starts) != len(ends) or lengths != wanted or not are_codes:
            raise ValueError(
                f"Between `<lowres>` and `</lowres>` a row has runs of {lengths} tokens, where pictures of {sizes} "
                f"pixels start from {wanted} codes. Pass on all that the processor returns."
            )
        found.append([run.view(grid) for run, grid in zip(runs, grids, strict=True)])
    return found


def _lowres_places(input_ids: torch.Tensor, start: int, end: int, image_start: int) -> tuple[torch.Tensor, ...]:
    """Number of the picture that comes next, and place of each token between `<lowres>` and `</lowres>`, else -1."""
    index = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    opened = torch.where(input_ids == start, index, -1).cummax(1).values
    closed = torch.where(input_ids == end, index, -1).cummax(1).values
    is_start = input_ids == image_start
    begins = is_start & ~torch.nn.functional.pad(is_start[:, :-1], (1, 0))
    is_inside = (opened > closed) & (index > opened)
    return begins.long().cumsum(1), torch.where(is_inside, index - opened - 1, -1)


def sizes_by_row(image_sizes: Any) -> list[list[tuple[int, int]]]:
    """
    Read sizes of pictures, row by row.

    Args:
        image_sizes (`torch.LongTensor` of shape `(batch, pictures, 2)` or `(batch, 2)`, or such lists):
            Heights and widths in pixels. Zeros fill rows up and are skipped; as lists, rows may differ in length.

    Returns:
        `list[list[tuple[int, int]]]`: `(height, width)` of the pictures of each row.

    Raises:
        ValueError: If these are no pairs of numbers.
    """
    rows = [torch.as_tensor(row) for row in image_sizes]
    for row in rows:
        if row.ndim not in (1, 2) or row.shape[-1] != 2:
            raise ValueError(
                "`image_sizes` must hold, for each row, the height and width of its pictures: shape (batch, pictures, "
                f"2), got {tuple(row.shape)} for a row."
            )
    return [[tuple(size) for size in row.reshape(-1, 2).tolist() if any(size)] for row in rows]


class PictureSpan(NamedTuple):
    """
    Columns of a complete picture in a row.

    Args:
        start (`int`): Of the first `<img>`.
        first (`int`): Of the first code; there are as many `<img>` before it as codes in a step.
        end (`int`): Of `</img>`.
    """

    start: int
    first: int
    end: int


# A row as letters, one for each token: s is `<img>`, e is `</img>`. A picture that lacks its end is none.
_PICTURE_PATTERN = re.compile("(s+)([^se]*)e")


@dataclass(frozen=True)
class PictureTokens:
    """
    How pictures are written as tokens: what the model knows from its configuration and the processor from its
    tokenizer.

    Args:
        image_token_offset (`int`): Id of code 0; codes end where `<img>` begins.
        image_start_token_id (`int`): Id of `<img>`.
        image_end_token_id (`int`): Id of `</img>`.
        downsample_factor (`int`): Side in pixels of the square that one code stands for.
        code_order (`str`, defaults to `"raster"`): See [`emission_order`].
    """

    image_token_offset: int
    image_start_token_id: int
    image_end_token_id: int
    downsample_factor: int
    code_order: str = "raster"

    def find(self, row: torch.Tensor) -> list[PictureSpan]:
        """
        Find the complete pictures of a row `(seq,)` of ids. One that lacks its `</img>` is left out.

        Raises:
            ValueError: If anything but codes stands in a picture.
        """
        letters = {self.image_start_token_id: "s", self.image_end_token_id: "e"}
        ids = row.tolist()
        matches = _PICTURE_PATTERN.finditer("".join(letters.get(token, ".") for token in ids))
        spans = [PictureSpan(match.start(), match.start(2), match.end(2)) for match in matches]
        for span in spans:
            for column in range(span.first, span.end):
                if not self.image_token_offset <= ids[column] < self.image_start_token_id:
                    raise ValueError(
                        f"The picture in columns {span.start} to {span.end} of a row holds id {ids[column]} in column "
                        f"{column}, which is no image code: codes are ids {self.image_token_offset} to "
                        f"{self.image_start_token_id - 1}."
                    )
        return spans

    def read(self, row: torch.Tensor, span: PictureSpan, size: tuple[int, int] | None = None) -> torch.Tensor:
        """
        Read the codes of a picture.

        Args:
            row (`torch.LongTensor` of shape `(seq,)`): Ids.
            span ([`PictureSpan`]): Where the picture stands, see [`~PictureTokens.find`].
            size (`tuple[int, int]`, *optional*): Height and width in pixels. If None, the picture is square.

        Returns:
            `torch.LongTensor` of shape `(height / f, width / f)`.

        Raises:
            ValueError: If the number of codes does not fit the size, or codes and K not the order.
        """
        codes = row[span.first : span.end] - self.image_token_offset
        if size is None:
            height = width = isqrt(len(codes))
            wanted = "a square"
        else:
            height, width = (side // self.downsample_factor for side in size)
            wanted = f"{size[0]}x{size[1]} pixels ({height * width} codes)"
        if not len(codes) or height * width != len(codes):
            raise ValueError(
                f"The picture in columns {span.start} to {span.end} of a row has {len(codes)} codes, which do not "
                f"make {wanted}. Give the `image_sizes` that it was drawn with."
            )
        return to_raster_order(codes, height, width, span.first - span.start, self.code_order)

    def collect(self, sequences: Sequence[torch.Tensor] | torch.Tensor, image_sizes: Any = None) -> list[list[Any]]:
        """
        Read the codes of every complete picture.

        Args:
            sequences (`torch.LongTensor` of shape `(num, seq)`, or a list of rows): As `generate` returns them.
            image_sizes (`torch.LongTensor` of shape `(batch, pictures, 2)`, *optional*):
                See [`sizes_by_row`]; `num` may be a multiple of `batch`. A row's n-th picture has its n-th size, later
                ones the last. If None, pictures are square.

        Returns:
            `list[list[torch.LongTensor]]`: For each row, the codes `(height / f, width / f)` of each of its pictures.

        Raises:
            ValueError: If rows cannot share the sizes, a picture has no size, or its codes do not fit it.
        """
        sizes = None if image_sizes is None else sizes_by_row(image_sizes)
        if sizes is not None and (not sizes or len(sequences) % len(sizes)):
            raise ValueError(f"{len(sequences)} sequences cannot share {len(sizes)} rows of `image_sizes`.")
        repeats = 1 if sizes is None else len(sequences) // len(sizes)
        return [
            [
                self.read(row, span, None if sizes is None else _nth_size(sizes[index // repeats], n))
                for n, span in enumerate(self.find(row))
            ]
            for index, row in enumerate(sequences)
        ]


def _nth_size(sizes: list[tuple[int, int]], number: int) -> tuple[int, int]:
    if not sizes:
        raise ValueError("A row holds a picture, but its `image_sizes` are all zero: give the size of every picture.")
    return sizes[min(number, len(sizes) - 1)]


__all__ = [
    "CODE_ORDERS",
    "PictureLayout",
    "PictureSpan",
    "PictureTokens",
    "add_lowres_codes",
    "cell_table",
    "check_code_order",
    "emission_order",
    "find_cells",
    "find_small_pictures",
    "look_up_cells",
    "sizes_by_row",
    "to_emission_order",
    "to_raster_order",
]
