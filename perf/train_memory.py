"""The memory that LoRA training would take, beside the released trainer's figures, and a check.

    python perf/train_memory.py [--out perf/results/train_memory.md] [--only table|check]
                                [--sizes 512 768 1024] [--size-level 64] [--ways fp8:none ...]

The table is simulated (`step1x_edit.training.memory`) for a GPU: full-size v1.1, rank 64, batch 1.
The check trains a LoRA over a model of random weights and middle size, each setting in a process of
its own: two steps over random features, whose peak of resident memory, as the kernel counts it
(VmHWM), is set against the simulation for a CPU. What was resident before the model was loaded is
subtracted; steps over the mini before that make the libraries load all of themselves. It exits with
1 where a figure is above the released trainer's or the goal, or the check is off by more than a
tenth.
"""

import argparse
import gc
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from full_size import write_model
from machine import describe
from memory import beside_measured, resident, weights_of
from step1x_edit.checkpoints.resolve import look
from step1x_edit.runtime.blueprint import blueprint
from step1x_edit.runtime.heap import give_back
from step1x_edit.training.config import LoraRun
from step1x_edit.training.memory import estimate, random_batch
from step1x_edit.training.optimizers import build_optimizer
from step1x_edit.training.tuning import Tuning

SIZES = (512, 768, 1024)
PUBLISHED = {
    "auto": ("bf16", {512: 29.7, 768: 31.6, 1024: 33.8}),
    "fp8": ("fp8", {512: 19.8, 768: 21.3, 1024: 23.6}),
}
"""Our weights → the released trainer's name for them (README of its repository, its optimiser being
adamw8bit), and its GB at a size level; it says 786 where it means 768."""
GOAL_GB = 12.0
"""At the largest size, with blocks that wait elsewhere."""
WAITING = ("block", "disk")
CHECKED = ("auto:none", "fp8:none", "auto:disk", "fp8:disk")
NUM_STEPS = 2
"""The optimiser's state is made in the first."""


def lora_run(model: str, size_level: int, **settings: Any) -> LoraRun:
    """A LoRA of rank 64 over pictures of a size, one at a time."""
    data = {"datasets": [{"kind": "folder", "folder": "any"}], "size_level_px": size_level}
    return LoraRun.model_validate(
        {"kind": "lora", "folder": "any", "model": model, "data": data, **settings}
    )


def table(sizes: Sequence[int]) -> tuple[list[str], list[str]]:
    """The Markdown of the simulated peaks of a step, and what is above its limit."""
    plan = blueprint("v1.1", None)
    peaks: dict[tuple[str, str], dict[str, list[float]]] = {}
    for size in sizes:
        found = estimate(
            plan, lora_run("v1.1", size), dtype=torch.bfloat16, kind="cuda", weights=[*PUBLISHED]
        )
        for optimizer, estimates in found.items():
            for each in estimates:
                row = peaks.setdefault((each.weights, each.offload), {})
                row.setdefault(optimizer, []).append(each.stages["steps"] / 1e9)
                if optimizer == "adamw8bit":
                    before = [peak for stage, peak in each.stages.items() if stage != "steps"]
                    row.setdefault("before", []).append(max(before) / 1e9)
    head = " / ".join(map(str, sizes))
    lines = [
        f"| weights | offload | adamw8bit, GB at {head} | adamw | released | reading data |",
        "|---|---|---|---|---|---|",
    ]
    above = []
    for (weights, offload), row in peaks.items():
        name, figures = PUBLISHED[weights]
        theirs = [figures[size] for size in sizes] if offload == "none" else []
        ours = row["adamw8bit"]
        above += [
            f"{weights} at {size}: {mine:.1f} GB, released {limit:g}"
            for size, mine, limit in zip(sizes, ours, theirs, strict=False)
            if mine >= limit
        ]
        cells = [
            weights, offload, _figures(ours), _figures(row["adamw"]),
            f"{name}: {_figures(theirs)}" if theirs else "", _figures(row["before"]),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    least = min(row["adamw8bit"][-1] for (_, waits), row in peaks.items() if waits in WAITING)
    if least > GOAL_GB:
        above.append(f"least at {sizes[-1]}: {least:.1f} GB, the goal is {GOAL_GB:g}")
    return lines, above


def _figures(values: Sequence[float]) -> str:
    return " / ".join(f"{value:.1f}" for value in values)


def steps(run: LoraRun) -> None:
    """Load, let the frozen networks go, and train on random features."""
    tuning = Tuning(run)
    tuning.dismiss_frozen_networks()
    tuning.bring_transformer()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # start VmHWM anew
    parameters = [p for p in tuning.trained.parameters() if p.requires_grad]
    optimizer = build_optimizer(run.optimizer, parameters, run.lr, run.weight_decay)
    for step in range(NUM_STEPS):
        tuning.loss_of(random_batch(tuning), step).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def measure(folder: Path, weights: str, offload: str, size_level: int) -> int:
    """The peak of steps in this process, beside what is resident before the model loads."""
    settings = {"weights": weights, "offload": offload, "dtype": "bfloat16"}
    steps(lora_run("mini", 64, **settings))  # libraries load the rest of themselves
    gc.collect()
    give_back()
    before = resident("VmRSS")
    steps(lora_run(str(folder), size_level, **settings))
    return resident("VmHWM") - before


def check(
    folder: Path, ways: Sequence[str], size_level: int, scale: str
) -> tuple[list[str], list[str]]:
    """The Markdown of simulated and measured peaks, and what is off by too much."""
    write_model(folder, scale, in_fp8=False)
    plan = blueprint(str(folder), look(folder))
    run = lora_run(str(folder), size_level)
    found = estimate(plan, run, dtype=torch.bfloat16, kind="cpu", weights=weights_of(ways))
    foretold = {f"{each.weights}:{each.offload}": each.stages["steps"] for each in found["adamw"]}
    return beside_measured(__file__, folder, ways, size_level, foretold)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", choices=("table", "check"))
    parser.add_argument("--sizes", type=int, nargs="+", default=[*SIZES], help="of the table")
    parser.add_argument("--size-level", type=int, default=64, help="of the check")
    parser.add_argument(
        "--ways", nargs="+", choices=CHECKED, default=[*CHECKED], help="of the check"
    )
    parser.add_argument(
        "--scale", choices=("middle", "tiny"), default="middle", help="of the check"
    )
    parser.add_argument("--measure", nargs=3, metavar=("FOLDER", "WEIGHTS", "OFFLOAD"))
    arguments = parser.parse_args(words)
    if arguments.measure:
        folder, weights, offload = arguments.measure
        peak = measure(Path(folder), weights, offload, arguments.size_level)
        print(json.dumps({"peak": peak}))
        return
    machine: dict[str, Any] = describe()
    lines = ["# Memory of training", "", "; ".join(f"{k} {v}" for k, v in machine.items()), ""]
    wrong = []
    if arguments.only != "check":
        made, above = table(arguments.sizes)
        wrong += above
        title = "## Simulated: a LoRA of rank 64 over v1.1, batch 1, on a GPU"
        lines += [title, "", *made, ""]
    if arguments.only != "table":
        with tempfile.TemporaryDirectory() as folder:
            made, off = check(Path(folder), arguments.ways, arguments.size_level, arguments.scale)
        wrong += off
        title = f"## Simulated against measured: {arguments.scale} size, bfloat16, on this CPU"
        lines += [title, "", *made, ""]
    text = "\n".join(lines)
    print(text)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text, encoding="utf-8")
    if wrong:
        raise SystemExit("; ".join(wrong))


if __name__ == "__main__":
    main()
