"""
The loss of training, computed from hidden states: no logits are kept for positions that need none.

The paper's joint softmax over text and visual ids (section 3.4) is the sum of two terms, exactly: the softmax over
what the grammar admits at a position (codes inside pictures; words and `<img>` elsewhere), and the gate, that anything
of it comes at all: `softplus(lse(others) - lse(admitted))`. `scope="grammar"` leaves the gate out, as decoding does.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.utils import ModelOutput

from ..modeling_mars import MarsForConditionalGeneration

LOSS_SCOPES = ("joint", "grammar")
IGNORED_LABEL = -100


def neighbouring_codes(codebook: torch.Tensor, spread: float, num_neighbours: int = 16) -> torch.Tensor | None:
    """
    Share the label of each code out among the codes nearest to it.

    Neighbouring codes draw almost the same pixels, and which of them the VQ-GAN took is close to chance: with a
    single label a small model spends itself on learning that chance by heart.

    Args:
        codebook (`torch.Tensor` of shape `(codes, channels)`): Rows of the VQ-GAN's codebook.
        spread (`float`): Standard deviation, in distances of the codebook, of the Gaussian that gives the shares.
        num_neighbours (`int`, defaults to 16): How many share, the code itself among them.

    Returns:
        `torch.Tensor` of shape `(codes, codes)`: Rows sum to 1. `None` if `spread` is 0.

    Raises:
        ValueError: If `spread` is negative.
    """
    if spread < 0:
        raise ValueError(f"`label_spread` is a distance and cannot be negative, got {spread}.")
    if spread == 0:
        return None
    codebook = codebook.detach().float()
    distances, nearest = torch.cdist(codebook, codebook).topk(min(num_neighbours, len(codebook)), largest=False)
    shares = torch.softmax(-(distances**2) / (2 * spread**2), dim=-1)
    return torch.zeros(len(codebook), len(codebook), device=codebook.device).scatter(1, nearest, shares)


@dataclass
class LossTerms(ModelOutput):
    """
    Sums over labels.

    Args:
        loss (`torch.Tensor`): The sum of the three terms.
        code (`torch.Tensor`): Of codes among codes.
        text (`torch.Tensor`): Of words and `<img>` among words and `<img>`.
        gate (`torch.Tensor`): Of the joint softmax, beyond these two; zero in the grammar's scope.
        num_codes (`torch.Tensor`): Labels that are codes.
        num_words (`torch.Tensor`): Labels that are words or `<img>`.
    """

    loss: torch.Tensor = None  # type: ignore[assignment]
    code: torch.Tensor = None  # type: ignore[assignment]
    text: torch.Tensor = None  # type: ignore[assignment]
    gate: torch.Tensor = None  # type: ignore[assignment]
    num_codes: torch.Tensor = None  # type: ignore[assignment]
    num_words: torch.Tensor = None  # type: ignore[assignment]


class HeadLoss:
    """
    Next-token (or next-K-token) loss from the trunk's states; what `head_loss` of the model's `forward` takes.

    It is no data class: FSDP copies those that it finds among the arguments of a forward, and rounds what they hold.

    Args:
        scope (`str`, defaults to `"joint"`): See the top of this file.
        neighbours (`torch.Tensor`, *optional*): From [`neighbouring_codes`]; without it each code is labelled alone.
        chunk_size (`int`, defaults to 2048):
            Positions whose logits exist at once; more than that are computed in chunks, and again in the backward.
        all_codes (`bool`, defaults to `False`):
            Promise that every label is a code, and belongs to the last positions: nothing is picked out, and shapes
            stay static.
        agree (`Callable`, *optional*):
            `(int) -> int`, the largest number of chunks among all ranks, where they must call the heads equally often.

    Raises:
        ValueError: If the scope is unknown.
    """

    def __init__(
        self,
        scope: str = "joint",
        neighbours: torch.Tensor | None = None,
        chunk_size: int = 2048,
        all_codes: bool = False,
        agree: Callable[[int], int] | None = None,
    ):
        if scope not in LOSS_SCOPES:
            raise ValueError(f"`loss_scope` must be one of {', '.join(LOSS_SCOPES)}, got {scope!r}.")
        self.scope, self.neighbours, self.chunk_size = scope, neighbours, chunk_size
        self.all_codes, self.agree = all_codes, agree

    def __call__(
        self, model: MarsForConditionalGeneration, hidden_states: torch.Tensor, shift_labels: torch.Tensor
    ) -> LossTerms:
        """
        Sum the terms of the loss up.

        Args:
            model ([`MarsForConditionalGeneration`]): Whose heads are applied.
            hidden_states (`torch.Tensor` of shape `(batch, seq, hidden)`): Of the trunk.
            shift_labels (`torch.LongTensor` of shape `(batch, seq)`):
                The id that each position predicts, or -100; with `all_codes` maybe fewer, those of the last positions.
        """
        if self.all_codes:
            hidden_states = hidden_states[:, -shift_labels.shape[1] :]
        offset, states, labels = model.config.image_token_offset, hidden_states.flatten(0, 1), shift_labels.flatten()
        if self.all_codes:
            zero = states.new_zeros(())
            code, gate = self._chunks(self._code_terms, model, states, labels - offset)
            return LossTerms(code + gate, code, zero, gate, zero + labels.numel(), zero)
        is_code = (labels >= offset) & (labels < model.config.image_start_token_id)
        is_word = (labels != IGNORED_LABEL) & ~is_code
        code, code_gate = self._chunks(self._code_terms, model, states[is_code], labels[is_code] - offset)
        text, text_gate = self._chunks(self._text_terms, model, states[is_word], labels[is_word])
        gate = code_gate + text_gate
        return LossTerms(code + text + gate, code, text, gate, is_code.sum(), is_word.sum())

    def _chunks(
        self, terms: Callable, model: MarsForConditionalGeneration, states: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        num_chunks = max(-(-len(states) // self.chunk_size), 1)
        if self.agree is not None:
            num_chunks = self.agree(num_chunks)
        if num_chunks == 1:
            return terms(model, states, labels)
        pairs = zip(states.tensor_split(num_chunks), labels.tensor_split(num_chunks), strict=True)
        sums: list[Any] = [checkpoint(terms, model, *pair, use_reentrant=False) for pair in pairs]
        return sum(one for one, _ in sums), sum(two for _, two in sums)  # type: ignore[return-value]

    def _code_terms(
        self, model: MarsForConditionalGeneration, states: torch.Tensor, codes: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Terms of positions `(num, hidden)` whose labels are codes `(num,)`."""
        count = model.config.codebook_size
        visual = _at_least_float32(model.compute_logits(states, "visual"))
        lse_codes = visual[:, :count].logsumexp(-1)
        if self.neighbours is None:
            wanted = visual.gather(1, codes[:, None]).squeeze(1)
        else:
            head = model.vision_head
            self.neighbours = self.neighbours.to(states.device)  # sharded models come to theirs when training begins
            if isinstance(head, nn.Linear):
                # The mean logit of a label's neighbours is the state times their mean head row: no gather from logits.
                mean_rows = F.embedding(codes, self.neighbours.to(head.weight.dtype) @ head.weight[:count])
                wanted = (_at_least_float32(states) * _at_least_float32(mean_rows)).sum(-1)
            else:  # an adapter wraps it: its logits are more than its weight's
                wanted = (F.embedding(codes, self.neighbours) * visual[:, :count]).sum(-1)
        code = (lse_codes - wanted).sum()
        if self.scope == "grammar":
            return code, torch.zeros_like(code)
        words = _at_least_float32(model.compute_logits(states, "text")).logsumexp(-1)
        others = torch.logaddexp(words, visual[:, count:].logsumexp(-1))
        return code, F.softplus(others - lse_codes).sum()

    def _text_terms(
        self, model: MarsForConditionalGeneration, states: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Terms of positions `(num, hidden)` whose labels are words or `<img>` `(num,)`."""
        start = model.config.image_start_token_id - model.config.image_token_offset
        visual = _at_least_float32(model.compute_logits(states, "visual"))
        words = _at_least_float32(model.compute_logits(states, "text"))
        admitted = torch.cat([words, visual[:, start : start + 1]], dim=1)
        lse = admitted.logsumexp(-1)
        place = labels.where(labels < words.shape[1], words.shape[1])
        text = (lse - admitted.gather(1, place[:, None]).squeeze(1)).sum()
        if self.scope == "grammar":
            return text, torch.zeros_like(text)
        others = torch.cat([visual[:, :start], visual[:, start + 1 :]], dim=1).logsumexp(-1)
        return text, F.softplus(others - lse).sum()


def _at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


__all__ = ["IGNORED_LABEL", "LOSS_SCOPES", "HeadLoss", "LossTerms", "neighbouring_codes"]
