"""Load a diffusers-layout folder strictly: no tensor missing, unexpected or of another shape.

diffusers and transformers warn where they should refuse; here what they report becomes a
`CheckpointError`. Called by `Editor.load` and by ``step1x models show``.
"""

import json
from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from step1x_edit.errors import CheckpointError
from step1x_edit.model.transformer import Step1XEditTransformer2DModel

NAMES_SHOWN = 5
WEIGHT_COMPONENTS = ("transformer", "text_encoder", "vae")
"""Folders of a model that hold weights."""


def load_components(folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """The networks of a model folder.

    Args:
        folder: Local folder with ``model_index.json``.
        dtype: Precision of the transformer and the text encoder; the autoencoder stays in float32.

    Returns:
        Component name → module, to be passed to `Step1XEditPipeline.from_pretrained`.

    Raises:
        CheckpointError: The folder is of another family, or a tensor is missing, unexpected or of
            another shape.
    """
    index = read_index(folder)
    return {
        "transformer": _load(Step1XEditTransformer2DModel, folder / "transformer", dtype),
        "text_encoder": _load(_text_encoder_class(), folder / "text_encoder", dtype),
        "vae": _load(_vae_class(index["vae"][1]), folder / "vae", torch.float32),
    }


def read_index(folder: Path) -> dict[str, Any]:
    """The ``model_index.json`` of one of our model folders.

    Raises:
        CheckpointError: There is none, or it is another pipeline's.
    """
    path = folder / "model_index.json"
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder} is no model folder: {path.name} {_reason(error)}"
        ) from error
    family = index.get("_class_name")
    if family != "Step1XEditPipeline":
        raise CheckpointError(
            f"{folder} holds a {family}, not a Step1XEditPipeline: give a Step1X-Edit model"
        )
    return index


class TensorSummary(NamedTuple):
    """What the weights files of a component hold."""

    tensors: int
    parameters: int
    dtypes: tuple[str, ...]
    bytes: int


def summarise(component: Path) -> TensorSummary:
    """Count a component's tensors from the file headers alone.

    Args:
        component: Folder of safetensors files.

    Raises:
        CheckpointError: There is no weights file, or one cannot be read.
    """
    files = sorted(component.glob("*.safetensors"))
    if not files:
        raise CheckpointError(
            f"{component} holds no safetensors file: the model folder is incomplete"
        )
    shapes, dtypes = [], set[str]()
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                slices = [opened.get_slice(name) for name in opened.keys()]  # noqa: SIM118 - not a mapping
                shapes += [part.get_shape() for part in slices]
                dtypes |= {part.get_dtype() for part in slices}
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{file} cannot be read ({_reason(error)}): get it again"
            ) from error
    num_bytes = sum(file.stat().st_size for file in files)
    return TensorSummary(len(shapes), sum(map(prod, shapes)), tuple(sorted(dtypes)), num_bytes)


def _load(model_class: Any, folder: Path, dtype: torch.dtype) -> Any:
    """One component; what the library only reports is an error."""
    summarise(folder)
    is_transformers = hasattr(model_class, "prepare_inputs_for_generation")
    try:
        model, report = model_class.from_pretrained(
            folder,
            output_loading_info=True,
            local_files_only=True,
            **{"dtype" if is_transformers else "torch_dtype": dtype},
            **(
                {"ignore_mismatched_sizes": True}
                if is_transformers
                else {"low_cpu_mem_usage": False}
            ),
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: {_reason(error)}") from error
    problems = [
        f"{len(names)} {kind} ({_first(names)})"
        for kind in ("missing", "unexpected", "mismatched")
        if (names := report.get(f"{kind}_keys"))
    ]
    if problems:
        raise CheckpointError(
            f"{folder}: tensors {'; '.join(problems)}: the weights do not fit the config"
        )
    return model.eval()


def _first(names: Iterable[Any]) -> str:
    shown = sorted(name if isinstance(name, str) else str(name[0]) for name in names)
    return ", ".join(shown[:NAMES_SHOWN]) + (", …" if len(shown) > NAMES_SHOWN else "")


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines)[:400] if lines else type(error).__name__


def _text_encoder_class() -> Any:
    from transformers import Qwen2_5_VLForConditionalGeneration

    return Qwen2_5_VLForConditionalGeneration


def _vae_class(name: str) -> Any:
    import diffusers

    found = getattr(diffusers, name, None)
    if found is None or not name.startswith("Autoencoder"):
        raise CheckpointError(
            f"the vae is a {name!r}, which diffusers does not know as an autoencoder"
        )
    return found
