"""
The state of rows while they are drawn: what is fed next, what every call may see, and which code a slot gets.

Nothing here calls the model or waits for the device; `generation_mars.py` does.
"""

from typing import Any

import torch
from torch.nn import functional as F

from .code_order_mars import add_lowres_codes, cell_table, look_up_cells
from .configuration_mars import MarsConfig


def position_ids_of(attention_mask: torch.Tensor) -> torch.Tensor:
    """Give consecutive positions `(batch, seq)` that start at each row's first attended token."""
    return (attention_mask.long().cumsum(-1) - 1).clamp_min(0)


GUIDANCE_SCHEDULES = ("constant", "linear", "cosine")


def guidance_at(
    scale: float, progress: torch.Tensor, schedule: str = "constant", interval: tuple[float, float] = (0.0, 1.0)
) -> torch.Tensor:
    """
    Give the strength of guidance in the course of a picture.

    Args:
        scale (`float`): The full strength; 1 is none.
        progress (`torch.Tensor`): Share of the picture that is drawn already, in [0, 1).
        schedule (`str`, defaults to `"constant"`): `"linear"` and `"cosine"` grow from 1 to the full strength.
        interval (`tuple[float, float]`, defaults to `(0.0, 1.0)`): Shares between which there is guidance.

    Returns:
        `torch.Tensor`: Of the shape of `progress`.
    """
    ramp = {
        "constant": torch.ones_like(progress),
        "linear": progress,
        "cosine": (1 - torch.cos(torch.pi * progress)) / 2,
    }[schedule]
    inside = (progress >= interval[0]) & (progress <= interval[1])
    return torch.where(inside, 1 + (scale - 1) * ramp, 1.0)


