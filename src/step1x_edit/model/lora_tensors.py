"""LoRA matrices: read from any layout, moved between fused and split layers, written in any layout.

The official layers hold query, key and value (and in single-stream blocks the MLP's first half) as
one; ours are apart. A fused LoRA splits into layers with the same down matrix and the rows of the
up matrix, and such layers fuse back to the same bits. Layers that were trained apart are stacked:
their ranks follow each other, the up matrix is block-diagonal. Stacks are recognised and taken
apart again. The pipeline's loader and `checkpoints.lora_convert` call this.
"""

from __future__ import annotations

import json
import secrets
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from step1x_edit.errors import CheckpointError
from step1x_edit.model.lora_layouts import (
    ALPHA_DTYPES,
    PEFT_METADATA,
    Layer,
    LayerHeader,
    Layout,
    LoraHeader,
    TensorHeader,
    describe,
    key_names,
    layer_of,
    read_header,
)
from step1x_edit.model.tensor_writer import DTYPE_NAMES, DTYPES


@dataclass(frozen=True)
class LoraLayer:
    """The update of one linear layer: alpha / rank · up @ down.

    Attributes:
        down: Reads the layer's input.
        up: Writes the layer's output.
        alpha: Scalar in the dtype of its file; None counts as the rank.
    """

    down: Float[Tensor, "rank in_features"]
    up: Float[Tensor, "out_features rank"]
    alpha: Tensor | None

    @property
    def rank(self) -> int:
        """Columns of `up`, rows of `down`."""
        return self.down.shape[0]

    @property
    def scale(self) -> Fraction:
        """Alpha over rank, without rounding."""
        return Fraction(1 if self.alpha is None else self.alpha.item()) / (
            1 if self.alpha is None else self.rank
        )


@dataclass(frozen=True)
class Lora:
    """A LoRA in memory.

    Attributes:
        label: What to call it in messages.
        layout: Whose names `layers` has: ours in "peft", else the official ones.
        layers: Layer name without prefix → update.
        metadata: The strings of the file's header, apart from what `layers` says.
    """

    label: str
    layout: Layout
    layers: dict[str, LoraLayer]
    metadata: dict[str, str]


def read_lora(source: str | Path | Mapping[str, Tensor]) -> tuple[LoraHeader, Lora]:
    """Read a LoRA.

    Args:
        source: A safetensors file of any layout, or its tensors.

    Returns:
        What `describe` says of it, and the matrices in the file's own dtype and layout.

    Raises:
        CheckpointError: Not a LoRA of this model, a damaged file, or a value that is not finite.
    """
    if isinstance(source, Mapping):
        label = "state dict"
        header = describe(label, {key: _header_of(key, t) for key, t in source.items()}, {})
        layers = {name: _layer(label, found, source) for name, found in header.layers.items()}
    else:
        label, header = str(source), read_header(source)
        with safe_open(source, framework="pt") as file:
            layers = {
                name: _layer(
                    label, found, {key: file.get_tensor(key) for key in (found.down, found.up)}
                )
                for name, found in header.layers.items()
            }
    ours = (PEFT_METADATA, ALPHA_DTYPES) if header.layout == "peft" else ()
    metadata = {key: value for key, value in header.metadata.items() if key not in ours}
    return header, Lora(label, header.layout, layers, metadata)


def change_layout(lora: Lora, layout: Layout) -> Lora:
    """The same update under the names of another layout.

    Raises:
        CheckpointError: Layers that were trained apart have scales that one fused layer cannot
            hold without rounding.
    """
    layers: dict[str, LoraLayer] = {}
    if lora.layout != "peft" and layout == "peft":
        for name, update in lora.layers.items():
            layers |= _split(_known(name, lora.layout), update)
    elif lora.layout == "peft" and layout != "peft":
        groups: dict[Layer, dict[str, LoraLayer]] = {}
        for name, update in lora.layers.items():
            groups.setdefault(_known(name, "peft"), {})[name] = update
        for layer, parts in groups.items():
            layers[layer.official] = _fuse(lora.label, layer, parts)
    else:
        layers = lora.layers
    return replace(lora, layout=layout, layers=layers)


