"""The memory that edits would take, beside the released system's own figures, and a check of them.

    python perf/memory.py [--out perf/results/memory.md] [--only table|check] [--size-level 256]
                          [--ways fp8:none ...]

The table is simulated (`step1x_edit.runtime.memory`) for a GPU: full-size v1.1, guidance on. The
check edits with a model of random weights and middle size, each time in a process of its own, and
sets the peak of resident memory while it edits, as the kernel counts it (VmHWM), against the
simulation for a CPU. What was resident before the model was loaded is subtracted; an edit with the
mini before that makes the libraries load all of themselves. It exits with 1 where a figure is above
the released system's, or the check is off by more than a tenth.
"""

import argparse
import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from full_size import EXAMPLE, write_model
from machine import describe
from step1x_edit import Editor, EditRequest, RuntimeConfig
from step1x_edit.checkpoints.resolve import look
from step1x_edit.runtime.blueprint import blueprint
from step1x_edit.runtime.heap import give_back
from step1x_edit.runtime.memory import Estimate, estimate

SIZES = (512, 768, 1024)
PUBLISHED = {
    "bf16": (("auto", "none"), (42.5, 46.5, 49.8)),
    "fp8": (("fp8", "none"), (31.0, 31.5, 34.0)),
    "bf16 + offload": (("auto", "model"), (25.9, 27.3, 29.1)),
    "fp8 + offload": (("fp8", "model"), (18.0, 18.0, 18.0)),
}
"""Row of the release's table (README of its repository, one H800) → our setting of that kind, and
its GB at each of `SIZES`; it says 786 where it means 768."""
GOAL_GB = 12.0
CHECKED = ("auto:none", "fp8:none", "auto:block", "auto:disk")
TOLERANCE = 0.1


def simulate() -> dict[int, list[Estimate]]:
    """Size level → estimates of v1.1 on a GPU."""
    plan = blueprint("v1.1", None)
    return {
        size: estimate(
            plan, size_level_px=size, guidance=6.0, dtype=torch.bfloat16, kind="cuda"
        )
        for size in SIZES
    }  # fmt: skip


def table(found: dict[int, list[Estimate]]) -> tuple[list[str], list[str]]:
    """The Markdown of the simulated peaks, and what is above its limit."""
    settings = [(each.weights, each.offload) for each in found[SIZES[0]] if not each.step_cache]
    peaks = {
        (each.weights, each.offload, each.step_cache, size): each.peak / 1e9
        for size, estimates in found.items()
        for each in estimates
    }
    released = {setting: (name, figures) for name, (setting, figures) in PUBLISHED.items()}
    sizes = " / ".join(map(str, SIZES))
    lines = [
        f"| weights | offload | GB at {sizes} | with TeaCache | released system |",
        "|---|---|---|---|---|",
    ]
    above = []
    for setting in settings:
        plain, cached = (
            [peaks[(*setting, step_cache, size)] for size in SIZES] for step_cache in (False, True)
        )
        theirs = ""
        if setting in released:
            name, figures = released[setting]
            theirs = f"{name}: {' / '.join(f'{figure:g}' for figure in figures)}"
            above += [
                f"{setting} at {size}: {ours:.1f} GB, released {figure:g}"
                for size, ours, figure in zip(SIZES, plain, figures, strict=True)
                if ours > figure
            ]
        cells = [*setting, *(" / ".join(f"{v:.1f}" for v in row) for row in (plain, cached))]
        lines.append(f"| {' | '.join([*cells, theirs])} |")
    least = min(each.peak for each in found[SIZES[-1]]) / 1e9
    if least > GOAL_GB:
        above.append(f"least at {SIZES[-1]}: {least:.1f} GB, the goal is {GOAL_GB:g}")
    return lines, above


def resident(kind: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith(kind))


