"""LoRA files by their headers: which layout, which layers, which ranks. Without torch.

Three layouts are in use. *kohya* (the released trainer) and *comfyui* name the official layers,
where query, key and value are one layer; *peft* names ours, where they are three. What a file says
beyond these names is never guessed at: it is refused. `lora_tensors` reads the tensors themselves;
`step1x lora show` and the checks before a model is loaded need only this.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from safetensors import SafetensorError, safe_open

from step1x_edit.errors import CheckpointError
from step1x_edit.model.official_names import HALVES_SWAPPED, TRANSFORMER_TABLE, first_names

Layout = Literal["kohya", "peft", "comfyui"]

PREFIXES: dict[Layout, tuple[str, ...]] = {
    "kohya": ("lora_unet_",),
    "comfyui": ("diffusion_model.",),
    "peft": ("transformer.", "base_model.model.", ""),
}
"""What stands before a layer's name; the first is what we write."""

PEFT_METADATA = "lora_adapter_metadata"
"""Where diffusers keeps the `LoraConfig` of a file, as JSON, its keys after "transformer."."""

ALPHA_DTYPES = "step1x_edit.alpha_dtypes"
"""Where we keep what a PEFT file has no place for: the dtype of each alpha tensor, as JSON; under
"" that of all layers not named, null for none at all."""

FUSED_WIDTHS = {"proj_mlp": 4}
"""Rows of a part of a fused layer, in widths of its input, where it is not one."""

CONNECTOR_LAYERS = (
    "connector.global_proj_out",
    "connector.S.input_embedder",
    "connector.S.t_embedder.mlp.0",
    "connector.S.t_embedder.mlp.2",
    "connector.S.c_embedder.linear_1",
    "connector.S.c_embedder.linear_2",
    "connector.S.individual_token_refiner.blocks.#.self_attn_qkv",
    "connector.S.individual_token_refiner.blocks.#.self_attn_proj",
    "connector.S.individual_token_refiner.blocks.#.mlp.fc1",
    "connector.S.individual_token_refiner.blocks.#.mlp.fc2",
    "connector.S.individual_token_refiner.blocks.#.adaLN_modulation.1",
)
"""The same in both layouts."""

_KEY = re.compile(
    r"(?P<layer>.+?)\."
    r"(?:lora_(?P<part>A|B|down|up)(?:\.default)?\.weight|(?P<alpha>alpha))"
)
_INDEX = re.compile(r"(?<=blocks[._])\d+(?=[._])")
_SCALARS = {"F64": "<d", "F32": "<f", "F16": "<e", "I64": "<q", "I32": "<i"}
_FAMILY_KEYS = ("modelspec.architecture", "ss_base_model_version")


class Layer(NamedTuple):
    """A linear layer in both layouts."""

    official: str
    ours: tuple[str, ...]
    """In order along the rows of the official one."""
    halves_swapped: bool

    def rows(self, in_features: int) -> list[int]:
        """Rows of each of `ours` where there are several; all read the same input."""
        return [FUSED_WIDTHS.get(name.rpartition(".")[2], 1) * in_features for name in self.ours]


class LayerHeader(NamedTuple):
    """What a LoRA file says of one layer."""

    down: str
    """Key of the (rank, in) matrix."""
    up: str
    """Key of the (out, rank) matrix."""
    rank: int
    in_features: int
    out_features: int
    dtype: str
    alpha: float | None
    """The update is alpha / rank · up @ down; None counts as the rank."""
    alpha_dtype: str | None


class TensorHeader(NamedTuple):
    """Dtype and shape of a tensor in a file, and its value where it is an alpha."""

    dtype: str
    shape: tuple[int, ...]
    value: float | None = None


@dataclass(frozen=True)
class LoraHeader:
    """A LoRA file without its matrices.

    Attributes:
        label: What to call it in messages.
        layout: Which of the three.
        layers: Layer name, official or ours as the layout has it, without prefix → what is there.
        metadata: The strings of the file's header.
    """

    label: str
    layout: Layout
    layers: dict[str, LayerHeader]
    metadata: dict[str, str]


