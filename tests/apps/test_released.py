"""The released models through the command line, on tiny official files: defaults and refusals.

Official files name no settings, so that those of the release apply.
"""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from step1x_edit.apps import cli
from step1x_edit.model.config import RELEASED_SAMPLING
from step1x_edit.request import read_provenance
from step1x_edit.runtime.convert import convert

from ..lora_files import write_random_lora
from ..model.qwen import tiny_config
from ..tiny_model import REFERENCE, write_tiny_official
from .command import files_of, refused

EDIT = ["edit", "in.png", "make it red", "-o", "out.png", "--keep", "off"]
SMALL = ["--width", "64", "--height", "64"]


@pytest.fixture
def here(tmp_path):
    """A folder with a picture and the official files of both releases."""
    pixels = np.random.default_rng(0).integers(0, 256, (50, 72, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "in.png")
    for version in ("v1.0", "v1.1"):
        write_tiny_official(tmp_path / f"of {version}", version=version)
        tiny_config(max_length=320).save(tmp_path / f"of {version}")  # a token for each byte
    return tmp_path


@pytest.fixture
def say(here, monkeypatch, capsys):
    """Run a command in this process, in `here`, with a model, by default v1.1."""
    monkeypatch.chdir(here)

    def said(*command: str, model: str = "of v1.1"):
        code = cli.run([*command, "--model", model])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return said


def made(say, *command: str, **options: str) -> dict:
    code, out, err = say(*command, "--json", **options)
    assert (code, err) == (0, "")
    return json.loads(out)


def change(file, function):
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    save_file({k: function(k, v) for k, v in load_file(file).items()}, file, metadata)


# ---- the release's defaults


@pytest.mark.slow
@pytest.mark.parametrize("version", ["v1.0", "v1.1"])
def test_edit(say, version):
    said = made(say, *EDIT, "--size-level", "64", model=f"of {version}")
    assert (said["num_steps"], said["guidance"], said["negative_prompt"]) == (28, 6, "")
    said = made(say, *EDIT, "--steps", "1", "--guidance", "-1", model=f"of {version}")
    assert (said["size_level_px"], said["width"], said["height"]) == (512, 608, 416)


@pytest.mark.slow
def test_generate(say, here):
    draw = ["generate", "a red car", "--seed", "1", "-o"]
    said = made(say, *draw, "one.png", *SMALL)
    assert (said["num_steps"], said["guidance"]) == (28, 6)
    faults = said["negative_prompt"]
    assert faults == RELEASED_SAMPLING["draw_negative_prompt"]
    assert "blurry" in faults
    given = made(say, *draw, "two.png", *SMALL, "--negative", faults)
    assert given["negative_prompt"] == faults
    assert made(say, *draw, "three.png", *SMALL, "--negative", "")["negative_prompt"] == ""
    one, two, three = (
        np.asarray(Image.open(here / f"{name}.png")) for name in ("one", "two", "three")
    )
    assert np.array_equal(one, two)
    assert not np.array_equal(one, three)
    said = made(say, *draw, "full.png", "--steps", "1", "--guidance", "-1")
    assert Image.open(here / "full.png").size == (said["width"], said["height"]) == (1024, 1024)


def test_the_first_release_does_not_draw(here):
    command = ["generate", "a red car", "-o", "car.png", "--model", "of v1.0"]
    refused(here, command, "v1.0 model cannot draw", "give a picture")


@pytest.mark.slow
def test_batch(say, here):
    """The official form of JSON, English and Chinese; results keep the names."""
    prompts = {"in.png": "add a red car", "b.jpg": "给这个女生戴一个红宝石吊坠"}
    Image.open(here / "in.png").save(here / "b.jpg")
    (here / "prompts.json").write_text(json.dumps(prompts, ensure_ascii=False), encoding="utf-8")
    (here / "out").mkdir()
    command = ["batch", "prompts.json", "--input-dir", ".", "--output-dir", "out"]
    code, out, err = say(*command, "--size-level", "64", "--keep", "off")
    assert (code, out, err) == (0, "2 edited, 0 skipped (done), 0 failed\n", "")
    assert set(files_of(here / "out")) == set(prompts)
    for name, prompt in prompts.items():
        found = read_provenance(here / "out" / name)
        assert (found.prompt, found.source_name) == (prompt, name)
        assert (found.num_steps, found.guidance, found.seed) == (28, 6, 42)
        assert Image.open(here / "out" / name).size == (72, 50)


# ---- what is refused when the networks are read


def refuses(say, here, *command: str, **options: str) -> str:
    before = files_of(here)
    code, out, err = say(*command, **options)
    assert (code, out, len(err.splitlines())) == (2, "", 1), err
    assert files_of(here) == before
    return err


@pytest.mark.parametrize("offload", ["none", "disk"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("name", ["img_in.weight", "single_blocks.1.linear2.weight"])
def test_nan_in_an_official_file(say, here, dtype, offload, name):
    ours = {"img_in": "x_embedder", "single_blocks": "single_transformer_blocks.1.proj_out"}

    def spoil(key, tensor):
        if key == name:
            tensor.view(-1)[3] = torch.nan
        return tensor.to(dtype)

    change(here / "of v1.1" / "step1x-edit-v1p1-official.safetensors", spoil)
    err = refuses(say, here, *EDIT, "--offload", offload, "--size-level", "64")
    assert f"the tensor {ours[name.partition('.')[0]]}.weight holds NaN" in err


@pytest.mark.parametrize("to", ["diffusers", "fp8"])
def test_nan_is_not_converted(tiny_model, tmp_path, to, monkeypatch, capsys):
    shutil.copytree(tiny_model, tmp_path / "model")
    (file,) = (tmp_path / "model" / "text_encoder").glob("*.safetensors")

    def spoil(key, tensor):
        if key.endswith("layers.1.mlp.up_proj.weight"):
            tensor[0, 0] = torch.inf
        return tensor

    change(file, spoil)
    monkeypatch.chdir(tmp_path)
    assert cli.run(["convert", "model", "made", "--to", to]) == 2
    assert "mlp.up_proj.weight holds NaN or infinite" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("layout", ["kohya", "peft"])
def test_lora_of_another_model_beside_an_official_file(here, tiny_model, layout):
    write_random_lora(here / "tiny.safetensors", tiny_model / "transformer", layout=layout)
    command = [*EDIT, "--model", "of v1.1", "--lora", "tiny.safetensors"]
    refused(here, command, r"tiny\.safetensors", "another model", "instead of")


@pytest.mark.parametrize("layout", ["kohya", "peft"])
def test_lora_of_this_model(say, here, layout):
    sizes = REFERENCE / "diffusers_v1p1" / "transformer"
    write_random_lora(here / "lora.safetensors", sizes, layout=layout)
    command = [*EDIT, "--steps", "1", "--size-level", "64", "--seed", "1"]
    bare = made(say, *command)
    with_lora = made(say, *command, "--lora", "lora.safetensors", "--offload", "disk")
    assert (len(bare["lora"]), len(with_lora["lora"])) == (0, 1)


@pytest.mark.parametrize("to", ["fp8", "int4"])
def test_lora_of_another_model_over_few_bits(say, here, tiny_model, to):
    """Packed weights show their layers only when they are loaded."""
    convert(tiny_model, here / to, to)
    wide = REFERENCE / "lora_v1p1_kohya.safetensors"
    err = refuses(say, here, *EDIT, "--lora", str(wide), model=to)
    assert "another model" in err