def edit(folder: Path, weights: str, offload: str, size_level: int) -> dict[str, int]:
    """Load and edit in this process; bytes beside what is resident before the model loads."""
    with Image.open(EXAMPLE) as opened:
        picture = opened.convert("RGB").resize((size_level, size_level))
    request = EditRequest.checked(
        image=picture, prompt="make it sepia", seed=0, num_steps=1, guidance=-1,
        size_level_px=size_level, keep="off",
    )  # fmt: skip
    runtime = RuntimeConfig.checked(dtype="bfloat16", weights=weights, offload=offload)
    Editor.load("mini", runtime).edit(request)  # libraries load the rest of themselves
    gc.collect()
    give_back()
    before = resident("VmRSS")
    forget = Path("/proc/self/clear_refs")
    forget.write_text("5", encoding="ascii")  # start VmHWM anew
    editor = Editor.load(str(folder), runtime)
    loading = resident("VmHWM") - before
    forget.write_text("5", encoding="ascii")
    editor.edit(request)
    return {"peak": resident("VmHWM") - before, "measured while loading": loading}


def check(folder: Path, ways: Sequence[str], size_level: int) -> tuple[list[str], list[str]]:
    """The Markdown of simulated and measured peaks, and what is off by too much."""
    write_model(folder, "middle", in_fp8=False)
    plan = blueprint(str(folder), look(folder))
    found = estimate(
        plan, size_level_px=size_level, guidance=-1, dtype=torch.bfloat16, kind="cpu",
        weights=weights_of(ways),
    )  # fmt: skip
    foretold = {
        f"{each.weights}:{each.offload}": max(
            size for stage, size in each.stages.items() if stage != "loading"
        )
        for each in found
        if not each.step_cache
    }
    return beside_measured(__file__, folder, ways, size_level, foretold)


def weights_of(ways: Sequence[str]) -> list[str]:
    """The weights that the settings ``weights:offload`` have."""
    return list(dict.fromkeys(way.partition(":")[0] for way in ways))


def beside_measured(
    script: str, folder: Path, ways: Sequence[str], size_level: int, foretold: dict[str, int]
) -> tuple[list[str], list[str]]:
    """The Markdown of simulated and measured peaks, and what is off by too much.

    Args:
        script: Called with ``--measure FOLDER WEIGHTS OFFLOAD``, it measures a setting in a process
            of its own; its last line is JSON: bytes at the ``peak``, and other figures.
        folder: The model's.
        ways: The settings, as ``weights:offload``.
        size_level: Of the pictures.
        foretold: Simulated bytes of each setting.
    """
    lines, off = [], []
    for way in ways:
        command = [sys.executable, script, "--measure", str(folder), *way.split(":")]
        done = subprocess.run(
            [*command, "--size-level", str(size_level)],
            stdout=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
        others = json.loads(done.stdout.splitlines()[-1])
        peak = others.pop("peak")
        if not lines:
            names = ["weights", "offload", "simulated GB", "measured GB", "ratio", *others]
            lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
        ratio = foretold[way] / peak
        figures = (
            foretold[way] / 1e9,
            peak / 1e9,
            ratio,
            *(size / 1e9 for size in others.values()),
        )
        cells = [*way.split(":"), *(f"{figure:.3f}" for figure in figures)]
        lines.append(f"| {' | '.join(cells)} |")
        print(lines[-1], file=sys.stderr)
        if abs(ratio - 1) > TOLERANCE:
            off.append(f"{way}: simulated over measured is {ratio:.3f}")
    return lines, off


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", choices=("table", "check"))
    parser.add_argument("--size-level", type=int, default=256, help="of the check")
    parser.add_argument(
        "--ways", nargs="+", choices=CHECKED, default=[*CHECKED], help="of the check"
    )
    parser.add_argument("--measure", nargs=3, metavar=("FOLDER", "WEIGHTS", "OFFLOAD"))
    arguments = parser.parse_args(words)
    if arguments.measure:
        folder, weights, offload = arguments.measure
        print(json.dumps(edit(Path(folder), weights, offload, arguments.size_level)))
        return
    machine: dict[str, Any] = describe()
    lines = ["# Memory of an edit", "", "; ".join(f"{k} {v}" for k, v in machine.items()), ""]
    wrong = []
    if arguments.only != "check":
        made, above = table(simulate())
        wrong += above
        lines += ["## Simulated: v1.1, full size, guidance on, on a GPU", "", *made, ""]
    if arguments.only != "table":
        with tempfile.TemporaryDirectory() as folder:
            made, off = check(Path(folder), arguments.ways, arguments.size_level)
        wrong += off
        title = "## Simulated against measured: middle size, bfloat16, no guidance, on this CPU"
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
