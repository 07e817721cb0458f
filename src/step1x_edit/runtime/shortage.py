"""Out of memory while a model loads or edits: said in one line that names what takes less.

Called by `Editor`.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from step1x_edit.errors import OutOfMemory, is_shortage
from step1x_edit.request import RuntimeConfig
from step1x_edit.runtime.apply import OFFLOADS, choose_device


@contextmanager
def named(runtime: RuntimeConfig, size_level_px: int | None = None) -> Iterator[None]:
    """Name the next smaller setting where what is done inside runs out of memory.

    Args:
        runtime: What it runs with.
        size_level_px: Of the edit that runs; None while a model loads.

    Raises:
        OutOfMemory: The system or the GPU has no more.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_shortage(error):
            raise
        kind = choose_device(runtime.device).type
        ways = next_smaller(runtime, has_own_memory=kind == "cuda")
        if size_level_px is not None:
            ways = [*ways, f"a --size-level below {size_level_px}"]
        raise OutOfMemory(
            f"out of memory on {kind} with --weights {runtime.weights} --offload "
            f"{runtime.offload}: give {' or '.join(ways) or 'it a machine with more'} "
            "(`step1x doctor --model …` tells what each setting takes)"
        ) from error


def next_smaller(runtime: RuntimeConfig, *, has_own_memory: bool) -> list[str]:
    """The setting that takes less memory at the least cost, as options; none where all are used up.

    Fewer bits cost least time, then what waits in main memory, then what is read again and again.

    Args:
        runtime: What is not enough.
        has_own_memory: Of the device, so that weights can wait in main memory.
    """
    offloads = OFFLOADS["cuda" if has_own_memory else "cpu"]
    waits = runtime.offload if runtime.offload in offloads else "none"
    further = offloads[offloads.index(waits) + 1 :]
    if runtime.weights == "auto":
        return ["--weights int8"]
    if further:
        return [f"--offload {further[0]}"]
    if not has_own_memory and runtime.dtype in ("auto", "float32"):
        return ["--dtype bfloat16"]
    return [] if runtime.weights == "int4" else ["--weights int4"]
