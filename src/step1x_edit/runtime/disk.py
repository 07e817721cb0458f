"""Blocks read from their files when they are needed, so that memory holds two of them.

`stream` hooks a model's blocks: before one runs, its weights are there, and those of the next one
are being read; after it ran, they are let go. The model itself does not change: an adapter put on
or taken off later works as on any other model, and can be trained, where gradient checkpointing
runs each block again in the backward pass. Called by `load`.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from time import perf_counter
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from step1x_edit.runtime.heap import give_back

Weights = dict[nn.Parameter, Tensor]
"""Parameter of a model → what it holds while it is needed."""
SAMPLED = 4096
"""Values of each tensor that a network is recognised by."""
_FINGERPRINT = "fingerprint_of_waiting_weights"
Read = Callable[[nn.Module], Weights]
"""Reads all parameters of a block from the files; runs on another thread."""


@dataclass
class StreamTimes:
    """Seconds since the start, summed over all reads."""

    reading: float = 0.0
    """Spent by the reader, beside the computing."""
    waiting: float = 0.0
    """Spent by the model, doing nothing."""


class BlockStream:
    """The hooks on a row of blocks that run one after the other.

    Args:
        blocks: In the order in which they run. Their parameters take no memory yet: see
            `empty_parameter`.
        read: Gives a block's weights.
        reader: One thread; streams of one pipeline may share it.
        times: Is added to.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        read: Read,
        reader: Executor,
        times: StreamTimes,
    ) -> None:
        self.blocks = list(blocks)
        self.times = times
        self._read = read
        self._reader = reader
        self._ahead: tuple[int, Future[Weights]] | None = None
        self._held: list[tuple[nn.Parameter, Tensor]] = []
        self._hooks = []
        for index, block in enumerate(self.blocks):
            self._hooks += [
                block.register_forward_pre_hook(self._before(index)),
                block.register_forward_hook(self._after, always_call=True),
            ]

    def remove(self) -> None:
        """Take the hooks off and leave all weights in memory."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for block in self.blocks:
            for parameter, weight in self._read(block).items():
                parameter.data = weight

    def _before(self, index: int) -> Callable[..., None]:
        def load(*_: Any) -> None:
            self._release()  # of a block that an error left behind
            started = perf_counter()
            weights = self._take(index)
            self.times.waiting += perf_counter() - started
            following = self._following(index)
            if following is not None:
                self._ahead = (following, self._reader.submit(self._timed_read, following))
            for parameter, weight in weights.items():
                self._held.append((parameter, parameter.data))
                parameter.data = weight

        return load

    def _following(self, index: int) -> int | None:
        """The block that will run next: in a backward pass the rows are run from their ends."""
        if _in_backward():
            return index - 1 if index else None
        if index + 1 < len(self.blocks):
            return index + 1
        return index if torch.is_grad_enabled() else None

    def _after(self, *_: Any) -> None:
        # A block that was run again is differentiated next. What that needs may be the parameters
        # themselves, so that they stay until another block comes.
        if not _in_backward():
            self._release()

    def _release(self) -> None:
        if not self._held:
            return
        for parameter, empty in self._held:
            parameter.data = empty
        self._held.clear()
        give_back()

    def _take(self, index: int) -> Weights:
        """What was read ahead, if it is this block; blocks may be skipped or start over."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == index:
            return ahead[1].result()
        return self._reader.submit(self._timed_read, index).result()

    def _timed_read(self, index: int) -> Weights:
        started = perf_counter()
        try:
            return self._read(self.blocks[index])
        finally:
            self.times.reading += perf_counter() - started


def _in_backward() -> bool:
    """Whether autograd is at work in this thread, as torch's own checkpointing asks."""
    return torch._C._current_graph_task_id() >= 0


class RowsOnDisk(nn.Embedding):
    """An embedding that reads the rows that it is asked for, and keeps none.

    Args:
        like: The embedding that it replaces, which may be on the meta device.
        read_row: Gives the row of one id, (width,), on the CPU.
        weight: Takes the place of the weight; see `empty_parameter`.
    """

    def __init__(
        self, like: nn.Embedding, read_row: Callable[[int], Tensor], weight: nn.Parameter
    ) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = like.num_embeddings, like.embedding_dim
        self.padding_idx, self.max_norm, self.norm_type = like.padding_idx, None, 2.0
        self.scale_grad_by_freq = self.sparse = False
        self.weight = weight
        self._read_row = read_row

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """As of `nn.Embedding`."""
        ids, places = input.unique(return_inverse=True)
        rows = torch.stack([self._read_row(row) for row in cast("list[int]", ids.tolist())])
        return functional.embedding(places, rows.to(self.weight.device))


def recognise_by(model: nn.Module, fingerprint: Callable[[], str]) -> None:
    """Say what a model is recognised by whose weights are not in its parameters.

    Args:
        model: Gets an attribute; see `fingerprint_of`.
        fingerprint: Gives a hash that changes with the weights; called when it is asked for.
    """
    setattr(model, _FINGERPRINT, fingerprint)


def sample_of(tensor: Tensor) -> bytes:
    """Some thousand evenly spaced values of a tensor."""
    flat = tensor.detach().flatten()
    sample = flat[:: max(1, flat.numel() // SAMPLED)].contiguous().cpu()
    return sample.view(torch.uint8).numpy().tobytes()


def fingerprint_of(model: nn.Module) -> str:
    """What stands for the weights that are not in a model's parameters; nothing if all are."""
    return getattr(model, _FINGERPRINT, str)()


def empty_parameter(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """A parameter of a shape and a device that takes the memory of one number.

    Not on the meta device, where libraries would look for the model's device and find none.
    """
    return nn.Parameter(torch.zeros((), dtype=dtype, device=device).expand(*shape), False)
