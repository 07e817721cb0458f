"""Sizes of the networks, as data: the released ones and tiny ones for tests.

Each is a dict of keyword arguments of `Step1XEditTransformer2DModel`, of diffusers' `AutoencoderKL`
or of the two halves of transformers' `Qwen2_5_VLConfig`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

RELEASED_TRANSFORMER: dict[str, Any] = {
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "timestep_in_dim": 256,
    "vector_in_dim": 768,
    "connector_in_channels": 3584,
    "connector_hidden_size": 4096,
    "connector_heads_num": 32,
    "connector_depth": 2,
    "axes_dims_rope": (16, 56, 56),
}
"""v1.1; v1.0 adds `connector_scale_factor=True`."""

RELEASED_TEXT: dict[str, Any] = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e6,
        "mrope_section": [16, 24, 24],
    },
    "bos_token_id": None,
    "eos_token_id": None,
}
"""The language half of Qwen2.5-VL-7B, which every release reads instructions with."""

RELEASED_VISION: dict[str, Any] = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "out_hidden_size": 3584,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "window_size": 112,
}
"""Its vision tower."""

RELEASED_VAE: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 16,
    "norm_num_groups": 32,
    "sample_size": 1024,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
"""FLUX.1's autoencoder, which every release uses."""

RELEASED_SAMPLING: dict[str, Any] = {
    "num_inference_steps": 28,
    "guidance_scale": 6.0,
    "size_level": 512,
    "draw_size": 1024,
    "draw_negative_prompt": "low quality, low resolution, blurry, noisy, compression artifacts, "
    "cropped, deformed body, extra limbs, extra fingers, doubled objects, caption, logo, watermark",
}
"""What the v1 releases use where a call names nothing else: size level, and side of a drawn
picture, in pixels; edits have no negative prompt."""


def own_sampling(named: Mapping[str, Any]) -> dict[str, Any]:
    """What a model uses where a call names nothing: values of the keys of `RELEASED_SAMPLING`.

    A model with a size level of its own also draws at that size, and without the release's negative
    prompt, which is for a larger vocabulary, unless it names these, too.

    Args:
        named: What its ``model_index.json`` names; other keys and None count as not named.
    """
    given = {name: named[name] for name in RELEASED_SAMPLING if named.get(name) is not None}
    drawing: dict[str, Any] = {}
    if "size_level" in given:
        drawing = {"draw_size": given["size_level"], "draw_negative_prompt": ""}
    return RELEASED_SAMPLING | drawing | given


def tiny_transformer(**changes: Any) -> dict[str, Any]:
    """Sizes of a transformer that runs in milliseconds, all different where they may differ.

    Args:
        changes: Sizes to set otherwise.
    """
    sizes = {
        "in_channels": 64,
        "num_layers": 1,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 48,
        "timestep_in_dim": 256,
        "vector_in_dim": 24,
        "connector_in_channels": 40,
        "connector_hidden_size": 48,
        "connector_heads_num": 3,
        "connector_depth": 1,
        "axes_dims_rope": (4, 6, 6),
    }
    return sizes | changes


def tiny_vae(**changes: Any) -> dict[str, Any]:
    """Sizes of an autoencoder that runs in milliseconds, with the released strides and channels.

    Args:
        changes: Sizes to set otherwise.
    """
    small = {"block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4}
    return RELEASED_VAE | small | changes
