"""Random LoRA files for any transformer, strong enough to be seen."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open

from step1x_edit.model.lora_layouts import Layout
from step1x_edit.model.lora_tensors import Lora, LoraLayer, change_layout, write_lora

RELEASED_WIDTH = 3072


def write_random_lora(
    path: Path, transformer: Path, *, layout: Layout = "kohya", rank: int = 2, seed: int = 0
) -> Path:
    """Write a LoRA for every attention layer of a transformer folder, and give its path back."""
    draw = torch.Generator().manual_seed(seed)
    layers = {}
    with safe_open(next(transformer.glob("*.safetensors")), "np") as file:
        for name in sorted(file.keys()):
            if ".attn.to_" in name and name.endswith(".weight"):
                rows, columns = file.get_slice(name).get_shape()
                down = torch.randn(rank, columns, generator=draw) * columns**-0.5
                up = torch.randn(rows, rank, generator=draw)
                layers[name.removesuffix(".weight")] = LoraLayer(
                    down, up, torch.tensor(float(rank))
                )
    write_lora(change_layout(Lora("random", "peft", layers, {}), layout), path)
    return path
