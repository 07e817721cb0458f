"""`step1x doctor --train`: what training a LoRA takes with each setting, and which to use here."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from step1x_edit.apps import checks
from step1x_edit.apps.columns import columns, megabytes
from step1x_edit.apps.fitting import BESIDE
from step1x_edit.errors import InvalidRequest
from step1x_edit.request import RuntimeConfig
from step1x_edit.runtime.apply import choose_device, choose_dtype, free_memory
from step1x_edit.runtime.blueprint import blueprint
from step1x_edit.runtime.memory import Estimate
from step1x_edit.training.config import LoraRun, Optimizer, load, load_official
from step1x_edit.training.memory import estimate

PREFERENCE = (
    ("auto", "none"),
    ("int8", "none"),
    ("auto", "block"),
    ("int8", "block"),
    ("int4", "none"),
    ("int4", "block"),
    ("auto", "disk"),
    ("int8", "disk"),
    ("int4", "disk"),
)
"""Weights and offload, the first that fits is best: eight bits before weights that wait, which take
time in every step, and waiting before four bits, which the LoRA would learn to make up for."""


def read_run(config: Path | None, model: str | None, size_level_px: int | None) -> LoraRun:
    """The run that is asked about.

    Args:
        config: As of `step1x train`; None: a LoRA of the default settings.
        model: Instead of the file's.
        size_level_px: Instead of the data's.

    Raises:
        InvalidRequest: The file cannot be used, or trains no LoRA.
    """
    if config is None:
        data = {"datasets": [{"kind": "folder", "folder": "any"}]}
        given = {} if model is None else {"model": model}
        run = LoraRun.model_validate({"kind": "lora", "folder": "any", "data": data, **given})
    elif config.suffix == ".toml":
        run = load_official(config, model=model, folder=Path("any"))
    else:
        run = load(config, model=model)
    if not isinstance(run, LoraRun):
        raise InvalidRequest(
            f"{config} is a run of kind {run.kind}: doctor --train tells of LoRA runs (kind: lora)"
        )
    if size_level_px is not None:
        run = run.model_copy(update={"data": run.data.at(size_level_px)})
    return run


def memory_lines(
    run: LoraRun,
    runtime: RuntimeConfig,
    on_progress: Callable[[int, int], None] = lambda *_: None,
) -> list[str]:
    """The table of settings, and a sentence that recommends one.

    Args:
        run: From `read_run`; a released model need not be here.
        runtime: Its device and dtype count, instead of the run's; "cuda" need not be here.
        on_progress: Called with the parts done and the parts in all.

    Raises:
        InvalidRequest: The model or a layer is unknown, or the device.
        CheckpointError: The model's files are not what they should be.
    """
    plan = blueprint(run.model, checks.check_model(run.model))
    name = run.device if runtime.device == "auto" else runtime.device
    elsewhere = name.startswith("cuda") and not torch.cuda.is_available()
    device = torch.device("cuda") if elsewhere else choose_device(name)
    dtype = choose_dtype(run.dtype if runtime.dtype == "auto" else runtime.dtype, device)
    kind = "cuda" if device.type == "cuda" else "cpu"
    found = estimate(plan, run, dtype=dtype, kind=kind, on_progress=on_progress)
    size_level_px, batch_size = run.data.heaviest
    where = "on the GPU" if kind == "cuda" else "in main memory"
    return [
        f"{run.model}, a LoRA of rank {run.rank}, batches of {batch_size} at size level "
        f"{size_level_px}, {str(dtype).removeprefix('torch.')}: the most {where}",
        *columns(_table(found, with_main_memory=kind == "cuda")),
        "",
        f"A process takes about {megabytes(int(BESIDE))} besides. Pictures and instructions are "
        "read before the first step, by networks that are gone by then.",
        "There is no GPU here to recommend a setting for."
        if elsewhere
        else recommend(found, run, device),
    ]


def _table(
    found: Mapping[Optimizer, Sequence[Estimate]], *, with_main_memory: bool
) -> list[tuple[str, ...]]:
    head = ("weights", "offload", "peak", "while", "with adamw8bit", "main memory")
    rows = [
        (
            plain.weights,
            plain.offload,
            megabytes(plain.peak),
            plain.stage,
            megabytes(small.peak),
            megabytes(plain.main_memory) if plain.main_memory else "",
        )
        for plain, small in zip(found["adamw"], found["adamw8bit"], strict=True)
    ]
    last = None if with_main_memory else -1
    return [head[:last], *(row[:last] for row in rows)]


def recommend(
    found: Mapping[Optimizer, Sequence[Estimate]], run: LoraRun, device: torch.device
) -> str:
    """One setting for this machine, as lines of a run's YAML."""
    main = free_memory()
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else main
    here = f"{megabytes(int(free))} are free here"
    chosen = choose(found, free, main)
    if chosen is None:
        least = min(found["adamw8bit"], key=lambda each: each.peak)
        return (
            f"Nothing fits: the least is {_words(least, 'adamw8bit')} with "
            f"{megabytes(least.peak)}, and {here}: give a smaller size_level_px or rank"
        )
    best, optimizer = chosen
    return (
        f"Write {_words(best, optimizer)} in the run of {run.model}: it takes "
        f"{megabytes(best.peak)}, and {here}."
    )


def _words(each: Estimate, optimizer: Optimizer) -> str:
    return f"weights: {each.weights}, offload: {each.offload}, optimizer: {optimizer}"


def choose(
    found: Mapping[Optimizer, Sequence[Estimate]], free: float, main: float
) -> tuple[Estimate, Optimizer] | None:
    """The best setting that fits; None where none does.

    Args:
        found: From `estimate`.
        free: Bytes that are free on the device.
        main: Bytes of main memory that are free.
    """
    for setting in PREFERENCE:
        for optimizer, estimates in found.items():
            for each in estimates:
                fits = each.peak + BESIDE <= free and each.main_memory + BESIDE <= main
                if (each.weights, each.offload) == setting and fits:
                    return each, optimizer
    return None
