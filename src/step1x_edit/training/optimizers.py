"""The optimisers of runs over finished models. Called by `tuning`."""

from collections.abc import Iterable
from importlib.util import find_spec

import torch
from torch import nn

from step1x_edit.errors import MissingExtra
from step1x_edit.training.config import Optimizer


def check_optimizer(name: Optimizer) -> None:
    """Refuse an optimiser whose package is not installed.

    Raises:
        MissingExtra: Naming it.
    """
    if name == "adamw8bit" and find_spec("bitsandbytes") is None:
        raise MissingExtra(
            "optimizer adamw8bit needs bitsandbytes: pip install 'step1x-edit[train]', or give "
            "adamw"
        )


def build_optimizer(
    name: Optimizer, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019), its state in float32 or in 8 bits (Dettmers et al. 2022).

    Raises:
        MissingExtra: Its package is not installed.
    """
    check_optimizer(name)
    if name == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit  # pyright: ignore[reportMissingImports] - an extra

        return AdamW8bit(parameters, lr=lr, weight_decay=weight_decay)
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, fused=True)
