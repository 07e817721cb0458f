"""`step1x doctor --model`: what each setting takes with a model, and which one to use here."""

from collections.abc import Callable, Sequence

import torch

from step1x_edit.apps import checks
from step1x_edit.apps.columns import columns, megabytes
from step1x_edit.request import EditRequest, RuntimeConfig
from step1x_edit.runtime.apply import choose_device, choose_dtype, free_memory
from step1x_edit.runtime.blueprint import blueprint
from step1x_edit.runtime.memory import Estimate, estimate

BESIDE = 1e9
"""Bytes that a process takes besides its tensors: interpreter, libraries, a GPU's context."""
PREFERENCE = (
    ("auto", "none"),
    ("int8", "none"),
    ("auto", "model"),
    ("int8", "model"),
    ("int4", "none"),
    ("int4", "model"),
    ("auto", "block"),
    ("int8", "block"),
    ("int4", "block"),
    ("auto", "disk"),
    ("int8", "disk"),
    ("int4", "disk"),
)
"""Weights and offload, the first that fits is best: what costs seconds an edit before what costs
minutes, and nearer to the plain weights before what is less near. fp8 takes what int8 takes, and
comes less close."""


def memory_lines(
    model: str,
    request: EditRequest,
    runtime: RuntimeConfig,
    on_progress: Callable[[int, int], None] = lambda *_: None,
) -> list[str]:
    """The table of settings, and a sentence that recommends one.

    Args:
        model: As of ``--model``; released models need not be here.
        request: Its size level and guidance count; the model's own where it has none.
        runtime: Its device and dtype count; "cuda" need not be here.
        on_progress: Called with the parts done and the parts in all.

    Raises:
        InvalidRequest: The model is unknown, or the device.
        CheckpointError: The model's files are not what they should be.
    """
    plan = blueprint(model, checks.check_model(model))
    elsewhere = runtime.device.startswith("cuda") and not torch.cuda.is_available()
    device = torch.device("cuda") if elsewhere else choose_device(runtime.device)
    dtype = choose_dtype(runtime.dtype, device)
    size = request.size_level_px or plan.size_level_px
    guidance = plan.guidance if request.guidance is None else request.guidance
    kind = "cuda" if device.type == "cuda" else "cpu"
    found = estimate(
        plan, size_level_px=size, guidance=guidance, dtype=dtype, kind=kind,
        on_progress=on_progress,
    )  # fmt: skip
    where = "on the GPU" if kind == "cuda" else "in main memory"
    return [
        f"{model}, one edit at size level {size}, guidance {guidance:g}, "
        f"{str(dtype).removeprefix('torch.')}: the most {where}",
        *columns(_table(found, with_main_memory=kind == "cuda")),
        "",
        f"A process takes about {megabytes(int(BESIDE))} besides.",
        "There is no GPU here to recommend a setting for."
        if elsewhere
        else recommend(found, model, size, device),
    ]


def _table(found: Sequence[Estimate], *, with_main_memory: bool) -> list[tuple[str, ...]]:
    cached = {(each.weights, each.offload): each.peak for each in found if each.step_cache}
    head = ("weights", "offload", "peak", "while", "with TeaCache")
    rows = [
        (
            each.weights,
            each.offload,
            megabytes(each.peak),
            each.stage,
            megabytes(cached[each.weights, each.offload]),
            megabytes(each.main_memory) if each.main_memory else "",
        )
        for each in found
        if not each.step_cache
    ]
    last = None if with_main_memory else -1
    return [(*head, "main memory")[:last], *(row[:last] for row in rows)]


def recommend(found: Sequence[Estimate], model: str, size: int, device: torch.device) -> str:
    """One setting for this machine, as options to type."""
    main = free_memory()
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else main
    chosen = choose(found, free, main)
    here = f"{megabytes(int(free))} are free here"
    if chosen is None:
        least = min(found, key=lambda each: each.peak)
        return (
            f"Nothing fits: the least is --weights {least.weights} --offload {least.offload} with "
            f"{megabytes(least.peak)}, and {here}: give a smaller --size-level"
        )
    return (
        f"Use --model {model} --size-level {size} --weights {chosen.weights} --offload "
        f"{chosen.offload}: it takes {megabytes(chosen.peak)}, and {here}."
    )


def choose(found: Sequence[Estimate], free: float, main: float) -> Estimate | None:
    """The best setting that fits; None where none does.

    Args:
        found: From `estimate`.
        free: Bytes that are free on the device.
        main: Bytes of main memory that are free.
    """
    plain = {(each.weights, each.offload): each for each in found if not each.step_cache}
    ordered = [plain[setting] for setting in PREFERENCE if setting in plain]
    fitting = (
        each for each in ordered if each.peak + BESIDE <= free and each.main_memory + BESIDE <= main
    )
    return next(fitting, None)