def _table() -> list[tuple[str, ...]]:
    linear = [row for row in TRANSFORMER_TABLE if row[0].endswith(".*")]
    rows = [tuple(name.removesuffix(".*") for name in row) for row in linear]
    return rows + [(name, name) for name in CONNECTOR_LAYERS]


_OFFICIAL = {official: ours for official, *ours in _table()}
_KOHYA = {official.replace(".", "_"): official for official in _OFFICIAL}
_OURS = {name: official for official, ours in _OFFICIAL.items() for name in ours}


def layer_of(name: str, layout: Layout) -> Layer | None:
    """The layer of a name without its prefix; None where the architecture has no such layer.

    Args:
        name: Dotted; our name in the layout "peft", else the official one.
        layout: Layout of the file that it stands in.
    """
    found = _INDEX.search(name)
    index = found[0] if found else ""
    pattern = _INDEX.sub("#", name, count=1)
    official = _OURS.get(pattern) if layout == "peft" else pattern
    if official not in _OFFICIAL:
        return None
    ours = tuple(each.replace("#", index) for each in _OFFICIAL[official])
    swapped = f"{official}." == HALVES_SWAPPED
    return Layer(official.replace("#", index), ours, swapped)


def key_names(name: str, layout: Layout) -> tuple[str, str, str]:
    """Keys of a layer's down matrix, up matrix and alpha, as we write them."""
    stem = PREFIXES[layout][0] + (name.replace(".", "_") if layout == "kohya" else name)
    down, up = ("lora_down", "lora_up") if layout == "kohya" else ("lora_A", "lora_B")
    return f"{stem}.{down}.weight", f"{stem}.{up}.weight", f"{stem}.alpha"


def read_header(path: str | Path) -> LoraHeader:
    """Read a LoRA file's header, and its alphas.

    Raises:
        CheckpointError: No such file, not a whole safetensors file, or not a LoRA of this model.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; give a LoRA's .safetensors file")
    try:
        with safe_open(path, framework="np"), path.open("rb") as file:  # the first looks for holes
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
            metadata = header.pop("__metadata__", {})
            tensors = {}
            for name, entry in header.items():
                value = None
                if name.endswith(".alpha"):
                    start, end = entry["data_offsets"]
                    file.seek(8 + size + start)
                    value = _scalar(path, name, entry["dtype"], file.read(end - start))
                tensors[name] = TensorHeader(entry["dtype"], tuple(entry["shape"]), value)
    except (SafetensorError, OSError, ValueError) as error:
        what = " ".join(str(error).split())
        raise CheckpointError(
            f"{path}: not a whole safetensors file ({what}); get it again"
        ) from error
    return describe(str(path), tensors, metadata, config=path.with_name("adapter_config.json"))


def describe(
    label: str,
    tensors: Mapping[str, TensorHeader],
    metadata: Mapping[str, str],
    config: Path | None = None,
) -> LoraHeader:
    """Sort a LoRA's tensors by layer.

    Args:
        label: What to call it in messages.
        tensors: Key → dtype, shape, and value of an alpha.
        metadata: The strings of the file's header.
        config: Where PEFT's own ``adapter_config.json`` would be.

    Raises:
        CheckpointError: A tensor belongs to no layer of this architecture, a matrix is missing or
            of a wrong shape, or the metadata name another model.
    """
    _check_family(label, metadata)
    layout, parts = _sort(label, tensors)
    alphas = _peft_alphas(label, tensors, metadata, config) if layout == "peft" else None
    layers = {}
    for name, keys in parts.items():
        if not {"down", "up"} <= keys.keys():
            raise CheckpointError(
                f"{label}: {name} has only {' and '.join(sorted(keys))}, a LoRA layer needs down "
                "and up; get the file again"
            )
        layers[name] = _layer_header(label, name, keys, tensors, alphas)
        _check_fused(label, layout, name, layers[name])
    return LoraHeader(label, layout, layers, dict(metadata))


def check_fit(header: LoraHeader, sizes: Mapping[str, tuple[int, int]]) -> None:
    """Refuse a LoRA whose layers a transformer does not have, or has in other sizes.

    Args:
        header: The LoRA.
        sizes: Our layer name → rows and columns (out, in) of its weight.

    Raises:
        CheckpointError: With how many layers do not fit, and the first of them.
    """
    wrong = []
    for name, found in header.layers.items():
        layer = layer_of(name, header.layout)
        ours = (name,) if header.layout == "peft" or layer is None else layer.ours
        here = [sizes[each] for each in ours if each in sizes]
        if len(here) < len(ours):
            wrong.append(f"{name} (no such layer)")
            continue
        wanted = (sum(rows for rows, _ in here), here[0][1])
        got = (found.out_features, found.in_features)
        if got != wanted:
            wrong.append(f"{name} ({got[0]} × {got[1]} instead of {wanted[0]} × {wanted[1]})")
    if wrong:
        raise CheckpointError(
            f"{header.label}: a LoRA of another model, {len(wrong)} of {len(header.layers)} layers "
            f"do not fit: {first_names(wrong, 3)}; give one that was trained for this model"
        )


def pattern_value(name: str, patterns: Mapping[str, Any], default: Any) -> Any:
    """What PEFT's `rank_pattern` or `alpha_pattern` says of a layer, by its rule."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def _check_family(label: str, metadata: Mapping[str, str]) -> None:
    for key in _FAMILY_KEYS:
        family = metadata.get(key, "")
        if family and "step1x" not in family.lower():
            raise CheckpointError(
                f"{label}: a LoRA of another model, its metadata say {key} {family!r}; give one "
                "that was trained for Step1X-Edit"
            )


