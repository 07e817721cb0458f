"""What stored weights cost in exactness, measured on the mini against its own float32.

    python perf/precision.py [--model FOLDER] [--dtype bfloat16] [--out perf/results/precision.md]

For each precision, over the example pictures: the relative error of the velocity ‖v − v₃₂‖ / ‖v₃₂‖
at every step of an edit, both computed from the same inputs (those of the float32 edit); and the
PSNR of the edited picture against the float32 one.
"""

import argparse
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from machine import describe
from step1x_edit import Editor, RuntimeConfig

EXAMPLES = Path(__file__).parent.parent / "examples"
EDITS = (
    ("coffee.jpg", "make it black and white"),
    ("coffee.jpg", "make it sepia"),
    ("cat.jpg", "make the whole picture look like night"),
    ("cat.jpg", "add a red car on the left"),
    ("rocket.jpg", "把照片变成黑白的"),
    ("rocket.jpg", "make it warmer"),
)
PRECISIONS = ("fp8", "int8", "int4")


def run_edits(editor: Editor, calls: list[list[Any]]) -> list[torch.Tensor]:
    """The results of all edits as (3, height, width) in [0, 1].

    Args:
        editor: Model to run.
        calls: Gets the transformer's inputs and velocity at each step.
    """

    def keep(_: Any, __: Any, inputs: dict[str, Any], output: Any) -> None:
        calls.append([inputs, output[0].float()])

    hook = editor.pipeline.transformer.register_forward_hook(keep, with_kwargs=True)
    pictures = []
    for name, instruction in EDITS:
        with Image.open(EXAMPLES / name) as picture:
            output: Any = editor.pipeline(
                image=picture.convert("RGB"),
                prompt=instruction,
                generator=torch.Generator().manual_seed(0),
                output_type="pt",
            )
        pictures.append(output.images[0])
    hook.remove()
    return pictures


@torch.no_grad()
def velocity_errors(editor: Editor, calls: Sequence[Sequence[Any]]) -> list[float]:
    """‖v − v₃₂‖ / ‖v₃₂‖ of the target's tokens at the inputs of each float32 step."""
    transformer = editor.pipeline.transformer
    errors = []
    for inputs, expected in calls:
        cast = {
            name: value.to(transformer.dtype)
            if name in ("hidden_states", "encoder_hidden_states")
            else value
            for name, value in inputs.items()
        }
        velocity = transformer(**cast)[0].float()
        num_target = expected.shape[1] // 2  # the reference's tokens follow, and mean nothing
        difference = (velocity - expected)[:, :num_target]
        errors.append(float(difference.norm() / expected[:, :num_target].norm()))
    return errors


def psnr(picture: torch.Tensor, expected: torch.Tensor) -> float:
    """In dB, of pictures in [0, 1]."""
    error = float((picture - expected).square().mean())
    return math.inf if error == 0 else -10 * math.log10(error)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="mini")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    calls: list[list[Any]] = []
    expected = run_edits(Editor.load(arguments.model), calls)
    lines = [
        "| weights | velocity, mean | velocity, worst | PSNR, mean | PSNR, worst |",
        "|---|---|---|---|---|",
    ]
    for weights in PRECISIONS:
        runtime = RuntimeConfig.checked(weights=weights, dtype=arguments.dtype)
        editor = Editor.load(arguments.model, runtime)
        errors = velocity_errors(editor, calls)
        pairs = zip(run_edits(editor, []), expected, strict=True)
        decibels = [psnr(picture, wanted) for picture, wanted in pairs]
        lines.append(
            f"| {weights} | {statistics.mean(errors):.4f} | {max(errors):.4f} "
            f"| {statistics.mean(decibels):.1f} dB | {min(decibels):.1f} dB |"
        )
    about = {**describe(), "model": arguments.model, "dtype": arguments.dtype}
    text = ", ".join(f"{name} {value}" for name, value in about.items())
    table = "\n".join([text, "", *lines]) + "\n"
    print(table, end="")
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(table, encoding="utf-8")


if __name__ == "__main__":
    main()
