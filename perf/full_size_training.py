"""One step of LoRA training over a full-size v1.1 with random weights in fp8, in little memory.

    python perf/full_size_training.py [--scale tiny] [--folder DIR] [--size-level 256]
                                      [--out perf/results/full_size_training.json]

Writes the model as `full_size.py` does, trains a LoRA of rank 64 beside it for one step (forward,
backward, update) with its blocks read from the files, in bfloat16 and in a process of its own,
prints that process's peak of resident memory as the kernel counts it (VmHWM), and removes the
model. The step reads random features of the released shape: the language model is opened, and let
go again, but not run; `full_size.py` runs it.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from full_size import GIB, write_model
from machine import describe
from memory import resident
from step1x_edit.checkpoints.resolve import look
from step1x_edit.runtime.blueprint import blueprint
from step1x_edit.training.memory import estimate, random_batch
from step1x_edit.training.optimizers import build_optimizer
from step1x_edit.training.tuning import Tuning
from train_memory import lora_run

GOAL_GIB = 12.0


def train(folder: Path, size_level: int) -> dict[str, Any]:
    """Load and make one step in this process, and say what it took."""
    started = time.perf_counter()
    run = lora_run(str(folder), size_level, offload="disk", dtype="bfloat16")
    tuning = Tuning(run)
    tuning.dismiss_frozen_networks()
    tuning.bring_transformer()
    parameters = [p for p in tuning.trained.parameters() if p.requires_grad]
    optimizer = build_optimizer(run.optimizer, parameters, run.lr, run.weight_decay)
    before = [parameter.detach().sum().item() for parameter in parameters]
    times = {"opening_s": time.perf_counter() - started}

    started = time.perf_counter()
    loss = tuning.loss_of(random_batch(tuning), 0)
    times["forward_s"] = time.perf_counter() - started
    print(json.dumps(times), file=sys.stderr)
    started = time.perf_counter()
    loss.backward()
    times["backward_s"] = time.perf_counter() - started
    with_gradient = sum(bool(p.grad is not None and p.grad.any()) for p in parameters)
    started = time.perf_counter()
    optimizer.step()
    times["update_s"] = time.perf_counter() - started
    after = [parameter.detach().sum().item() for parameter in parameters]
    return {
        "peak_resident_gib": resident("VmHWM") / GIB,
        **times,
        "loss": loss.item(),
        "trained_numbers": sum(parameter.numel() for parameter in parameters),
        "matrices": len(parameters),
        # Down matrices have none in the first step: the up matrices are zero.
        "matrices_with_gradient": with_gradient,
        "matrices_changed": sum(a != b for a, b in zip(before, after, strict=True)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--scale", choices=("full", "middle", "tiny"), default="full")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--size-level", type=int, default=256)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--train", type=Path, help="only train beside this model, in this process")
    arguments = parser.parse_args()
    if arguments.train:
        print(json.dumps(train(arguments.train, arguments.size_level)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        written = write_model(Path(folder), arguments.scale)
        command = [sys.executable, __file__, "--train", folder]
        done = subprocess.run(
            [*command, "--size-level", str(arguments.size_level)],
            stdout=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
        plan = blueprint(folder, look(Path(folder)))
        run = lora_run(folder, arguments.size_level)
        (foretold,) = [
            each.stages["steps"] / GIB
            for each in estimate(plan, run, dtype=torch.bfloat16, kind="cpu", weights=["auto"])[
                "adamw"
            ]
            if each.offload == "disk"
        ]
    measured = json.loads(done.stdout.splitlines()[-1])
    settings = {"scale": arguments.scale, "size_level_px": arguments.size_level, "rank": 64}
    result = {
        "machine": describe(), **settings, **written,
        "simulated_gib_beside_the_process": foretold, "step": measured,
    }  # fmt: skip
    print(json.dumps(result, indent=2))
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if measured["peak_resident_gib"] > GOAL_GIB:
        raise SystemExit(f"peak {measured['peak_resident_gib']:.2f} GiB is above {GOAL_GIB:g} GiB")


if __name__ == "__main__":
    main()
