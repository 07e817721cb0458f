"""Whole-process cost of an edit with the mini model, cold and warm, against the bare imports.

    python perf/edit.py [--runs 5] [--out perf/results/edit.json]

The bare imports are those that any program on this stack pays for; the two are timed in turn, so
that a machine that slows down slows both.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

from machine import describe

BARE_IMPORTS = (
    "import torch\n"
    "from diffusers import AutoencoderKL\n"
    "from diffusers.pipelines.pipeline_utils import DiffusionPipeline\n"
    "from transformers import Qwen2_5_VLForConditionalGeneration\n"
)
INSTRUCTION = "make it black and white"
STEP1X = Path(sys.executable).parent / "step1x"


def run_process(command: list[str]) -> tuple[float, float]:
    """Wall seconds and peak resident MB of a command, which must succeed."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status) != 0:
        raise SystemExit(f"{command} failed with {os.waitstatus_to_exitcode(status)}")
    return time.perf_counter() - started, usage.ru_maxrss / 1024


def photograph(path: Path, size: tuple[int, int]) -> Path:
    """A textured picture of `size`: noise over a gradient."""
    ramp = Image.linear_gradient("L").resize(size)
    Image.merge("RGB", [ramp, Image.effect_noise(size, 60), ramp.rotate(180)]).save(
        path, quality=92
    )
    return path


def warm_seconds(picture: Path, runs: int) -> list[float]:
    """Seconds of each edit in a process that has the model loaded, the first one left out."""
    from step1x_edit import Editor, EditRequest

    editor = Editor.load()
    seconds = []
    for _ in range(runs + 1):
        started = time.perf_counter()
        editor.edit(EditRequest.checked(image=picture, prompt=INSTRUCTION, seed=1))
        seconds.append(time.perf_counter() - started)
    return seconds[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    cold, bare = [], []
    with tempfile.TemporaryDirectory() as folder:
        picture = photograph(Path(folder) / "photograph.jpg", (2048, 1536))
        edit = [
            str(STEP1X),
            "edit",
            str(picture),
            INSTRUCTION,
            "-o",
            f"{folder}/out.png",
            "--seed",
            "1",
        ]
        for i in range(arguments.runs + 1):
            pair = run_process(edit), run_process([sys.executable, "-c", BARE_IMPORTS])
            if i:  # the first pair fills the page cache
                cold.append(pair[0])
                bare.append(pair[1])
        warm = warm_seconds(picture, arguments.runs)
    result = {
        "machine": describe(),
        "runs": arguments.runs,
        "cold_edit_s": statistics.median(s for s, _ in cold),
        "bare_imports_s": statistics.median(s for s, _ in bare),
        "cold_over_bare": statistics.median(
            c / b for (c, _), (b, _) in zip(cold, bare, strict=True)
        ),
        "warm_edit_s": statistics.median(warm),
        "cold_edit_peak_mb": statistics.median(mb for _, mb in cold),
        "bare_imports_peak_mb": statistics.median(mb for _, mb in bare),
    }
    print(json.dumps(result, indent=2))
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
