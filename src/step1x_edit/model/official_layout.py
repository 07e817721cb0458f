"""The official single-file layout, read and written strictly.

`official_names` says under which names, and cut in which pieces, the release keeps the
transformer's tensors; `vae_rows` does it for the autoencoder. `read_into` and `write_file` move
tensors through such rows one at a time, so that a model is never in memory twice. Called by
`Step1XEditTransformer2DModel.from_official` and `to_official` and by `checkpoints.official`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from step1x_edit.errors import CheckpointError
from step1x_edit.model.official_names import HALVES_SWAPPED, TRANSFORMER_TABLE, first_names
from step1x_edit.model.tensor_writer import DTYPE_NAMES, write_tensors


@dataclass(frozen=True)
class Row:
    """One official tensor and the parameters of ours that it holds.

    Attributes:
        official: Name in the official file.
        ours: Names of our parameters, in order along the first axis.
        rule: What happens besides joining: nothing, the two halves swap, or the official tensor is
            a 1x1 convolution's where ours is a linear layer's.
    """

    official: str
    ours: tuple[str, ...]
    rule: Literal["join", "swap_halves", "convolution"] = "join"

    def split(self, tensor: Tensor, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
        """Cut an official tensor into views of our parameters."""
        if self.rule == "convolution":
            tensor = tensor.flatten(1)
        elif self.rule == "swap_halves":
            tensor = torch.cat(tensor.chunk(2)[::-1])
        pieces = tensor.split([shapes[name][0] for name in self.ours])
        return dict(zip(self.ours, pieces, strict=True))

    def join(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Put our parameters together as the official tensor."""
        tensor = torch.cat([parameters[name].detach() for name in self.ours])
        if self.rule == "convolution":
            tensor = tensor[..., None, None]
        elif self.rule == "swap_halves":
            tensor = torch.cat(tensor.chunk(2)[::-1])
        return tensor

    def official_shape(self, shapes: Mapping[str, torch.Size]) -> tuple[int, ...]:
        """Shape of the official tensor for these shapes of ours."""
        rows = sum(shapes[name][0] for name in self.ours)
        tail = (1, 1) if self.rule == "convolution" else ()
        return (rows, *shapes[self.ours[0]][1:], *tail)


def transformer_rows(parameter_names: Iterable[str]) -> list[Row]:
    """The table's rows for a transformer with these parameter names.

    The connector's names are the same in both layouts.
    """
    names = set(parameter_names)
    rows = []
    for official, *ours in TRANSFORMER_TABLE:
        indices = _block_indices(names, ours[0]) if "#" in official else [""]
        for index in indices:
            for kind in ("weight", "bias") if official.endswith("*") else ("",):
                name, *targets = (
                    pattern.replace("#", index).replace("*", kind) for pattern in (official, *ours)
                )
                swapped = official.startswith(HALVES_SWAPPED)
                rows.append(Row(name, tuple(targets), "swap_halves" if swapped else "join"))
    connector = sorted(name for name in names if name.startswith("connector."))
    return rows + [Row(name, (name,)) for name in connector]


def _block_indices(names: set[str], pattern: str) -> list[str]:
    stem = pattern.partition("#")[0]
    return sorted({name[len(stem) :].partition(".")[0] for name in names if name.startswith(stem)})


