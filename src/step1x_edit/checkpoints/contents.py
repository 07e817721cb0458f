"""What a model folder holds, read from file headers alone: quick for any size, and without torch.

Called by the strict loader (`folder`), by `Editor`, and by the doors, which refuse a wrong folder
before they pay for importing the networks.
"""

import hashlib
import json
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from step1x_edit.errors import CheckpointError
from step1x_edit.model.config import RELEASED_SAMPLING

WEIGHT_COMPONENTS = ("transformer", "text_encoder", "vae")
"""Folders of a model that hold weights."""

_SAMPLE_BYTES = 1 << 16


class TensorSummary(NamedTuple):
    """What the weights files of a component hold."""

    tensors: int
    parameters: int
    dtypes: tuple[str, ...]
    bytes: int


class ModelSettings(NamedTuple):
    """The settings a model uses where a request names none."""

    num_inference_steps: int
    guidance_scale: float
    size_level: int


def read_index(folder: Path) -> dict[str, Any]:
    """The ``model_index.json`` of one of our model folders.

    Raises:
        CheckpointError: There is none, or it is another pipeline's.
    """
    index = _read_json(folder / "model_index.json", f"{folder} is no model folder")
    family = index.get("_class_name")
    if family != "Step1XEditPipeline":
        raise CheckpointError(
            f"{folder} holds a {family}, not a Step1XEditPipeline: give a Step1X-Edit model"
        )
    absent = [name for name in WEIGHT_COMPONENTS if not isinstance(index.get(name), list)]
    if absent:
        raise CheckpointError(
            f"{folder / 'model_index.json'} names no {' and no '.join(absent)}: get it again"
        )
    return index


def read_settings(index: dict[str, Any]) -> ModelSettings:
    """The model's own settings; those of the release where its index names none.

    Args:
        index: From `read_index`.
    """
    return ModelSettings(
        **{name: index.get(name, RELEASED_SAMPLING[name]) for name in ModelSettings._fields}
    )


def read_version(folder: Path) -> str:
    """The release that a model folder follows: "v1.0" or "v1.1".

    Raises:
        CheckpointError: The transformer's configuration cannot be read.
    """
    config = read_config(folder / "transformer")
    return "v1.0" if config.get("connector_scale_factor") else "v1.1"


def read_config(component: Path) -> dict[str, Any]:
    """The ``config.json`` of a component.

    Raises:
        CheckpointError: It is missing or broken.
    """
    return _read_json(component / "config.json", f"{component} is incomplete")


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
            # "np" opens any dtype's header, and does not import torch as "pt" would.
            with safe_open(file, framework="np") as opened:
                slices = [opened.get_slice(name) for name in opened.keys()]  # noqa: SIM118 - not a mapping
                shapes += [part.get_shape() for part in slices]
                dtypes |= {part.get_dtype() for part in slices}
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{file} cannot be read ({one_line(error)}): get it again"
            ) from error
    num_bytes = sum(file.stat().st_size for file in files)
    return TensorSummary(len(shapes), sum(map(prod, shapes)), tuple(sorted(dtypes)), num_bytes)


def fingerprint(folder: Path) -> str:
    """Twelve hexadecimal digits that change when a weights file of the folder does.

    Of each file's name, size and first, middle and last 64 KiB, which is quick for 40 GB too.

    Args:
        folder: A diffusers-layout folder.
    """
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*/*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.parent.name}/{file.name}:{size}".encode())
        with file.open("rb") as opened:
            for start in (0, size // 2, max(0, size - _SAMPLE_BYTES)):
                opened.seek(start)
                digest.update(opened.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:12]


def weights_hash(folder: Path, weights: str) -> str:
    """Tells which weights a picture was made with: `fingerprint`, and how they were stored.

    Args:
        folder: A diffusers-layout folder.
        weights: Of the `RuntimeConfig`.
    """
    return fingerprint(folder) + ("" if weights == "auto" else f"-{weights}")


def one_line(error: Exception) -> str:
    """What an error of another library says, on one line of at most 400 characters."""
    text = " ".join(str(error).split())
    return text[:400] or type(error).__name__


def _read_json(file: Path, complaint: str) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{complaint}: {file.name}: {one_line(error)}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{complaint}: {file.name} is not a JSON object")
    return value
