"""Model folders are read strictly, and looked into without torch."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from step1x_edit.checkpoints.contents import (
    ModelSettings,
    fingerprint,
    read_index,
    read_settings,
    read_version,
    summarise,
)
from step1x_edit.checkpoints.folder import load_components
from step1x_edit.errors import CheckpointError
from step1x_edit.model.config import RELEASED_SAMPLING

from ..tiny_model import SETTINGS, write_tiny_model


@pytest.fixture
def folder(tiny_model, tmp_path):
    """A copy that may be broken."""
    return shutil.copytree(tiny_model, tmp_path / "model")


def weights_of(folder, component):
    return next((folder / component).glob("*.safetensors"))


def test_whole_folder_loads_in_the_precision_asked_for(folder):
    parts = load_components(folder, torch.bfloat16)
    dtypes = {name: {p.dtype for p in part.parameters()} for name, part in parts.items()}
    assert dtypes == {
        "transformer": {torch.bfloat16},
        "text_encoder": {torch.bfloat16},
        "vae": {torch.float32},
    }
    assert not any(part.training for part in parts.values())
    saved = load_file(weights_of(folder, "transformer"))
    loaded = parts["transformer"].state_dict()
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[name], saved[name].bfloat16()) for name in saved)


@pytest.mark.parametrize(
    ("component", "name"),
    [
        ("transformer", "x_embedder.bias"),
        ("text_encoder", "visual.merger.ln_q.weight"),
        ("vae", "decoder.conv_in.bias"),
    ],
)
def test_missing_extra_and_misshapen_tensors_are_named_together(folder, component, name):
    file = weights_of(folder, component)
    tensors = load_file(file)
    first = min(key for key in tensors if key.endswith("weight") and key != name)
    del tensors[name]
    tensors["surplus.bias"] = torch.zeros(3)
    shape = list(tensors[first].shape)
    tensors[first] = torch.zeros(5)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError) as error:
        load_components(folder, torch.float32)
    message = str(error.value)
    found = re.search(r"1 missing \((\S+)\); 1 unexpected \(surplus.bias\); 1 mismatched", message)
    assert found
    assert found[1].endswith(name)  # transformers names the module, which has a prefix more
    assert f" [5] instead of {shape})" in message
    assert "\n" not in message


def test_many_names_are_cut_short(folder):
    file = weights_of(folder, "transformer")
    tensors = load_file(file) | {f"surplus.{i:02}": torch.zeros(1) for i in range(20)}
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"20 unexpected \(surplus.00, .*surplus.04, …\)"):
        load_components(folder, torch.float32)


@pytest.mark.parametrize("component", ["transformer", "text_encoder", "vae"])
def test_broken_files_are_named(folder, component):
    file = weights_of(folder, component)
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=f"{file.name} cannot be read .*get it again"):
        summarise(folder / component)
    with pytest.raises(CheckpointError, match=file.name):
        load_components(folder, torch.float32)
    file.unlink()
    with pytest.raises(CheckpointError, match=f"{component} holds no safetensors file"):
        load_components(folder, torch.float32)


@pytest.mark.parametrize("component", ["transformer", "text_encoder", "vae"])
def test_missing_or_broken_configuration_is_one_line(folder, component):
    (folder / component / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match=component) as error:
        load_components(folder, torch.float32)
    assert "\n" not in str(error.value)
    (folder / component / "config.json").unlink()
    with pytest.raises(CheckpointError, match=component):
        load_components(folder, torch.float32)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "model_index.json"),
        ("{", "model_index.json"),
        ("[]", "not a JSON object"),
        ('{"_class_name": "FluxPipeline"}', "holds a FluxPipeline"),
        ('{"_class_name": "Step1XEditPipeline", "vae": ["a", "b"]}', "no transformer and no text"),
    ],
)
def test_index_that_is_not_ours(folder, text, says):
    (folder / "model_index.json").unlink()
    if text is not None:
        (folder / "model_index.json").write_text(text)
    with pytest.raises(CheckpointError, match=says):
        read_index(folder)


def test_strange_autoencoder_class_is_refused(folder):
    index = json.loads((folder / "model_index.json").read_text())
    index["vae"] = ["diffusers", "os"]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="'os'"):
        load_components(folder, torch.float32)


def test_what_a_folder_holds(folder):
    tensors = load_file(weights_of(folder, "transformer"))
    found = summarise(folder / "transformer")
    assert found.tensors == len(tensors)
    assert found.parameters == sum(tensor.numel() for tensor in tensors.values())
    assert found.dtypes == ("F32",)
    assert found.bytes == weights_of(folder, "transformer").stat().st_size
    assert read_settings(read_index(folder)) == ModelSettings(
        **SETTINGS, draw_size=SETTINGS["size_level"], draw_negative_prompt=""
    )
    assert read_settings({}) == ModelSettings(**RELEASED_SAMPLING)
    assert read_settings({})[:4] == (28, 6.0, 512, 1024)
    assert read_version(folder) == "v1.1"


def test_version_is_told_by_the_transformer(tmp_path):
    assert read_version(write_tiny_model(tmp_path, version="v1.0")) == "v1.0"


def test_fingerprint_follows_the_weights_and_not_the_place(folder, tmp_path):
    before = fingerprint(folder)
    assert len(before) == 12
    assert fingerprint(shutil.copytree(folder, tmp_path / "elsewhere")) == before
    for component in ("transformer", "vae", "text_encoder"):
        file = weights_of(folder, component)
        tensors = load_file(file)
        name = max(tensors)
        tensors[name] = tensors[name] + 1
        save_file(tensors, file, metadata={"format": "pt"})
        after = fingerprint(folder)
        assert after != before
        before = after


def test_looking_into_a_folder_does_not_import_torch(folder):
    script = (
        "import sys; from pathlib import Path\n"
        "from step1x_edit.checkpoints import catalog, contents\n"
        f"contents.summarise(Path({str(folder)!r}) / 'vae')\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
