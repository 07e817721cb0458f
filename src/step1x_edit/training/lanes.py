"""The parts of a batch side by side: each in a thread of its own, on cores of its own.

A small network's operations are too short to be shared between cores, which wait for each other at
the end of every one. Threads that each take a part of the batch through loss and gradient meet once
a step. The parts are the recipe's, not the machine's: with fewer cores than parts some wait their
turn, and the sums are the same. Called by `loop`.
"""

import copy
import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

PartLoss = Callable[[Any, torch.Generator], tuple[Tensor, int]]
"""Part of a batch and its source of chance → (its mean loss, number of samples)."""
Gradients = Sequence[Tensor | None]
"""One for each parameter, or one parameter's from each part; None where it was not read."""


@runtime_checkable
class Divisible(Protocol):
    """A batch whose rows do not depend on each other."""

    def __len__(self) -> int: ...

    def rows(self, chosen: slice) -> Any:
        """Some of them."""
        ...


class Lanes:
    """Threads for the parts of a batch.

    Args:
        num_parts: Parts of a batch.
        num_threads: Cores for all of them; by default torch's own number.
    """

    def __init__(self, num_parts: int, num_threads: int | None = None) -> None:
        self.num_parts = num_parts
        num_threads = num_threads or torch.get_num_threads()
        lanes = min(num_parts, num_threads)
        self._pool = ThreadPoolExecutor(
            lanes, "lane", initializer=torch.set_num_threads, initargs=(num_threads // lanes,)
        )

    def gradient(
        self,
        loss_of: PartLoss,
        batch: Divisible,
        parameters: Sequence[nn.Parameter],
    ) -> tuple[float, int]:
        """Mean loss and number of samples; the gradient of the mean is left in `parameters`.

        Noise is drawn from one seed a part, which come from torch's own source of chance: whichever
        thread is first, the same loss. Gradients are added in the order of the parts.
        """
        parts = [batch.rows(own) for own in even_parts(len(batch), self.num_parts)]
        seeds = torch.randint(2**62, (len(parts),)).tolist()
        sources = [torch.Generator().manual_seed(seed) for seed in seeds]

        def part_of(part: Any, source: torch.Generator) -> tuple[float, int, Gradients]:
            loss, count = loss_of(part, source)
            loss = loss * (len(part) / len(batch))
            grads = torch.autograd.grad(loss, parameters, allow_unused=True)
            return loss.item(), count, grads

        losses, counts, grads = zip(*self._pool.map(part_of, parts, sources), strict=True)
        for parameter, own in zip(parameters, zip(*grads, strict=True), strict=True):
            parameter.grad = _sum(own)
        return sum(losses), sum(counts)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """One step of an optimiser: of Muon, which takes its matrices one by one, side by side."""
        if not isinstance(optimizer, torch.optim.Muon):
            optimizer.step()
            return
        alone = [
            _over(optimizer, group, matrix)
            for group in optimizer.param_groups
            for matrix in sorted(group["params"], key=torch.numel, reverse=True)
        ]
        list(self._pool.map(lambda one: one.step(), alone))


def even_parts(count: int, num_parts: int) -> list[slice]:
    """Cut `count` rows into so many slices of nearly one length, none empty."""
    ends = [count * i // num_parts for i in range(num_parts + 1)]
    return [slice(a, b) for a, b in pairwise(ends) if a < b]


def _sum(grads: Gradients) -> Tensor | None:
    """None where there is no gradient at all."""
    there = [grad for grad in grads if grad is not None]
    # A tensor of its own: autograd may give one to two parameters, and clipping works in place.
    if len(there) == 1:
        return there[0].clone()
    return functools.reduce(torch.add, there) if there else None


def _over(optimizer: torch.optim.Muon, group: dict[str, Any], matrix: Tensor) -> torch.optim.Muon:
    """The optimiser over one matrix, with the state of the whole."""
    one = copy.copy(optimizer)  # its state is the same dictionary
    one.param_groups = [dict(group, params=[matrix])]
    return one
