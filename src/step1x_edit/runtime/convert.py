"""Model files in another layout or in fewer bits: what `step1x convert` does.

A network is read, stored and written one tensor at a time, so that memory holds it in the form in
which it is written. Targets appear under their names when they are whole.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from step1x_edit.checkpoints.contents import read_index
from step1x_edit.checkpoints.tensor_files import TensorFiles
from step1x_edit.errors import InvalidRequest
from step1x_edit.model.tensor_writer import write_tensors
from step1x_edit.request import ModelForm
from step1x_edit.runtime.load import NetworkLoader, open_text_encoder, open_transformer
from step1x_edit.runtime.precision import (
    FP8,
    SCALE,
    Precision,
    StoredLinear,
)

WEIGHT_FILES = {
    "text_encoder": "model.safetensors",
    "transformer": "diffusion_pytorch_model.safetensors",
}


def convert(source: Path, target: Path, to: ModelForm) -> list[Path]:
    """Write a model in another form.

    Args:
        source: A model folder, or an official transformer file.
        target: Of a folder: where the new folder goes, or with `to` "official" the new file. Of a
            file: where the transformer's folder goes. Must not exist.
        to: "diffusers" and "official" have numbers in the precision of the source (bfloat16 where
            that is stored in few bits), the others have the linear layers of the blocks in few
            bits.

    Returns:
        What was written.

    Raises:
        InvalidRequest: The target exists, or the two do not fit together.
        CheckpointError: The source is not what it should be.
    """
    if target.exists():
        raise InvalidRequest(f"{target} exists already: give another name, or remove it")
    if not target.parent.is_dir():
        raise InvalidRequest(f"folder {target.parent} does not exist: make it first")
    precision: Precision | None = None if to in ("diffusers", "official") else to
    if to == "official":
        _load(*open_transformer(source / "transformer"), None).to_official(target)
        return [target]
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    try:
        if source.is_file():
            write_network(_load(*open_transformer(source), precision), partial, "transformer")
        else:
            _convert_folder(source, partial, precision)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return sorted(target.rglob("*.safetensors"))


def _convert_folder(source: Path, target: Path, precision: Precision | None) -> None:
    read_index(source)
    shutil.copytree(source, target, ignore=_without_weights(source))
    transformer = _load(*open_transformer(source / "transformer"), precision)
    write_network(transformer, target / "transformer", "transformer")
    del transformer  # before the next one comes
    encoder = _load(*open_text_encoder(source / "text_encoder"), precision)
    write_network(encoder, target / "text_encoder", "text_encoder")


def _without_weights(source: Path) -> Any:
    networks = {str(source / name) for name in WEIGHT_FILES}

    def ignore(folder: str, names: list[str]) -> list[str]:
        kinds = (".safetensors", ".safetensors.index.json")
        return [name for name in names if folder in networks and name.endswith(kinds)]

    return ignore


def _load(model: Any, files: TensorFiles, precision: Precision | None) -> Any:
    dense = {place.dtype for place in files.places.values()}
    dtype = torch.float32 if torch.float32 in dense else torch.bfloat16
    few = precision is not None
    NetworkLoader(model, files, precision, dtype, torch.device("cpu"), widened=not few).load()
    return model


def write_network(model: Any, folder: Path, component: str) -> None:
    """Write a network's configuration and weights, stored ones in their few bits.

    Args:
        model: Transformer or text encoder.
        folder: Is made.
        component: Which of the two; says the file's name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_config(model, folder)
    tensors = file_tensors(model)
    entries = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    write_tensors(folder / WEIGHT_FILES[component], entries, tensors.__getitem__)


def save_config(model: Any, folder: Path) -> None:
    """Write the ``config.json`` of a transformer or a text encoder."""
    save = getattr(model, "save_config", None) or model.config.save_pretrained
    save(folder)


def file_tensors(model: nn.Module) -> dict[str, Tensor]:
    """A network's parameters as files name and type them; those on the meta device, too."""
    owners = dict(model.named_modules())
    tensors = {}
    for name, parameter in model.named_parameters():
        owner, _, key = name.rpartition(".")
        tensor = parameter.detach()
        module = owners[owner]
        if isinstance(module, StoredLinear):
            if key == SCALE:
                tensor = tensor.bfloat16()
            elif key == "weight" and module.precision == "fp8":
                tensor = tensor.view(FP8)
        tensors[name] = tensor
    return tensors