def write_lora(lora: Lora, path: Path) -> None:
    """Write a LoRA in its own layout; the file appears under its name only when it is whole.

    Raises:
        OSError: The place cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    for name, update in lora.layers.items():
        down, up, alpha = key_names(name, lora.layout)
        # Clones: the format refuses tensors that share memory, as those of a split layer do.
        tensors |= {down: update.down.clone(), up: update.up.contiguous()}
        if update.alpha is not None and lora.layout != "peft":
            tensors[alpha] = update.alpha
    metadata = dict(lora.metadata)
    if lora.layout == "peft":
        config = {f"transformer.{key}": value for key, value in peft_config(lora).items()}
        metadata |= {PEFT_METADATA: json.dumps(config), ALPHA_DTYPES: _alpha_dtypes(lora)}
    partial = path.with_name(f".{path.stem[:40]}.{secrets.token_hex(4)}.partial")
    try:
        partial.write_bytes(save(tensors, metadata or None))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def peft_config(lora: Lora) -> dict[str, Any]:
    """Arguments of PEFT's `LoraConfig` for a LoRA in the layout "peft".

    Rank and alpha of most layers stand for all, with patterns for the others.
    """
    ranks = {name: update.rank for name, update in lora.layers.items()}
    alphas = {name: _plain(update.scale * update.rank) for name, update in lora.layers.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "r": rank,
        "lora_alpha": alpha,
        # The caret keeps "proj_out" from naming every block's layer of that name, too.
        "rank_pattern": {f"^{name}": value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {f"^{name}": value for name, value in alphas.items() if value != alpha},
        "target_modules": sorted(lora.layers),
    }


def _plain(number: Fraction) -> int | float:
    return int(number) if number.denominator == 1 else float(number)


def _header_of(key: str, tensor: Tensor) -> TensorHeader:
    value = None
    if key.endswith(".alpha"):
        if tensor.numel() != 1:
            raise CheckpointError(f"state dict: {key} has {tensor.numel()} numbers instead of one")
        value = tensor.item()
    return TensorHeader(DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype)), (*tensor.shape,), value)


def _layer(label: str, found: LayerHeader, tensors: Mapping[str, Tensor]) -> LoraLayer:
    down, up = tensors[found.down], tensors[found.up]
    for key, matrix in ((found.down, down), (found.up, up)):
        if not matrix.is_floating_point():
            raise CheckpointError(f"{label}: {key} is {matrix.dtype}; only floats can be used")
        if not matrix.float().isfinite().all():
            raise CheckpointError(
                f"{label}: {key} holds values that are NaN or infinite; the file is damaged"
            )
    alpha = None
    if found.alpha is not None and found.alpha_dtype is not None:
        alpha = torch.tensor(found.alpha, dtype=DTYPES[found.alpha_dtype])
    return LoraLayer(down, up, alpha)


def _known(name: str, layout: Layout) -> Layer:
    layer = layer_of(name, layout)
    assert layer is not None, name  # `describe` has looked
    return layer


def _split(layer: Layer, update: LoraLayer) -> dict[str, LoraLayer]:
    """An official layer's update as updates of ours."""
    if layer.halves_swapped:
        update = _swap_halves(update)
    if len(layer.ours) == 1:
        return {layer.ours[0]: update}
    apart = _unstack(layer, update)
    if apart and _same(_stack(layer, apart), update):
        return apart
    rows = update.up.split(layer.rows(update.down.shape[1]))
    return {name: replace(update, up=up) for name, up in zip(layer.ours, rows, strict=True)}


def _fuse(label: str, layer: Layer, parts: Mapping[str, LoraLayer]) -> LoraLayer:
    """Updates of our layers as one of the official layer."""
    if len(layer.ours) == 1:
        update = parts[layer.ours[0]]
        return _swap_halves(update) if layer.halves_swapped else update
    first, *others = parts.values()
    if len(parts) == len(layer.ours) and all(_same_but_up(first, other) for other in others):
        return replace(first, up=torch.cat([parts[name].up for name in layer.ours]))
    if any(other.down.shape[1] != first.down.shape[1] for other in others):
        raise CheckpointError(f"{label}: parts of {layer.official} read inputs of several widths")
    stacked = _stack(layer, parts)
    if stacked is None:
        scales = ", ".join(f"{name} {float(part.scale):g}" for name, part in parts.items())
        raise CheckpointError(
            f"{label}: {layer.official} cannot hold its parts without rounding, their alpha / rank "
            f"differ ({scales}); keep the PEFT layout"
        )
    return stacked


