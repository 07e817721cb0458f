"""Precision × offload × LoRA, from every kind of file: where weights wait changes no bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from step1x_edit import Editor, RuntimeConfig
from step1x_edit.runtime.convert import convert

from ..lora_files import write_random_lora
from ..tiny_model import REFERENCE, write_tiny_model, write_tiny_official
from .loading import picture_of

SETTINGS = {"num_inference_steps": 1, "guidance_scale": 2.0, "size_level": 64}
WEIGHTS = {"one": 1.0, "two": -0.5}


def official(folder, dtype):
    """The reference's official file, all of it cast."""
    file = write_tiny_official(folder)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    save_file({name: t.to(dtype) for name, t in load_file(file).items()}, file, metadata)
    return file


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Kind of file → model and its two LoRAs."""
    place = tmp_path_factory.mktemp("models")
    folder = write_tiny_model(place / "bf16", dtype=torch.bfloat16)
    convert(folder, place / "fp8", "fp8")
    sizes = {"folder": folder / "transformer", "official": REFERENCE / "diffusers_v1p1/transformer"}
    loras = {
        kind: [
            write_random_lora(place / f"{kind}{seed}.safetensors", transformer, seed=seed)
            for seed in range(len(WEIGHTS))
        ]
        for kind, transformer in sizes.items()
    }
    return {
        "bf16 folder": (folder, loras["folder"]),
        "fp8 folder": (place / "fp8", loras["folder"]),
        "bf16 file": (official(place / "release", torch.bfloat16), loras["official"]),
        "fp8 file": (official(place / "cast", torch.float8_e4m3fn), loras["official"]),
    }


@pytest.mark.parametrize("weights", ["auto", "fp8", "int8", "int4"])
@pytest.mark.parametrize("kind", ["bf16 folder", "fp8 folder", "bf16 file", "fp8 file"])
def test_offload_changes_no_bit(models, kind, weights):
    model, loras = models[kind]
    wanted = None
    for offload in ("none", "model", "block", "disk"):
        runtime = RuntimeConfig.checked(weights=weights, offload=offload)
        pipeline = Editor.load(str(model), runtime).pipeline
        bare = picture_of(pipeline, **SETTINGS)
        for name, file in zip(WEIGHTS, loras, strict=True):
            pipeline.load_lora_weights(file, adapter_name=name)
        pipeline.set_adapters([*WEIGHTS], [*WEIGHTS.values()])
        changed = picture_of(pipeline, **SETTINGS)
        if wanted is None:
            wanted = bare, changed
            assert not np.array_equal(bare, changed)
        assert np.array_equal(bare, wanted[0]), offload
        assert np.array_equal(changed, wanted[1]), f"{offload}, with LoRAs"
    pipeline.unload_lora_weights()
    assert np.array_equal(picture_of(pipeline, **SETTINGS), bare)