def _sort(
    label: str, tensors: Iterable[str]
) -> tuple[Layout, dict[str, dict[Literal["down", "up", "alpha"], str]]]:
    """Layout, and layer name → part → key."""
    found: dict[Layout, dict[str, dict[Any, str]]] = {}
    unmatched = []
    for key in tensors:
        place = _place(key)
        if place is None:
            unmatched.append(key)
            continue
        layout, name, part = place
        keys = found.setdefault(layout, {}).setdefault(name, {})
        if part in keys:
            raise CheckpointError(f"{label}: {keys[part]} and {key} are the same; leave one out")
        keys[part] = key
    if not unmatched and not found:
        raise CheckpointError(f"{label}: holds no tensors; give a LoRA")
    if unmatched:
        count = len(unmatched) + sum(len(k) for parts in found.values() for k in parts.values())
        raise CheckpointError(
            f"{label}: not a LoRA of Step1X-Edit, {len(unmatched)} of {count} tensors belong to "
            f"none of its layers: {first_names(unmatched)}; give one that was trained for it"
        )
    if len(found) > 1:
        first = [f"{next(iter(parts))} ({layout})" for layout, parts in found.items()]
        raise CheckpointError(f"{label}: layouts are mixed: {first_names(first)}; save it in one")
    return next(iter(found.items()))


def _place(key: str) -> tuple[Layout, str, str] | None:
    """Layout, layer name without prefix, and part of a key."""
    match = _KEY.fullmatch(key)
    if match is None:
        return None
    part = match["alpha"] or {"A": "down", "B": "up"}.get(match["part"], match["part"])
    for layout, prefixes in PREFIXES.items():
        for prefix in prefixes:
            name = match["layer"].removeprefix(prefix)
            if prefix and name == match["layer"]:
                continue
            if layout == "kohya":
                found = _INDEX.search(name)
                official = _KOHYA.get(_INDEX.sub("#", name, count=1), "")
                name = official.replace("#", found[0] if found else "")
            if layer_of(name, layout):
                return layout, name, part
    return None


