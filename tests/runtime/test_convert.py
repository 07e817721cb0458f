"""`step1x convert`: other layouts and fewer bits, on the tiny folder."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from step1x_edit import RuntimeConfig
from step1x_edit.apps import cli
from step1x_edit.errors import CheckpointError
from step1x_edit.runtime.apply import open_networks
from step1x_edit.runtime.convert import convert
from step1x_edit.runtime.load import NetworkLoader, open_transformer

from .loading import load, picture_of


def picture_from(folder, **settings) -> np.ndarray:
    return picture_of(load(folder, **settings).pipeline)


def dtypes_of(file) -> set[str]:
    with safe_open(file, framework="np") as opened:
        return {opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118


@pytest.mark.parametrize(("to", "kind"), [("fp8", "F8_E4M3"), ("int8", "I8"), ("int4", "U8")])
def test_a_converted_folder_gives_the_picture_of_that_precision(tiny_model, tmp_path, to, kind):
    target = tmp_path / to
    convert(tiny_model, target, to)
    for component in ("transformer", "text_encoder"):
        (file,) = (target / component).glob("*.safetensors")
        assert dtypes_of(file) == {kind, "BF16", "F32"}
    wanted = picture_from(tiny_model, weights=to)
    assert np.array_equal(picture_from(target), wanted)
    assert np.array_equal(picture_from(target, offload="disk"), wanted)
    assert np.array_equal(picture_from(target, weights=to), wanted)
    assert sorted(path.name for path in tmp_path.iterdir()) == [to], "something was left behind"


def test_there_and_back(tiny_model, tmp_path):
    """fp8 as numbers, stored once more, is the same fp8."""
    convert(tiny_model, tmp_path / "fp8", "fp8")
    convert(tmp_path / "fp8", tmp_path / "numbers", "diffusers")
    (file,) = (tmp_path / "numbers" / "transformer").glob("*.safetensors")
    assert dtypes_of(file) == {"F32"}
    wanted = picture_from(tmp_path / "fp8")
    assert np.array_equal(picture_from(tmp_path / "numbers"), wanted)
    assert np.array_equal(picture_from(tmp_path / "numbers", weights="fp8"), wanted)


def test_official_file_and_back(tiny_model, tmp_path):
    convert(tiny_model, tmp_path / "official.safetensors", "official")
    convert(tmp_path / "official.safetensors", tmp_path / "transformer", "diffusers")
    before = load_file(tiny_model / "transformer" / "diffusion_pytorch_model.safetensors")
    after = load_file(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("weights", ["auto", "fp8"])
def test_official_files_stream_as_folders_do(tiny_model, tmp_path, weights):
    """One official tensor holds several of ours, one of them with its halves swapped."""
    file = tmp_path / "official.safetensors"
    convert(tiny_model, file, "official")
    wanted = picture_from(tiny_model, weights=weights)
    runtime = RuntimeConfig.checked(weights=weights, offload="disk")
    places = {"transformer": file, "text_encoder": tiny_model / "text_encoder"}
    opened = open_networks(places, runtime, torch.float32, torch.device("cpu"))
    pipeline, _ = load(tiny_model)
    for name, network in opened.networks.items():
        setattr(pipeline, name, network)
    assert np.array_equal(picture_of(pipeline), wanted)


def test_plain_fp8_files_run_as_they_are(tiny_model, tmp_path):
    """Files that were cast to fp8 whole, without scales, as communities share them."""
    folder = tmp_path / "model"
    convert(tiny_model, folder, "diffusers")
    (file,) = (folder / "transformer").glob("*.safetensors")
    cast = {name: t.to(torch.float8_e4m3fn) for name, t in load_file(file).items()}
    numbers = {name: tensor.float() for name, tensor in cast.items()}
    save_file(numbers, file)
    wanted = picture_from(folder)
    save_file(cast, file)
    assert np.array_equal(picture_from(folder), wanted)
    assert np.array_equal(picture_from(folder, offload="disk"), wanted)
    opened = open_transformer(folder / "transformer")
    loader = NetworkLoader(*opened, None, torch.float32, torch.device("cpu"))
    loader.load()
    assert loader.model.get_parameter("transformer_blocks.0.ff.net.2.weight").itemsize == 1


@pytest.mark.parametrize("change", ["missing", "mismatched"])
def test_scales_that_do_not_fit_are_refused(tiny_model, tmp_path, change):
    convert(tiny_model, tmp_path / "int8", "int8")
    (file,) = (tmp_path / "int8" / "transformer").glob("*.safetensors")
    tensors = load_file(file)
    name = "transformer_blocks.0.attn.to_q.weight_scale"
    scale = tensors.pop(name)
    if change == "mismatched":
        tensors[name] = scale[1:].clone()
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=rf"tensors 1 {change} \({name}"):
        picture_from(tmp_path / "int8")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["model", "there", "--to", "fp8"], "exists already"),
        (["model", "out", "--to", "fp7"], "give one of diffusers"),
        (["model", "none/out", "--to", "fp8"], "does not exist"),
        (["nothing", "out", "--to", "fp8"], "unknown model"),
        (["v1.1", "out", "--to", "fp8"], "not on this machine"),
        (["file", "out", "--to", "official"], "official file already"),
        (["file", "out", "--to", "fp8"], "not a whole safetensors file"),
    ],
)
def test_refusals(tiny_model, tmp_path, monkeypatch, capsys, words, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(tiny_model)
    (tmp_path / "there").mkdir()
    (tmp_path / "file").write_bytes(b"1234567890")
    assert cli.run(["convert", *words]) == 2
    said = capsys.readouterr().err
    assert says in said
    assert len(said.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "model", "there"]


def test_the_command_says_what_it_wrote(tiny_model, tmp_path, capsys):
    assert cli.run(["convert", str(tiny_model), str(tmp_path / "small"), "--to", "int8"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 3  # transformer, text encoder and the autoencoder that came along
    assert all(line.endswith(".safetensors") for line in said)
