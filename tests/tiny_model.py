"""A complete model folder of tiny random networks, for whatever runs with the released weights.

Laid out as the published folders are (`model_index.json` names the transformer under "diffusers"
and the processor as transformers' own), with settings that edit in a fraction of a second.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler

from step1x_edit.model.config import tiny_transformer, tiny_vae
from step1x_edit.model.transformer import Step1XEditTransformer2DModel

from .model.qwen import byte_processor, tiny_config, tiny_mllm

COMPONENTS = {
    "processor": ["transformers", "Qwen2_5_VLProcessor"],
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
    "transformer": ["diffusers", "Step1XEditTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
SETTINGS = {"num_inference_steps": 2, "guidance_scale": 2.0, "size_level": 64}
MAX_TOKENS = 96


def write_tiny_model(
    folder: Path, *, version: str = "v1.1", dtype: torch.dtype = torch.float32, seed: int = 0
) -> Path:
    """Write the folder, 1 MB, and give it back; the same seed gives the same weights."""
    processor = byte_processor()
    mllm = tiny_mllm(processor, seed)
    sizes = tiny_transformer(
        connector_in_channels=mllm.config.text_config.hidden_size,
        connector_scale_factor=version == "v1.0",
    )
    modules = {
        "text_encoder": mllm,
        "transformer": Step1XEditTransformer2DModel(**sizes),
        "vae": AutoencoderKL(**tiny_vae()),
    }
    for name, module in modules.items():
        module.to(dtype).save_pretrained(folder / name)
    processor.save_pretrained(folder / "processor")
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.save_pretrained(folder / "scheduler")
    tiny_config(max_length=MAX_TOKENS).save(folder)
    index = {"_class_name": "Step1XEditPipeline", **COMPONENTS, **SETTINGS}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    return folder


REFERENCE = Path(__file__).parent / "reference"
OFFICIAL_NAMES = {
    "v1.0": "step1x-edit-i1258.safetensors",
    "v1.1": "step1x-edit-v1p1-official.safetensors",
}


def write_tiny_official(
    folder: Path, *, version: str = "v1.1", described: bool = True, seed: int = 0
) -> Path:
    """A folder as the release keeps its single files; gives back the transformer file's path.

    Transformer and autoencoder are the reference tensors. Released folders are not `described`:
    they have no ``instruction.json``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    transformer = folder / OFFICIAL_NAMES[version]
    name = f"transformer_{version.replace('.', 'p')}_official.safetensors"
    shutil.copy(REFERENCE / name, transformer)
    shutil.copy(REFERENCE / "vae_official.safetensors", folder / "vae.safetensors")
    processor = byte_processor()
    mllm = tiny_mllm(processor, seed)
    mllm.save_pretrained(folder / "Qwen2.5-VL-7B-Instruct")
    processor.save_pretrained(folder / "Qwen2.5-VL-7B-Instruct")
    if described:
        tiny_config(max_length=MAX_TOKENS).save(folder)
    return transformer