def _stack(layer: Layer, parts: Mapping[str, LoraLayer]) -> LoraLayer | None:
    """Updates one below the other; None where one alpha cannot say all their scales exactly."""
    updates = [parts[name] for name in layer.ours if name in parts]
    dtype = updates[0].up.dtype
    for update in updates:
        dtype = torch.promote_types(dtype, torch.promote_types(update.up.dtype, update.down.dtype))
    rank, scale = sum(update.rank for update in updates), updates[0].scale
    like = next((update.alpha for update in updates if update.alpha is not None), None)
    alpha = _alpha(scale * rank, like)
    heights = layer.rows(updates[0].down.shape[1])
    up = torch.zeros(sum(heights), rank, dtype=dtype)
    row = column = 0
    for name, height in zip(layer.ours, heights, strict=True):
        part = parts.get(name)
        if part is not None:
            scaled = _scaled(part.up.to(dtype), part.scale, scale)
            if scaled is None or (alpha is None and like is not None):
                return None
            up[row : row + height, column : column + part.rank] = scaled
            column += part.rank
        row += height
    return LoraLayer(torch.cat([update.down.to(dtype) for update in updates]), up, alpha)


def _scaled(up: Tensor, scale: Fraction, common: Fraction) -> Tensor | None:
    """An up matrix times `scale / common`; None where that rounds."""
    if scale == common:
        return up
    if not scale or not common:
        return None
    factor = scale / common
    # Powers of two move the exponent alone.
    if factor < 0 or any(n & (n - 1) for n in (factor.numerator, factor.denominator)):
        return None
    scaled = up * float(factor)
    return scaled if torch.equal(scaled / float(factor), up) else None


def _unstack(layer: Layer, update: LoraLayer) -> dict[str, LoraLayer] | None:
    """The updates that a block-diagonal one was stacked from; None where it is not of that form."""
    pieces = update.up.split(layer.rows(update.down.shape[1]))
    used = torch.stack([(piece != 0).any(0) for piece in pieces])  # (parts, rank)
    if not (used.sum(0) == 1).all():
        return None
    owner = used.int().argmax(0)  # (rank,)
    if not torch.equal(owner, owner.sort().values):
        return None
    apart = {}
    for index, (name, piece) in enumerate(zip(layer.ours, pieces, strict=True)):
        own = owner == index
        if own.any():
            alpha = None
            if update.alpha is not None:
                alpha = _alpha(update.scale * int(own.sum()), update.alpha)
                if alpha is None:
                    return None
            apart[name] = LoraLayer(update.down[own], piece[:, own], alpha)
    return apart


def _alpha(value: Fraction, like: Tensor | None) -> Tensor | None:
    """An alpha in the dtype of another; None where there is none, or where it would be rounded."""
    if like is None:
        return None
    alpha = torch.tensor(float(value), dtype=torch.float64).to(like.dtype)
    return alpha if Fraction(alpha.item()) == value else None


def _swap_halves(update: LoraLayer) -> LoraLayer:
    return replace(update, up=torch.cat(update.up.chunk(2)[::-1]))


def _same_but_up(one: LoraLayer, other: LoraLayer) -> bool:
    return (
        one.up.dtype == other.up.dtype
        and _same_tensor(one.down, other.down)
        and _same_tensor(one.alpha, other.alpha)
    )


def _same(one: LoraLayer | None, other: LoraLayer) -> bool:
    return one is not None and _same_but_up(one, other) and _same_tensor(one.up, other.up)


def _same_tensor(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    # Bits, so that -0.0 differs from 0.0.
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
    )


def _alpha_dtypes(lora: Lora) -> str:
    names = {
        name: None if update.alpha is None else DTYPE_NAMES[update.alpha.dtype]
        for name, update in lora.layers.items()
    }
    common = Counter(names.values()).most_common(1)[0][0]
    return json.dumps({"": common} | {n: kind for n, kind in names.items() if kind != common})
