"""
Muon for the matrices of hidden layers and AdamW for everything else, as one optimizer that `Trainer` can drive.

Both are torch's own; only the split and the chaining are made here. Muon (Jordan et al., 2024) is what lets the
visual experts find the words of a prompt through frozen keys and values within few passes over a small data set.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class ChainedOptimizer(torch.optim.Optimizer):
    """
    Several optimizers that step together. Schedulers see the parameter groups of all, in order.

    Args:
        optimizers (`torch.optim.Optimizer`): Of disjoint parameters.
    """

    def __init__(self, *optimizers: torch.optim.Optimizer):
        self.optimizers = optimizers
        super().__init__([{"params": group["params"]} for one in optimizers for group in one.param_groups], {})
        self._share_groups()

    def _share_groups(self) -> None:
        self.param_groups = [group for one in self.optimizers for group in one.param_groups]

    def step(self, closure: Callable | None = None) -> Any:  # type: ignore[override]
        """Step all; a closure is evaluated once."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for one in self.optimizers:
            one.step()
        return loss

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        """Give the states of all, in order, under `optimizers`."""
        return {"optimizers": [one.state_dict() for one in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # type: ignore[override]
        """
        Load what `state_dict` gave.

        Raises:
            ValueError: If it holds another number of optimizers.
        """
        states = state_dict.get("optimizers", [])
        if len(states) != len(self.optimizers):
            raise ValueError(
                f"The state holds {len(states)} chained optimizers, this run has {len(self.optimizers)}. Resume with "
                "the optimizer that the checkpoint was made with, or start anew."
            )
        for one, state in zip(self.optimizers, states, strict=True):
            one.load_state_dict(state)
        self._share_groups()  # loading made new groups


def muon_with_adamw(
    model: nn.Module,
    muon_learning_rate: float,
    learning_rate: float,
    weight_decay: float = 0.1,
    adam_beta2: float = 0.95,
) -> ChainedOptimizer:
    """
    Split a model's trainable parameters: matrices inside layers to Muon; embeddings, heads and vectors to AdamW.

    Args:
        model (`nn.Module`): Whose layers are under a name with `layers`.
        muon_learning_rate (`float`): Of updates scaled to AdamW's root mean square (Moonlight, arXiv 2502.16982).
        learning_rate (`float`): Of AdamW.
        weight_decay (`float`, defaults to 0.1): Of the matrices; nothing else decays.
        adam_beta2 (`float`, defaults to 0.95): Of AdamW.
    """
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (matrices if parameter.ndim == 2 and "layers" in name.split(".") else others).append(parameter)
    return ChainedOptimizer(
        torch.optim.Muon(matrices, lr=muon_learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, adam_beta2), weight_decay=0.0),
    )