def guided(conditional: torch.Tensor, unconditional: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    """
    Lead logits away from the unconditional ones; where infinities of both would make no number, the conditional holds.
    """
    mixed = torch.lerp(unconditional, conditional, strength)
    is_undefined = mixed.isnan() & ~(conditional.isnan() | unconditional.isnan())
    return torch.where(is_undefined, conditional, mixed)


class Faults:
    """
    Remembers on the device where scores were no numbers, so that no step has to wait for the answer.

    Args:
        input_ids (`torch.Tensor` of shape `(batch, seq)`): Prompts.
    """

    def __init__(self, input_ids: torch.Tensor):
        self.step = torch.full_like(input_ids[:, 0], -1)
        self.present = 0  # number of the step that is being made

    def look(self, scores: torch.Tensor, rows: torch.Tensor | None = None) -> None:
        """Look at scores `(batch, ...)` of the present step, or at those of some rows `(num,)`."""
        is_bad = scores.flatten(1).isnan().any(1)
        if rows is not None:
            is_bad = torch.zeros_like(self.step, dtype=torch.bool).index_copy_(0, rows, is_bad)
        self.step = torch.where(is_bad & (self.step < 0), self.present, self.step)

    def refuse(self) -> None:
        """
        Raises:
            RuntimeError: If any score was NaN, with its row and step.
        """
        for row, step in enumerate(self.step.tolist()):
            if step >= 0:
                raise RuntimeError(
                    f"The scores of row {row} were not a number (NaN) in step {step}. Look at the weights "
                    "(overflow in float16? a training that diverged?) and at your own logits processors."
                )


class Drawing:
    """
    The tokens of one picture a row while they are drawn, K a step.

    `picture` `(batch, K + codes + 1)` holds `<img>` K times, the codes in emission order, `</img>`, and padding where
    other rows have more codes.

    Args:
        config ([`MarsConfig`]): Of the model.
        grids (`list[tuple[int, int]]`): Rows and columns of each picture, in codes.
        codes_per_step (`int`): The paper's K.
        pad_token_id (`int`): Fills up rows.
        device (`torch.device`): Where the tokens live.
        enlarged (`list[list[torch.LongTensor]]`, *optional*): See [`add_lowres_codes`].
    """

    def __init__(
        self,
        config: MarsConfig,
        grids: list[tuple[int, int]],
        codes_per_step: int,
        pad_token_id: int,
        device: torch.device,
        enlarged: list[list[torch.LongTensor]] | None = None,
    ):
        num_codes = torch.tensor([height * width for height, width in grids], device=device)
        self.k, self.end_id, self.offset = codes_per_step, config.image_end_token_id, config.image_token_offset
        self.total = max(height * width for height, width in grids)
        self.num_steps = -(-self.total // codes_per_step)
        self.picture = num_codes.new_full((len(num_codes), self.k + self.total + 1), pad_token_id)
        self.picture[:, : self.k] = config.image_start_token_id
        ends = (num_codes + self.k)[:, None]
        self.picture.scatter_(1, ends, self.end_id)
        self.grids = grids
        # Columns that are fed and seen: up to the end of each row's own picture.
        self.live = torch.arange(self.picture.shape[1], device=num_codes.device) < ends
        self.known = torch.zeros_like(self.live)  # codes that the caller gave
        self.num_codes, self.pad_token_id = num_codes, pad_token_id
        self.fed = self.emitted_columns = 0
        self.cells: torch.Tensor | None = None
        if config.cell_embedding:
            table = cell_table([[grid] for grid in grids], self.k, config.code_order).to(device)
            place = torch.arange(self.picture.shape[1], device=device).where(self.live, -1)
            self.cells = look_up_cells(table, torch.zeros_like(place), place)
            if enlarged is not None:
                self.cells = add_lowres_codes(self.cells, torch.zeros_like(place), enlarged)

    def start(self, initial_codes: list[torch.Tensor] | None) -> int:
        """Put given codes at the beginning of the pictures; give the first step that has something to draw."""
        if initial_codes is None:
            return 0
        copies = len(self.picture) // len(initial_codes)  # several pictures of a prompt begin alike
        for row in range(len(self.picture)):
            codes = torch.as_tensor(initial_codes[row // copies])
            columns = slice(self.k, self.k + len(codes))
            self.picture[row, columns] = codes.to(self.picture) + self.offset
            self.known[row, columns] = True
        return min(len(codes) for codes in initial_codes) // self.k

    def progress(self, step: int, num_steps: int = 1) -> torch.Tensor:
        """Share `(batch, num_steps)` of each picture that is drawn before a step and those behind it."""
        steps = torch.arange(step, step + num_steps, device=self.num_codes.device)
        return (steps * self.k / self.num_codes[:, None]).clamp_max(1.0)

    def width(self, step: int) -> int:
        """Number of codes of a step; less than K in the last one only."""
        return min(self.k, self.total - step * self.k)

    def tokens_until(self, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """
        Give what has to be fed before step `step` can be drawn: tokens `(batch, seq)`, whether each is live, cells.
        """
        columns = slice(self.fed, (step + 1) * self.k)
        self.fed = (step + 1) * self.k
        width = columns.stop - columns.start
        tokens, live = self.picture[:, columns], self.live[:, columns]
        tokens = torch.where(live, tokens, self.end_id)
        missing = width - tokens.shape[1]  # after the last step, for ranks that wait for others
        tokens = F.pad(tokens, (0, missing), value=self.end_id)
        cells = None
        if self.cells is not None:
            cells = F.pad(self.cells[:, columns], (0, 0, 0, missing), value=-1)
        return tokens, F.pad(live, (0, missing)), cells

    def put(self, step: int, ids: torch.Tensor) -> torch.Tensor:
        """Write the ids `(batch, K)` of a step, or of more steps from it on; give their columns as they now are."""
        first = self.k + step * self.k
        width = min(ids.shape[1], self.k + self.total - first)
        columns = slice(first, first + width)
        may_write = self.live[:, columns] & ~self.known[:, columns]
        self.picture[:, columns] = torch.where(may_write, ids[:, :width], self.picture[:, columns])
        self.emitted_columns = columns.stop
        return self.picture[:, columns]

    def cut(self) -> None:
        """Leave what is not drawn out: incomplete pictures end without `</img>`."""
        columns = torch.arange(self.picture.shape[1], device=self.picture.device)
        is_complete = (self.live.sum(1) <= self.emitted_columns)[:, None]
        self.picture = torch.where(is_complete | (columns < self.emitted_columns), self.picture, self.pad_token_id)

    @property
    def emitted(self) -> torch.Tensor:
        """What of the pictures is there already, `<img>` included."""
        return self.picture[:, : max(self.emitted_columns, self.fed)]


class DrawingContext:
    """
    Attention mask, positions and block ids of all that was fed, one call after the other.

    Args:
        mask (`torch.Tensor` of shape `(rows, seq)`): Of the prompts.
        codes_per_step (`int`): The paper's K; 1 needs no block ids.
        copies (`int`): 2 under guidance, where conditional rows stand over unconditional ones.
    """

    def __init__(self, mask: torch.Tensor, codes_per_step: int, copies: int):
        self.mask, self.k, self.copies = mask, codes_per_step, copies
        self.position = position_ids_of(mask)[:, -1:]
        self.block_ids = torch.full_like(mask, -1, dtype=torch.long)

    def begin_unconditional(self, begins: torch.Tensor, prefixes: torch.Tensor) -> None:
        """
        Let the unconditional rows of pictures that begin see their prefix and nothing else.

        Args:
            begins (`torch.BoolTensor` of shape `(batch,)`): Rows that begin a picture.
            prefixes (`torch.Tensor` of shape `(batch, prompt)`): Masks of the prefixes of these pictures.
        """
        conditional, unconditional = self.mask.chunk(2)
        fresh = F.pad(prefixes.to(self.mask.dtype), (0, self.mask.shape[1] - prefixes.shape[1]))
        self.mask = torch.cat([conditional, torch.where(begins[:, None], fresh, unconditional)])
        above, below = self.position.chunk(2)
        self.position = torch.cat(
            [above, torch.where(begins[:, None], prefixes.long().sum(1, keepdim=True) - 1, below)]
        )

    def take_back(self, num_columns: int) -> None:
        """Forget the last columns that were fed, one code each."""
        kept = self.mask.shape[1] - num_columns
        self.position = self.position - self.mask[:, kept:].long().sum(1, keepdim=True)
        self.mask = self.mask[:, :kept]

    def feed(self, tokens: torch.Tensor, live: torch.Tensor, cells: torch.Tensor | None) -> dict[str, Any]:
        """Give the inputs of a call that feeds tokens `(batch, seq)`, a whole number of blocks."""
        copies = self.copies // (len(live) // len(tokens))  # `live` may tell the two kinds of rows apart
        tokens, live = tokens.repeat(self.copies, 1), live.repeat(copies, 1)
        positions = self.position + live.long().cumsum(1)  # columns that are not live take no place
        self.position = positions[:, -1:]
        inputs: dict[str, Any] = {"input_ids": tokens, "position_ids": positions}
        if self.k > 1:
            numbers = self.block_ids.shape[1] + torch.arange(tokens.shape[1], device=tokens.device) // self.k
            self.block_ids = torch.cat([self.block_ids, torch.where(live, numbers, -1)], dim=1)
            inputs["block_ids"] = self.block_ids
        self.mask = torch.cat([self.mask, live.to(self.mask.dtype)], dim=1)
        if cells is not None:
            inputs["cells"] = cells.repeat(self.copies, 1, 1)
        return {**inputs, "attention_mask": self.mask}


def pick_codes(
    scores: torch.Tensor, do_sample: bool, generator: torch.Generator | list[torch.Generator] | None = None
) -> torch.Tensor:
    """
    Choose one code a slot: sampled by [`chances_of`] the scores, or the best one.

    Args:
        scores (`torch.Tensor` of shape `(batch, slots, codebook_size)`): After all processors.
        do_sample (`bool`): Sample, or take the best.
        generator (`torch.Generator` or a list of one for each row, *optional*): Source of chance.

    Returns:
        `torch.LongTensor` of shape `(batch, slots)`.
    """
    return draw_from(chances_of(scores), generator) if do_sample else scores.argmax(-1)


def chances_of(scores: torch.Tensor) -> torch.Tensor:
    """
    Turn scores `(batch, slots, codebook_size)` into chances.

    Scores that are all -inf, or some +inf, stand for equal chances of all that have the highest score.
    """
    return scores.nan_to_num(nan=torch.finfo(scores.dtype).min).softmax(-1)  # infinities become largest numbers


def draw_from(chances: torch.Tensor, generator: torch.Generator | list[torch.Generator] | None) -> torch.Tensor:
    """Choose one code a slot `(batch, slots)` by its chances `(batch, slots, codebook_size)`."""
    # By the inverse of the distribution function: one random number a slot, where `torch.multinomial` takes one for
    # each entry, which was 6 % of a step of four guided rows with 16 codes each.
    cumulated = chances.to(torch.float32 if chances.device.type == "mps" else torch.float64).cumsum(-1)
    place = throw(chances.shape[:2], generator, cumulated)[..., None] * cumulated[..., -1:]
    return torch.searchsorted(cumulated, place, right=True).squeeze(-1).clamp_max(chances.shape[-1] - 1)


def throw(
    shape: tuple[int, ...], generator: torch.Generator | list[torch.Generator] | None, like: torch.Tensor
) -> torch.Tensor:
    """Give random numbers in [0, 1) of a shape `(batch, ...)`, each row from its own generator if there is a list."""
    kind: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
    if isinstance(generator, list):
        return torch.stack([torch.rand(shape[1:], generator=own, **kind) for own in generator])
    return torch.rand(shape, generator=generator, **kind)


class Document:
    """
    Rows of text with pictures while they are written, each at a place of its own.

    A row writes text until it takes `<img>`; then come K - 1 more of them, all codes of the picture, `</img>`, and
    text again. What is appended in a step, at most K tokens a row, is what the next call feeds.

    Args:
        config ([`MarsConfig`]): Of the model.
        counts (`torch.LongTensor` of shape `(batch, pictures)`): Codes of each picture; later ones take the last.
        number (`torch.LongTensor` of shape `(batch,)`): Pictures that the prompt holds already.
        codes_per_step (`int`): The paper's K.
        max_new_tokens (`int`): Most tokens that a row may get. A picture that does not fit is not begun.
        pad_token_id (`int`): Fills up rows.
        end_token_ids (`torch.LongTensor`): Tokens that end a row.
    """

    def __init__(
        self,
        config: MarsConfig,
        counts: torch.Tensor,
        number: torch.Tensor,
        codes_per_step: int,
        max_new_tokens: int,
        pad_token_id: int,
        end_token_ids: torch.Tensor,
    ):
        self.config, self.counts, self.number, self.k = config, counts, number, codes_per_step
        self.limit, self.end_token_ids = max_new_tokens, end_token_ids
        # K columns more than are ever used, so that unused slots of a step have a place to go.
        self._tokens = counts.new_full((len(counts), max_new_tokens + self.k), pad_token_id)
        self.length, self.drawn = torch.zeros_like(number), torch.zeros_like(number)
        self.in_picture = torch.zeros_like(number, dtype=torch.bool)
        self.done = torch.zeros_like(self.in_picture)
        self.fed = counts.new_full((len(counts), self.k), config.image_end_token_id)  # of the step just made
        self.live = torch.zeros(len(counts), self.k, dtype=torch.bool, device=counts.device)
        self.place = torch.full_like(self.fed, -1)  # places in their picture of the tokens of the step just made
        self.begins = torch.zeros_like(self.in_picture)  # rows whose step just made begins a picture

    @property
    def tokens(self) -> torch.Tensor:
        """What was written `(batch, max_new_tokens)`, then padding."""
        return self._tokens[:, : self.limit]

    @property
    def size(self) -> torch.Tensor:
        """Number of codes `(batch,)` of the picture that each row draws or would draw next."""
        return self.pick(self.counts)

    @property
    def progress(self) -> torch.Tensor:
        """Share `(batch,)` of its picture that each row has drawn."""
        return self.drawn / self.size

    @property
    def draws(self) -> torch.Tensor:
        """Rows `(batch,)` whose next tokens are codes."""
        return self.in_picture & (self.drawn < self.size)

    @property
    def writes(self) -> torch.Tensor:
        """Rows `(batch,)` that go on with a word or begin a picture."""
        return ~self.in_picture & ~self.done

    @property
    def may_begin(self) -> torch.Tensor:
        """Rows `(batch,)` that have room left for a whole picture."""
        return self.length + self.k + self.size + 1 <= self.limit

    def append(self, token: torch.Tensor, codes: torch.Tensor) -> None:
        """
        Take one step in every row.

        Args:
            token (`torch.LongTensor` of shape `(batch,)`): What rows in their text go on with.
            codes (`torch.LongTensor` of shape `(batch, K)`): Ids that rows in a picture go on with.
        """
        config, slots = self.config, torch.arange(self.k, device=token.device)
        draws, writes = self.draws, self.writes
        closes = self.in_picture & ~draws  # all codes are fed: what follows is `</img>`
        self.begins = writes & (token == config.image_start_token_id)
        one = torch.ones_like(self.length)
        rest = (self.size - self.drawn).clamp_max(self.k)
        width = torch.where(draws, rest, torch.where(self.begins, self.k, one))
        width = width.masked_fill(self.done, 0)
        first = torch.where(closes, config.image_end_token_id, token)[:, None].expand(-1, self.k)
        self.fed = torch.where(draws[:, None], codes, first)
        self.live = slots < width[:, None]
        places = self.length[:, None] + slots
        self._tokens.scatter_(1, places, torch.where(self.live, self.fed, self._tokens.gather(1, places)))
        self.fed = torch.where(self.live, self.fed, config.image_end_token_id)

        self.length = self.length + width
        first_place = torch.where(self.begins, 0, self.k + self.drawn)[:, None]
        self.place = torch.where((draws | self.begins)[:, None] & self.live, first_place + slots, -1)
        self.drawn = torch.where(draws, self.drawn + width, 0)
        self.in_picture = (self.in_picture & ~closes) | self.begins
        self.number = self.number + closes.long()
        ends = writes & torch.isin(token, self.end_token_ids)
        self.done = self.done | ends | (~self.in_picture & (self.length >= self.limit))

    def stop(self, rows: torch.Tensor) -> None:
        """End rows `(batch,)` that a stopping criterion names, unless they stand in a picture."""
        self.done = self.done | (rows.to(self.done.device) & ~self.in_picture)

    def pick(self, per_picture: torch.Tensor) -> torch.Tensor:
        """Choose from `(batch, pictures, ...)` what belongs to each row's present picture, the last for later ones."""
        place = self.number.clamp_max(per_picture.shape[1] - 1)
        return per_picture[torch.arange(len(place), device=place.device), place]

    def compacted(self, prompt: torch.Tensor, pad_token_id: int, is_counted: bool = True) -> torch.Tensor:
        """
        Give prompts `(batch, seq)` and what follows, padded on the left, for processors and criteria: as many columns
        as the longest row has, for which the device is waited for, or else as many as it may get.
        """
        width = int(self.length.max()) if is_counted else self.limit
        rows = torch.cat([prompt, self.tokens[:, :width]], dim=1)
        index = torch.arange(rows.shape[1], device=rows.device) - (width - self.length)[:, None]
        return rows.gather(1, index.clamp_min(0)).masked_fill(index < 0, pad_token_id)


__all__ = [
    "GUIDANCE_SCHEDULES",
    "Document",
    "Drawing",
    "DrawingContext",
    "Faults",
    "chances_of",
    "draw_from",
    "guidance_at",
    "guided",
    "pick_codes",
    "position_ids_of",
    "throw",
]
