"""Sizes of a model, told by the shapes in its official file.

What shapes cannot tell (how a head's channels are shared among the position axes, how many heads
the connector has) comes from the caller, from the file's metadata, or, at the released width, from
the release. Called by the loaders of official files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from step1x_edit.errors import CheckpointError
from step1x_edit.model.config import RELEASED_TRANSFORMER, RELEASED_VAE
from step1x_edit.model.official_layout import read_shapes
from step1x_edit.model.official_names import first_names

Shapes = Mapping[str, tuple[int, ...]]


def transformer_sizes(path: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of `Step1XEditTransformer2DModel` for an official file.

    Args:
        path: Official safetensors file.
        given: Sizes that the caller knows; they win.

    Raises:
        CheckpointError: Not such a file, or it leaves a size open that nobody gave.
    """
    shapes, metadata = read_shapes(path)

    def size(name: str, axis: int) -> int:
        return _size(path, shapes, name, axis)

    width = size("img_in.weight", 0)
    head_dim = size(_any_query_norm(path, shapes), 0)
    sizes = {
        "in_channels": size("img_in.weight", 1),
        "out_channels": size("final_layer.linear.weight", 0),
        "num_layers": _count(shapes, "double_blocks."),
        "num_single_layers": _count(shapes, "single_blocks."),
        "attention_head_dim": head_dim,
        "num_attention_heads": width // head_dim,
        "joint_attention_dim": size("txt_in.weight", 1),
        "timestep_in_dim": size("time_in.in_layer.weight", 1),
        "vector_in_dim": size("vector_in.in_layer.weight", 1),
        "connector_in_channels": size("connector.S.input_embedder.weight", 1),
        "connector_hidden_size": size("connector.S.input_embedder.weight", 0),
        "connector_depth": _count(shapes, "connector.S.individual_token_refiner.blocks."),
        "connector_scale_factor": "connector.scale_factor" in shapes,
    }
    if sizes["out_channels"] == sizes["in_channels"]:
        sizes["out_channels"] = None  # as the published config.json writes it
    return sizes | _untold(path, sizes, metadata, given) | dict(given)


def _untold(
    path: Path, sizes: Mapping[str, Any], metadata: Mapping[str, str], given: Mapping[str, Any]
) -> dict[str, Any]:
    """What no shape tells: from the metadata, or from the release where the width is its width."""
    sources = (
        ("axes_dims_rope", "attention_head_dim", "transformer", "axes_dim"),
        ("connector_heads_num", "connector_hidden_size", "connector", "heads_num"),
    )
    untold = {}
    for key, width_key, section, official_key in sources:
        noted = json.loads(metadata.get(section, "{}")).get(official_key)
        if key in given:
            continue
        if noted is not None:
            untold[key] = noted
        elif sizes[width_key] == RELEASED_TRANSFORMER[width_key]:
            untold[key] = RELEASED_TRANSFORMER[key]
        else:
            raise CheckpointError(
                f"{path}: {width_key} is {sizes[width_key]}, not the release's "
                f"{RELEASED_TRANSFORMER[width_key]}, and the file does not tell {key}; give {key}="
            )
    return untold


def transformer_metadata(config: Mapping[str, Any], version: str) -> dict[str, str]:
    """Header of an official transformer file, with which it can be read without further words."""
    transformer = {
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"] or config["in_channels"],
        "vec_in_dim": config["vector_in_dim"],
        "context_in_dim": config["joint_attention_dim"],
        "hidden_size": config["num_attention_heads"] * config["attention_head_dim"],
        "num_heads": config["num_attention_heads"],
        "depth": config["num_layers"],
        "depth_single_blocks": config["num_single_layers"],
        "axes_dim": list(config["axes_dims_rope"]),
    }
    connector = {
        "in_channels": config["connector_in_channels"],
        "hidden_size": config["connector_hidden_size"],
        "heads_num": config["connector_heads_num"],
        "depth": config["connector_depth"],
    }
    return {
        "version": version,
        "transformer": json.dumps(transformer),
        "connector": json.dumps(connector),
    }


def vae_sizes(path: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of diffusers' `AutoencoderKL` for an official autoencoder file.

    Args:
        path: Official safetensors file.
        given: Sizes that the caller knows; they win.

    Raises:
        CheckpointError: Not such a file.
    """
    shapes, _ = read_shapes(path)
    levels = _count(shapes, "encoder.down.")
    sizes = {
        "in_channels": _size(path, shapes, "encoder.conv_in.weight", 1),
        "out_channels": _size(path, shapes, "decoder.conv_out.weight", 0),
        "latent_channels": _size(path, shapes, "decoder.conv_in.weight", 1),
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": tuple(
            _size(path, shapes, f"encoder.down.{level}.block.0.conv1.weight", 0)
            for level in range(levels)
        ),
        "layers_per_block": _count(shapes, "encoder.down.0.block."),
    }
    return RELEASED_VAE | sizes | dict(given)


def _size(path: Path, shapes: Shapes, name: str, axis: int) -> int:
    shape = shapes.get(name, ())
    if len(shape) <= axis:
        raise CheckpointError(
            f"{path}: not the official file, its tensor {name} is missing or flat; "
            f"it holds {first_names(list(shapes))}"
        )
    return shape[axis]


def _any_query_norm(path: Path, shapes: Shapes) -> str:
    for name in shapes:
        if name.endswith("norm.query_norm.scale"):
            return name
    raise CheckpointError(
        f"{path}: not the official file, it has no block with a query_norm.scale; "
        f"it holds {first_names(list(shapes))}"
    )


def _count(shapes: Shapes, stem: str) -> int:
    """Number of numbered children of `stem`, by the highest number."""
    numbers = re.findall(rf"^{re.escape(stem)}(\d+)\.", "\n".join(shapes), flags=re.MULTILINE)
    return max((int(number) + 1 for number in numbers), default=0)
