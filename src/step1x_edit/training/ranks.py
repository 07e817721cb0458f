"""One run on several processes, as torchrun starts them: who they are, and what they say together.

Each process (rank) computes its rows of every batch and keeps its part of what is trained; the
first one alone writes files. A process that runs by itself is the first of one, for which
everything here does nothing. Called by the doors, `loop`, `tuning` and `feature_batches`.
"""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from step1x_edit.errors import InvalidRequest, Step1XEditError
from step1x_edit.model.transformer import Step1XEditTransformer2DModel
from step1x_edit.runtime.precision import blocks

Value = TypeVar("Value")

TIMEOUT = timedelta(hours=1)
"""Longest wait for a process that lives, within a step. One that has ended is noticed at once."""
PATIENCE = timedelta(days=7)
"""While one does what takes as long as there are data: checks them, fills the cache, saves."""
FAILED = 1
_ENDED = (
    "ended by the launcher, which was told to or has seen another process end: the same command "
    "goes on"
)
_CPU = torch.device("cpu")


@contextmanager
def joined() -> Iterator[None]:
    """Belong to the run that torchrun has started this process for, if it has.

    What goes wrong anywhere is said by the process that it happens to first; the others end.

    Raises:
        Step1XEditError: Another process has ended.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "RANK" not in os.environ:
        yield
        return
    on_gpus = torch.cuda.is_available()
    if on_gpus:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    store, number, count = next(dist.rendezvous("env://"))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpus else "gloo",
        store=store,
        rank=number,
        world_size=count,
        timeout=TIMEOUT,
    )
    try:
        with _ended_by_sigterm():
            yield
    except (Exception, KeyboardInterrupt) as error:
        if not _speaks_first(store):
            raise SystemExit(FAILED) from error
        if _is_lost(error):
            raise Step1XEditError(
                "another process of this run has ended: the same command goes on from the last "
                "checkpoint"
            ) from error
        raise
    dist.destroy_process_group()


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Where there is nothing to save, SIGTERM ends what is done here.

    Whatever it interrupts may make an error of its own out of that: an import that fails, say.

    Raises:
        Step1XEditError: SIGTERM came.
    """
    came = False

    def end(*_: object) -> None:
        nonlocal came
        came = True
        raise Step1XEditError(_ENDED)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        # The launcher tells those that are left to end, which is what they do.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if came:
            raise Step1XEditError(_ENDED) from error
        raise
    signal.signal(signal.SIGTERM, before)


def _speaks_first(store: dist.Store) -> bool:
    try:
        return store.add("complained", 1) == 1
    except RuntimeError:  # the launcher, which keeps it, is gone
        return True


def _is_lost(error: BaseException) -> bool:
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error)
    )


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this process writes the files."""
    return rank() == 0


def own_rows(count: int) -> tuple[slice, float]:
    """This process's rows of a batch of `count`, and the part of the batch that they are.

    Where the rows are fewer than the processes, those that have none stand in with the first row,
    which then counts for nothing: all have to compute together.
    """
    size = world_size()
    start, stop = (number * count // size for number in (rank(), rank() + 1))
    return (slice(start, stop), (stop - start) / count) if stop > start else (slice(0, 1), 0.0)


def summed(value: float) -> float:
    """The sum of a number over the processes."""
    return _together(value, dist.ReduceOp.SUM)


def highest(value: float) -> float:
    """The highest of a number over the processes, which all wait for each other."""
    return _together(value, dist.ReduceOp.MAX)


def _together(value: float, operation: Any) -> float:
    if world_size() == 1:
        return value
    shared = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(shared, operation)
    return shared.item()


def by_first(action: Callable[[], Value]) -> Value:
    """What `action` gives in the first process, in all of them.

    Raises:
        OSError: As in the first process.
        Step1XEditError: As in the first process.
    """
    if world_size() == 1:
        return action()
    outcome: list[Any] = [None]
    if is_first():
        try:
            outcome = [action()]
        except (OSError, Step1XEditError) as error:
            outcome = [error]
    dist.broadcast_object_list(outcome, src=0, group=_patient_group(), device=_CPU)
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]


def wait_for_all() -> None:
    """Go on when all processes are here, however long one takes."""
    if world_size() > 1:
        dist.all_reduce(torch.zeros(()), group=_patient_group())


@cache
def _patient_group() -> Any:
    """All processes once more, which make this together where they first need it."""
    return dist.new_group(timeout=PATIENCE, backend="gloo")


def refuse_several(what: str, instead: str) -> None:
    """Refuse what is made for one process.

    Raises:
        InvalidRequest: There are several.
    """
    if world_size() > 1:
        raise InvalidRequest(f"{what} in one process, not {world_size()}: {instead}")


def spread(transformer: nn.Module, device: torch.device) -> None:
    """Leave each process its part of every parameter; a block's are whole while it runs (FSDP).

    Args:
        transformer: The same in each process.
        device: Where it runs.
    """
    if world_size() == 1:
        return
    mesh = init_device_mesh(device.type, (world_size(),))
    for _, block in list(blocks(transformer)):
        fully_shard(block, mesh=mesh)
    # By default what is around the blocks would stay whole after a sample, and parts not fit it.
    fully_shard(transformer, mesh=mesh, reshard_after_forward=True)


def whole(tensor: Tensor) -> Tensor:
    """A tensor with the parts of all processes, which call this together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(state: Any) -> Any:
    """A nest of dicts and lists with its tensors whole, in the memory of the first process alone.

    The others, which call this together, get None in place of those that are spread.
    """
    if isinstance(state, dict):
        return {name: gathered(value) for name, value in state.items()}
    if isinstance(state, list):
        return [gathered(value) for value in state]
    if isinstance(state, DTensor):
        full = whole(state)
        return full.cpu() if is_first() else None
    return state


def collected(transformer: Step1XEditTransformer2DModel) -> Step1XEditTransformer2DModel:
    """A transformer that was spread, whole in the first process; the others keep their parts."""
    if world_size() == 1:
        return transformer
    state = gathered(transformer.state_dict())
    if not is_first():
        return transformer
    with torch.device("meta"):
        model: Any = Step1XEditTransformer2DModel.from_config(transformer.config)
    model.load_state_dict(state, assign=True)
    return model


def part_like(full: Tensor, parameter: Tensor) -> Tensor:
    """The part of a whole tensor that this process has of a parameter of its shape, beside it."""
    if not isinstance(parameter, DTensor):
        return full.to(parameter.device)
    rows = -(-len(full) // world_size())
    part = full[rows * rank() : rows * (rank() + 1)]  # as `torch.chunk` cuts, and FSDP with it
    return DTensor.from_local(
        part.to(parameter.device, copy=True),
        parameter.device_mesh,
        parameter.placements,
        shape=full.shape,
        stride=full.stride(),
    )


def parts_like(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimiser's whole state as this process has it of its parameters."""
    if world_size() == 1:
        return state
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    own = {
        number: {
            name: part_like(value, parameters[number])
            if isinstance(value, Tensor) and value.shape == parameters[number].shape
            else value
            for name, value in values.items()
        }
        for number, values in state["state"].items()
    }
    return {**state, "state": own}