def _layer_header(
    label: str,
    name: str,
    keys: Mapping[Literal["down", "up", "alpha"], str],
    tensors: Mapping[str, TensorHeader],
    peft_alphas: _PeftAlphas | None,
) -> LayerHeader:
    down, up = tensors[keys["down"]], tensors[keys["up"]]
    flat = len(down.shape) != 2 or len(up.shape) != 2
    if flat or down.shape[0] != up.shape[1] or not down.shape[0]:
        raise CheckpointError(
            f"{label}: {name} has down {list(down.shape)} and up {list(up.shape)}, which must be "
            "(rank, in) and (out, rank); get the file again"
        )
    alpha = tensors[keys["alpha"]].value if "alpha" in keys else None
    dtype = tensors[keys["alpha"]].dtype if "alpha" in keys else None
    if peft_alphas is not None and "alpha" not in keys:
        alpha, dtype = peft_alphas.of(name)
    if alpha is not None and not math.isfinite(alpha):
        raise CheckpointError(f"{label}: {name} has alpha {alpha}; the file is damaged")
    return LayerHeader(
        keys["down"], keys["up"], down.shape[0], down.shape[1], up.shape[0], up.dtype, alpha, dtype
    )


def _check_fused(label: str, layout: Layout, name: str, found: LayerHeader) -> None:
    layer = layer_of(name, layout)
    if layout == "peft" or layer is None or len(layer.ours) == 1:
        return
    rows = sum(layer.rows(found.in_features))
    if found.out_features != rows:
        raise CheckpointError(
            f"{label}: a LoRA of another model, {name} has {found.out_features} rows where "
            f"Step1X-Edit has {rows} for {found.in_features} columns"
        )


@dataclass(frozen=True)
class _PeftAlphas:
    """Alphas of a PEFT file, which stand in its configuration."""

    config: Mapping[str, Any]
    dtypes: Mapping[str, str | None]

    def of(self, name: str) -> tuple[float | None, str | None]:
        alpha = self.config.get("lora_alpha")
        alpha = pattern_value(name, self.config.get("alpha_pattern") or {}, alpha)
        dtype = self.dtypes.get(name, self.dtypes.get("", "F32"))
        return (None, None) if alpha is None or dtype is None else (float(alpha), dtype)


def _peft_alphas(
    label: str, tensors: Iterable[str], metadata: Mapping[str, str], config: Path | None
) -> _PeftAlphas:
    """Alphas from diffusers' metadata, or from the configuration beside a file of PEFT's own."""
    own = any(key.startswith("base_model.model.") for key in tensors)
    try:
        dtypes = json.loads(metadata.get(ALPHA_DTYPES, "{}"))
        settings = json.loads(metadata.get(PEFT_METADATA, "{}"))
        settings = {key.removeprefix("transformer."): value for key, value in settings.items()}
        if own and not settings:
            settings = json.loads((config or Path()).read_text(encoding="utf-8"))
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{label}: its configuration cannot be read ({' '.join(str(error).split())}); a file "
            "saved by PEFT needs the adapter_config.json that was written beside it"
        ) from error
    for variant in ("use_rslora", "use_dora", "lora_bias"):
        if settings.get(variant):
            raise CheckpointError(f"{label}: made with {variant}, only plain LoRA is supported")
    return _PeftAlphas(settings, dtypes)


def _scalar(path: Path, name: str, dtype: str, raw: bytes) -> float:
    """The one number of an alpha tensor."""
    if dtype == "BF16":  # the upper half of a float32
        dtype, raw = "F32", b"\0\0" + raw
    if dtype not in _SCALARS or len(raw) != struct.calcsize(_SCALARS[dtype]):
        raise CheckpointError(f"{path}: {name} is no single number of a known kind ({dtype})")
    return struct.unpack(_SCALARS[dtype], raw)[0]
