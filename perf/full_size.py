"""A full-size v1.1 with random weights in fp8, edited with little memory, computing in bfloat16.

    python perf/full_size.py [--scale tiny] [--folder DIR] [--out perf/results/full_size.json]

Writes the model (transformer 12.45 B parameters, language model 8.3 B, autoencoder) under DIR, runs
one edit of one step at 256 px for each way of offloading, in a process of its own, prints that
process's peak of resident memory, anonymous and file pages together, as the kernel counts it
(VmHWM), and removes the model. Files are read without mapping them and their pages are given back,
so that the page cache holds no second copy.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from PIL import Image
from torch import Tensor
from transformers import Qwen2_5_VLConfig

from machine import describe
from step1x_edit import Editor, EditRequest, RuntimeConfig, Step1XEditTransformer2DModel
from step1x_edit.checkpoints.catalog import MINI_FOLDER
from step1x_edit.checkpoints.resolve import look
from step1x_edit.model.config import (
    RELEASED_TEXT,
    RELEASED_TRANSFORMER,
    RELEASED_VAE,
    RELEASED_VISION,
    tiny_transformer,
    tiny_vae,
)
from step1x_edit.model.instruction_config import InstructionConfig, read_instruction
from step1x_edit.model.processor import PictureProcessor
from step1x_edit.model.small_mllm import small_mllm_config
from step1x_edit.model.tensor_writer import write_tensors
from step1x_edit.runtime.apply import load_pipeline
from step1x_edit.runtime.convert import WEIGHT_FILES, file_tensors
from step1x_edit.runtime.load import empty_text_encoder, empty_transformer
from step1x_edit.runtime.precision import FP8, block_linears, empty_stored, replace_module

GIB = 2**30
GOAL_GIB = 6.0
"""Of the blocks streamed from the disk."""
OFFLOADS = {
    "disk": "all blocks read from the fp8 files when they run",
    "block": "bf16 from fp8: the transformer's blocks in memory as fp8, widened when they run; the "
    "language model's read from the files",
}
"""Way of offloading → what it does on a CPU."""
EXAMPLE = Path(__file__).parent.parent / "examples" / "coffee.jpg"
POOL_SIZE = (1 << 22) + 3  # odd, so that rows are not alike
FP8_SCALE = 2.0**-12


def text_encoder_config(scale: str) -> Qwen2_5_VLConfig:
    """Sizes of the language model; the special tokens are those of the mini's tokenizer."""
    tokenizer: Any = PictureProcessor.from_pretrained(MINI_FOLDER / "processor").tokenizer
    small = small_mllm_config(tokenizer, hidden_size=32, vision_hidden_size=16)
    if scale == "tiny":
        return small
    if scale == "middle":
        return small_mllm_config(
            tokenizer, hidden_size=1024, num_layers=8, num_heads=8,
            vision_hidden_size=512, vision_depth=4, vision_heads=8,
        )  # fmt: skip
    ids = {key: value for key, value in small.to_dict().items() if key.endswith("_token_id")}
    text = {**RELEASED_TEXT, "pad_token_id": tokenizer.pad_token_id}
    return Qwen2_5_VLConfig(
        text_config=text, vision_config=RELEASED_VISION, tie_word_embeddings=False, **ids
    )


def transformer_config(scale: str, text_width: int) -> dict[str, Any]:
    """Sizes of the transformer; `text_width` is that of the language model."""
    if scale == "tiny":
        return tiny_transformer(connector_in_channels=text_width)
    if scale == "middle":
        narrower = {
            "num_layers": 4, "num_single_layers": 8, "num_attention_heads": 12,
            "joint_attention_dim": 1536, "connector_hidden_size": 1536, "connector_heads_num": 12,
        }  # fmt: skip
        return RELEASED_TRANSFORMER | narrower | {"connector_in_channels": text_width}
    return RELEASED_TRANSFORMER


def vae_config(scale: str) -> dict[str, Any]:
    """Sizes of the autoencoder."""
    sizes = {"tiny": tiny_vae(), "middle": tiny_vae(block_out_channels=(32, 64, 128, 128))}
    return sizes.get(scale, RELEASED_VAE)


def write_configs(folder: Path, scale: str) -> None:
    """Everything of the model folder but the networks' weights."""
    encoder: Any = text_encoder_config(scale)
    encoder.save_pretrained(folder / "text_encoder")
    sizes = transformer_config(scale, encoder.text_config.hidden_size)
    with torch.device("meta"):
        Step1XEditTransformer2DModel(**sizes).save_config(folder / "transformer")
    AutoencoderKL(**vae_config(scale)).save_pretrained(folder / "vae")
    shutil.copytree(MINI_FOLDER / "processor", folder / "processor")
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.save_pretrained(folder / "scheduler")
    # As long as the release's instructions are, with words of ours in the place of its prefix.
    InstructionConfig(
        prefix="red " * 217, num_dropped_tokens=217, max_length=640,
        min_pixels=256 * 28 * 28, max_pixels=324 * 28 * 28,
    ).save(folder)  # fmt: skip
    index = json.loads((MINI_FOLDER / "model_index.json").read_text(encoding="utf-8"))
    index["vae"] = ["diffusers", "AutoencoderKL"]
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")


