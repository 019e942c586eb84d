"""
Speculative Jacobi decoding: several codes of a picture from one forward, in the distribution of one after another.

Behind the codes that are certain stands a window of drafts. One forward gives the distribution p of each draft's code,
if all codes before it hold. A draft that came from a distribution q is kept with the chance min(1, p / q), and else
replaced by a draw from what q lacks of p, max(0, p - q): what then stands in its slot follows p (speculative sampling,
arXiv 2211.17192). Codes are certain up to the first replaced one, itself included, since all that its p rests on was
kept. The codes behind it are the next forward's drafts, and their p is its q (speculative Jacobi decoding, arXiv
2410.01699). They, too, were kept where that was possible, instead of being drawn afresh, so that drafts come to rest
(the maximal coupling of arXiv 2510.24211).

Why the distribution does not change: a slot takes codes of earlier slots and chance of its own, nothing else. Given
what happened in the earlier ones its draft follows q and its code p, and how long it remains a draft depends on them
alone; once they are certain, p is the model's distribution after them.

A code that comes into the window copies the one above it, in the first row the one to its left: pictures are smooth.
This q is certain of its code.
"""

import torch
from torch.nn import functional as F

from .code_order_mars import emission_order
from .configuration_mars import MarsConfig
from .drawing_mars import Drawing, chances_of, draw_from, throw


def weigh_drafts(
    drafts: torch.Tensor, proposals: torch.Tensor, chances: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Give the chance that a draft is kept, and the distribution of what replaces it.

    Args:
        drafts (`torch.LongTensor` of shape `(batch, slots)`): Codes.
        proposals (`torch.Tensor` of shape `(batch, slots, codebook_size)`): The distributions q that they came from.
        chances (`torch.Tensor` of shape `(batch, slots, codebook_size)`): The distributions p that they are to follow.

    Returns:
        `torch.Tensor` of shape `(batch, slots)` and `torch.Tensor` of shape `(batch, slots, codebook_size)`.

    Example:
        >>> draft, q, p = torch.tensor([[0]]), torch.tensor([[[0.8, 0.2]]]), torch.tensor([[[0.2, 0.8]]])
        >>> weigh_drafts(draft, q, p)
        (tensor([[0.2500]]), tensor([[[0., 1.]]]))
    """
    wanted, proposed = (one.gather(-1, drafts[..., None]).squeeze(-1) for one in (chances, proposals))
    lacking = (chances - proposals).clamp_min(0)
    total = lacking.sum(-1, keepdim=True)
    # Nothing is lacking where both are equal. Rounding may still replace a draft there, then by any draw from p.
    return (wanted / proposed).clamp_max(1), torch.where(total > 0, lacking / total, chances)


def copied_places(height: int, width: int, code_order: str) -> torch.Tensor:
    """
    Give for each place in a picture the earlier one that its draft copies; the first place has none but itself.

    Example:
        >>> copied_places(2, 3, "raster").tolist()
        [0, 0, 1, 0, 1, 2]
    """
    cells = emission_order(height, width, 1, code_order)
    return cells.argsort()[torch.where(cells >= width, cells - width, (cells - 1).clamp_min(0))]


class SpeculativeDrawing(Drawing):
    """
    A drawing, one code a step, in which drafts stand behind the codes that are certain.

    All rows go on by what the slowest one is certain of. What the others have beyond that stays as their drafts, which
    the next forward keeps, since it finds the same distributions.

    Args:
        config ([`MarsConfig`]): Of the model.
        grids (`list[tuple[int, int]]`): Rows and columns of each picture, in codes.
        window (`int`): Most drafts that a forward is fed.
        pad_token_id (`int`): Fills up rows.
        device (`torch.device`): Where the tokens live.
        enlarged (`list[list[torch.LongTensor]]`, *optional*): See [`Drawing`].
    """

    def __init__(
        self,
        config: MarsConfig,
        grids: list[tuple[int, int]],
        window: int,
        pad_token_id: int,
        device: torch.device,
        enlarged: list[list[torch.LongTensor]] | None = None,
    ):
        super().__init__(config, grids, 1, pad_token_id, device, enlarged)
        self.window, self.num_drafted = window, 0
        copied = (copied_places(*grid, config.code_order) for grid in grids)
        self.copied = torch.stack([F.pad(places, (0, self.total - len(places))) for places in copied]).to(device)
        self.proposals = torch.zeros(len(grids), 0, config.codebook_size, device=device)

    def draft(self, place: int) -> int:
        """Write drafts where the window behind `place` codes has none yet; give the number of slots of a forward."""
        end = min(place + self.window + 1, self.total)  # the last slot is drawn, but not fed
        for step in range(max(place, self.num_drafted), end):
            ids = self.picture.gather(1, 1 + self.copied[:, step, None])
            self.put(step, ids.clamp_min(self.offset))  # the first code copies padding, and thus is code 0
        self.num_drafted = end
        return max(end - place, 1)  # one for ranks that wait for others

    def settle(
        self,
        place: int,
        scores: torch.Tensor,
        do_sample: bool,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> int:
        """
        Keep or replace the drafts behind `place` codes.

        Args:
            scores (`torch.Tensor` of shape `(batch, slots, codebook_size)`): Of the drafts, after all processors.
            do_sample (`bool`): Sample; else the best code has all the chances.
            generator (`torch.Generator` or a list of one for each row, *optional*): Source of chance.

        Returns:
            `int`: How many more codes are certain now.
        """
        slots, size = scores.shape[1:]
        columns = slice(1 + place, 1 + place + slots)
        drafts = (self.picture[:, columns] - self.offset).clamp(0, size - 1)
        copies = F.one_hot(drafts[:, self.proposals.shape[1] :], size)
        proposals = torch.cat([self.proposals, copies], dim=1)
        chances = chances_of(scores) if do_sample else F.one_hot(scores.argmax(-1), size).to(scores.dtype)
        keep, replacements = weigh_drafts(drafts, proposals, chances)
        is_kept = throw(drafts.shape, generator, keep) < keep
        self.put(place, torch.where(is_kept, drafts, draw_from(replacements, generator)) + self.offset)
        is_kept = is_kept | self.known[:, columns] | ~self.live[:, columns]
        num_kept = int(is_kept.all(0).long().cumprod(0).sum())  # the one wait for the device
        certain = min(num_kept + 1, slots)
        self.proposals = chances[:, certain:]
        self.fed, self.emitted_columns = place + certain, 1 + place + certain
        return certain


__all__ = ["SpeculativeDrawing", "copied_places", "weigh_drafts"]