def vae_rows(parameter_names: Iterable[str], num_levels: int) -> list[Row]:
    """Rows for diffusers' `AutoencoderKL` under the names of latent diffusion's autoencoder.

    Args:
        parameter_names: Names in the diffusers model.
        num_levels: Number of resolutions; the decoder counts them the other way round.
    """
    substitutions = (
        (r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}"),
        (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
        (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
        (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
        (r"down_blocks\.(\d)\.resnets", r"down.\1.block"),
        (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
        (r"up_blocks\.(\d)\.resnets", lambda m: f"up.{num_levels - 1 - int(m[1])}.block"),
        (r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{num_levels - 1 - int(m[1])}.upsample"),
        (r"conv_shortcut", "nin_shortcut"),
        (r"conv_norm_out", "norm_out"),
    )
    rows = []
    for name in parameter_names:
        official = name
        for pattern, replacement in substitutions:
            official = re.sub(pattern, replacement, official)
        linear = re.search(r"attentions\.0\.to_.*weight$", name)
        rows.append(Row(official, (name,), "convolution" if linear else "join"))
    return rows


def read_shapes(path: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Names and shapes of a safetensors file's tensors, and its metadata.

    Raises:
        CheckpointError: No such file, or not a whole safetensors file.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; give the path of a .safetensors file")
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            return shapes, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: not a whole safetensors file ({_one_line(error)}); download it again"
        ) from error


def read_into(model: nn.Module, rows: list[Row], path: Path, dtype: torch.dtype | None) -> None:
    """Fill a model that is on the meta device, tensor by tensor.

    Args:
        model: Every parameter on meta; afterwards every one on the CPU.
        rows: Which official tensor holds which parameters; covers all of them.
        path: Official safetensors file.
        dtype: Convert to it; None keeps each tensor's own.

    Raises:
        CheckpointError: The file has a tensor too few, too many or of another shape.
    """
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    _check(path, read_shapes(path)[0], {row.official: row.official_shape(shapes) for row in rows})
    with safe_open(path, framework="pt") as file:
        for row in rows:
            for name, piece in row.split(file.get_tensor(row.official), shapes).items():
                # The piece is a view of the mapped file; its own copy lets the mapping go.
                own = piece.to(dtype or piece.dtype, copy=True)
                module_name, _, leaf = name.rpartition(".")
                old = model.get_parameter(name)
                parameter = nn.Parameter(own, requires_grad=old.requires_grad)
                setattr(model.get_submodule(module_name), leaf, parameter)


def _check(
    path: Path, found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]
) -> None:
    complaints = [
        (f"{len(names)} {what}", names)
        for what, names in (
            ("missing", [name for name in wanted if name not in found]),
            ("unexpected", [name for name in found if name not in wanted]),
            (
                "of another shape",
                [
                    f"{name} {list(found[name])} instead of {list(shape)}"
                    for name, shape in wanted.items()
                    if name in found and found[name] != shape
                ],
            ),
        )
        if names
    ]
    if complaints:
        parts = [f"{what}: {first_names(names)}" for what, names in complaints]
        raise CheckpointError(f"{path}: tensors do not fit the model; {'; '.join(parts)}")


def write_file(
    model: nn.Module, rows: list[Row], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a model's parameters as an official safetensors file, one tensor at a time.

    The file appears under its name only when it is whole.

    Args:
        model: Its parameter names are exactly those of `rows`.
        rows: Which parameters make which official tensor.
        path: Target; replaced if it exists.
        metadata: Strings for the file's header.

    Raises:
        CheckpointError: The model has parameters besides those of the architecture (an adapter, a
            quantised layer), or a dtype without a name in the format.
    """
    parameters = dict(model.state_dict())
    extra = sorted(set(parameters) ^ {name for row in rows for name in row.ours})
    if extra:
        raise CheckpointError(
            f"{path}: cannot be written, the model is not the plain one: {first_names(extra)}; "
            "merge or remove adapters first"
        )
    shapes = {name: tensor.shape for name, tensor in parameters.items()}
    entries = {}
    for row in rows:
        dtypes = {parameters[name].dtype for name in row.ours}
        if len(dtypes) > 1 or not dtypes <= DTYPE_NAMES.keys():
            raise CheckpointError(
                f"{path}: {row.official} cannot be written as {sorted(map(str, dtypes))}"
            )
        entries[row.official] = (dtypes.pop(), row.official_shape(shapes))
    by_name = {row.official: row for row in rows}
    write_tensors(path, entries, lambda name: by_name[name].join(parameters), metadata)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