def empty_network(folder: Path, component: str, *, in_fp8: bool = True) -> dict[str, Tensor]:
    """The tensors of a network, without their values; bfloat16 where they are not in fp8."""
    make: Callable[[Path], Any] = (
        empty_transformer if component == "transformer" else empty_text_encoder
    )
    model: Any = make(folder / component)
    model.to(torch.bfloat16)
    for name, linear in list(block_linears(model)) if in_fp8 else ():
        replace_module(model, name, empty_stored(linear, "fp8", torch.bfloat16))
    return file_tensors(model)


class RandomWeights:
    """Weights of a plausible size: layers pass on about what they get."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(POOL_SIZE, generator=generator)
        self._pools = {torch.bfloat16: (noise * 0.02).bfloat16(), FP8: (noise * 64).to(FP8)}

    def __call__(self, name: str, dtype: torch.dtype, shape: torch.Size) -> Tensor:
        """One tensor."""
        if name.endswith("_scale"):
            return torch.full(shape, FP8_SCALE, dtype=dtype)
        if len(shape) == 1 and "norm" in name and name.endswith("weight"):
            return torch.ones(shape, dtype=dtype)
        pool = self._pools[dtype].view(torch.uint8)
        count = shape.numel() * dtype.itemsize
        return pool.repeat(-(-count // len(pool)))[:count].view(dtype).reshape(shape)


def write_model(folder: Path, scale: str, *, in_fp8: bool = True) -> dict[str, Any]:
    """Write the model folder.

    Args:
        folder: Exists and is empty.
        scale: "full", "middle" or "tiny".
        in_fp8: The linear layers of the blocks are; otherwise all is bfloat16.

    Raises:
        SystemExit: There is no room for it.
    """
    started = time.perf_counter()
    write_configs(folder, scale)
    networks = {
        component: empty_network(folder, component, in_fp8=in_fp8) for component in WEIGHT_FILES
    }
    needed = sum(t.numel() * t.itemsize for network in networks.values() for t in network.values())
    free = shutil.disk_usage(folder).free
    if free < needed + GIB:
        raise SystemExit(
            f"{folder} has {free / GIB:.1f} GiB free, {needed / GIB + 1:.1f} are needed: give "
            "another --folder"
        )
    weights = RandomWeights()
    parameters = {}
    for component, tensors in networks.items():
        entries = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
        write_tensors(
            folder / component / WEIGHT_FILES[component],
            entries,
            lambda name, tensors=tensors: weights(name, tensors[name].dtype, tensors[name].shape),
        )
        parameters[component] = sum(
            tensor.numel() for name, tensor in tensors.items() if not name.endswith("_scale")
        )
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return {
        "parameters": parameters,
        "disk_gib": size / GIB,
        "writing_s": time.perf_counter() - started,
    }


def edit(folder: Path, offload: str, size_level: int, guidance: float) -> dict[str, Any]:
    """Load and edit in this process, and say what it took."""
    started = time.perf_counter()
    runtime = RuntimeConfig.checked(dtype="bfloat16", offload=offload)
    pipeline, streams = load_pipeline(look(folder), read_instruction(folder), runtime)
    assert streams is not None
    for files in streams.files.values():
        files.keep_cached = False
    loaded = time.perf_counter()
    editor = Editor(pipeline, str(folder), "random")
    with Image.open(EXAMPLE) as picture:
        request = EditRequest.checked(
            image=picture.convert("RGB"), prompt="make it sepia", seed=0, num_steps=1,
            guidance=guidance, size_level_px=size_level, keep="off",
        )  # fmt: skip
    editor.edit(request)
    total = time.perf_counter() - loaded
    status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    memory = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in status if "kB" in line}
    return {
        "peak_resident_gib": memory["VmHWM"] / GIB,
        "resident_at_the_end_gib": {
            kind: memory[kind] / GIB for kind in ("RssAnon", "RssFile", "RssShmem")
        },
        "opening_s": loaded - started,
        "edit_s": total,
        "waiting_for_the_disk_s": streams.times.waiting,
        "computing_s": total - streams.times.waiting,
        "reading_s": streams.times.reading,
        "read_gib": sum(files.bytes_read for files in streams.files.values()) / GIB,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--scale", choices=("full", "middle", "tiny"), default="full")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--size-level", type=int, default=256)
    parser.add_argument("--guidance", type=float, default=-1.0, help="-1 is none, at half the cost")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--offload", nargs="+", choices=OFFLOADS, default=[*OFFLOADS])
    parser.add_argument("--edit", type=Path, help="only edit with this model, in this process")
    arguments = parser.parse_args()
    if arguments.edit:
        how = (arguments.offload[0], arguments.size_level, arguments.guidance)
        print(json.dumps(edit(arguments.edit, *how)))
        return
    runs: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        written = write_model(Path(folder), arguments.scale)
        command = [sys.executable, __file__, "--edit", folder]
        command += ["--size-level", str(arguments.size_level)]
        command += ["--guidance", str(arguments.guidance)]
        for offload in arguments.offload:
            done = subprocess.run(
                [*command, "--offload", offload], stdout=subprocess.PIPE, text=True, check=True
            )
            runs[offload] = {"what": OFFLOADS[offload], **json.loads(done.stdout)}
    settings = {"scale": arguments.scale, "size_level_px": arguments.size_level}
    result = {"machine": describe(), **settings, **written, "offload": runs}
    print(json.dumps(result, indent=2))
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    peak = runs["disk"]["peak_resident_gib"] if "disk" in runs else 0
    if peak > GOAL_GIB:
        raise SystemExit(f"peak from the disk {peak:.2f} GiB is above {GOAL_GIB:g} GiB")


if __name__ == "__main__":
    main()
