"""The most memory that tensors take while something runs, real or fake ones. Called by `memory`."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar
from weakref import finalize

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

Made = TypeVar("Made")


class PeakTracker(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make, while they are alive.

    torch's own ``MemTracker`` hooks parameters for their gradients, which weights in few bits do
    not have.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen = WeakIdKeyDictionary()

    def know(self, tensor: Tensor) -> None:
        """Do not count a tensor that was there before."""
        self._seen[tensor.untyped_storage()] = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation and count what it made."""
        made = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._count, made)
        return made

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._seen:
            return
        self._seen[storage] = True
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        finalize(storage, self._let_go, storage.nbytes())

    def _let_go(self, num_bytes: int) -> None:
        self.now -= num_bytes


def peak_of(run: Callable[[], Made], *resident: nn.Module) -> tuple[Made, int]:
    """What `run` gives, and the peak of the tensors that it makes.

    Args:
        run: Is called.
        resident: Networks whose weights are there before, and not counted.
    """
    tracker = PeakTracker()
    for model in resident:
        for tensor in (*model.parameters(), *model.buffers()):
            tracker.know(tensor)
    with torch.no_grad(), tracker:
        made = run()
    return made, tracker.peak
