"""What the tests of `runtime` share: models that run as asked, and a picture by them."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from step1x_edit.checkpoints.resolve import look
from step1x_edit.model.instruction_config import read_instruction
from step1x_edit.request import RuntimeConfig
from step1x_edit.runtime.apply import Loaded, load_pipeline
from step1x_edit.runtime.precision import (
    Precision,
    block_linears,
    empty_stored,
    replace_module,
    store,
)


def load(folder: Path, **settings: Any) -> Loaded:
    return load_pipeline(look(folder), read_instruction(folder), RuntimeConfig.checked(**settings))


def picture_of(pipeline: Any, **settings: Any) -> np.ndarray:
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    return pipeline(
        Image.fromarray(pixels),
        "make it red",
        generator=torch.Generator().manual_seed(0),
        output_type="np",
        **settings,
    ).images[0]


def store_linears(model: nn.Module, precision: Precision) -> None:
    """Store the weights of a model's blocks in few bits, in place, as `NetworkLoader` does."""
    for name, linear in list(block_linears(model)):
        made = empty_stored(linear, precision, linear.weight.dtype)
        bits, scale = store(linear.weight.detach(), precision)
        made.weight = nn.Parameter(bits, requires_grad=False)
        made.weight_scale = nn.Parameter(scale.to(linear.weight.dtype), requires_grad=False)
        made.bias = linear.bias
        replace_module(model, name, made.train(linear.training))
