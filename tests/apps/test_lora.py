"""LoRAs through the doors: `--lora` of every command that edits, and `step1x lora`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from step1x_edit.apps import cli
from step1x_edit.checkpoints.catalog import MINI_FOLDER
from step1x_edit.request import read_provenance

from ..lora_files import write_random_lora
from .command import files_of, refused, run

REFERENCE = Path(__file__).parents[1] / "reference" / "lora_v1p1_kohya.safetensors"
EDIT = ["edit", "in.png", "make it red", "-o", "out.png", "--seed", "3", "--keep", "off"]


@pytest.fixture
def here(tmp_path, tiny_model):
    """A folder with a picture and two LoRAs for the tiny model."""
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "in.png")
    write_random_lora(tmp_path / "a.safetensors", tiny_model / "transformer")
    write_random_lora(tmp_path / "b:1.safetensors", tiny_model / "transformer", seed=1)
    return tmp_path


@pytest.fixture
def say(here, monkeypatch, capsys, tiny_model):
    """Run a command in this process, in `here`, and give back exit code, stdout and stderr."""
    monkeypatch.chdir(here)

    def said(*command: str, model: str | None = str(tiny_model)):
        code = cli.run([*command, *(["--model", model] if model else [])])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return said


def pixels_of(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def edited(say, here, *loras: str, model: str | None = None) -> np.ndarray:
    options = [word for lora in loras for word in ("--lora", lora)]
    code, _, err = say(*EDIT, "--quiet", *options, **({"model": model} if model else {}))
    assert (code, err) == (0, "")
    return pixels_of(here / "out.png")


def test_edit_with_loras(say, here):
    plain = edited(say, here)
    assert read_provenance(here / "out.png").lora == ()
    one = edited(say, here, "a.safetensors")
    assert not np.array_equal(one, plain)
    assert np.array_equal(edited(say, here, "a.safetensors:0"), plain)
    assert np.array_equal(edited(say, here, "a.safetensors", "b:1.safetensors:0"), one)
    both = edited(say, here, "a.safetensors:1.0", "b:1.safetensors:-0.5")
    assert not np.array_equal(both, one)
    made = read_provenance(here / "out.png").lora
    assert [(lora.name, lora.weight) for lora in made] == [
        ("a.safetensors", 1.0),
        ("b:1.safetensors", -0.5),
    ]
    assert all(len(lora.sha256) == 12 for lora in made)
    assert made[0].sha256 != made[1].sha256


def test_every_layout_makes_the_same_picture(say, here):
    wanted = edited(say, here, "a.safetensors")
    for layout in ("peft", "comfyui"):
        code, out, err = say(
            "lora", "convert", "a.safetensors", f"{layout}.safetensors", "--to", layout, model=None
        )
        assert (code, out, err) == (0, f"{layout}.safetensors  kohya to {layout}\n", "")
        got = edited(say, here, f"{layout}.safetensors")
        assert np.abs(got.astype(int) - wanted).max() <= 1


def test_generate_with_a_lora(say, here):
    command = ["generate", "a red car", "--seed", "1", "--width", "64", "--height", "64"]
    assert say(*command, "-o", "plain.png")[0] == 0
    assert say(*command, "-o", "lora.png", "--lora", "a.safetensors")[0] == 0
    assert not np.array_equal(pixels_of(here / "plain.png"), pixels_of(here / "lora.png"))


def test_batch_makes_anew_what_another_lora_made(say, here):
    (here / "prompts.json").write_text(json.dumps({"in.png": "make it red"}))
    (here / "out").mkdir()
    command = ["batch", "prompts.json", "--input-dir", ".", "--output-dir", "out"]
    for options in ([], ["--lora", "a.safetensors"], ["--lora", "a.safetensors:0.5"]):
        assert say(*command, *options)[1] == "1 edited, 0 skipped (done), 0 failed\n"
        assert say(*command, *options)[1] == "0 edited, 1 skipped (done), 0 failed\n"


@pytest.mark.slow
@pytest.mark.skipif(
    not (MINI_FOLDER / "model_index.json").exists(),
    reason="the mini's weights are not in this tree",
)
def test_over_the_shipped_mini(here):
    write_random_lora(here / "mini.safetensors", MINI_FOLDER / "transformer", rank=4)
    pictures = []
    for options in ([], ["--lora", "mini.safetensors"], ["--lora", "mini.safetensors:0"]):
        done = run(here, [*EDIT, "--steps", "2", "--quiet", *options])
        assert (done.returncode, done.stderr) == (0, "")
        pictures.append(pixels_of(here / "out.png"))
    plain, lora, weightless = pictures
    assert not np.array_equal(plain, lora)
    assert np.array_equal(plain, weightless)


# ---- what is refused before a model is loaded


@pytest.mark.parametrize(
    ("lora", "says"),
    [
        ("none.safetensors", [r"none\.safetensors", "no such file"]),
        ("a.safetensors:11", ["--lora", "weight 11", "-10 to 10"]),
        ("a.safetensors:nan", ["--lora", "nan", "-10 to 10"]),
        ("in.png", [r"in\.png", "not a whole safetensors file"]),
        ("wide.safetensors", ["another model", "12 of 29 layers|29 of 29 layers", "instead of"]),
        ("cut.safetensors", [r"cut\.safetensors", "not a whole safetensors file"]),
        ("flux.safetensors", ["another model", "flux-1-dev"]),
        ("qwen.safetensors", ["2 of 2 tensors", r"img_mod\.1"]),
    ],
)
def test_bad_loras(here, tiny_model, lora, says):
    (here / "wide.safetensors").write_bytes(REFERENCE.read_bytes())
    (here / "cut.safetensors").write_bytes(REFERENCE.read_bytes()[:-1000])
    flux = {"modelspec.architecture": "flux-1-dev/lora"}
    save_file(load_file(REFERENCE), here / "flux.safetensors", flux)
    qwen = [f"transformer.transformer_blocks.0.img_mod.1.lora_{part}.weight" for part in "AB"]
    save_file({name: torch.zeros(2, 2) for name in qwen}, here / "qwen.safetensors")
    refused(here, [*EDIT, "--model", str(tiny_model), "--lora", lora], *says)


def test_a_lora_with_nan(say, here):
    tensors = load_file(here / "a.safetensors")
    name = next(name for name in tensors if name.endswith("lora_up.weight"))
    tensors[name][0, 0] = torch.nan
    save_file(tensors, here / "nan.safetensors")
    before = files_of(here)
    code, out, err = say(*EDIT, "--lora", "nan.safetensors")
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert f"{name} holds values that are NaN" in err
    assert say("lora", "convert", "nan.safetensors", "x.safetensors", "--to", "peft", model=None)[0] == 2  # fmt: skip  # noqa: E501
    assert files_of(here) == before


# ---- step1x lora


def test_show_reads_the_header_alone(here):
    done = run(here, ["lora", "show", str(REFERENCE)], PYTHONPROFILEIMPORTTIME="1")
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not {"torch", "transformers", "diffusers"} & imported
    first, second, *rest = done.stdout.splitlines()
    assert first.endswith(": kohya layout, 29 layers, 234.2 kB")
    assert second == "rank 4; alpha 2; dtype F32"
    assert "  ss_network_dim: 4" in rest
    rows = {line.split()[0]: line.split()[1:] for line in rest}
    assert rows["double_blocks.0.img_attn.qkv"] == ["4", "2", "96", "288", "F32"]
    assert rows["single_blocks.2.linear1"] == ["4", "2", "96", "672", "F32"]


def test_show_reads_alphas_of_any_dtype_and_counts_what_differs(say, here):
    for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.int64):
        tensors = load_file(REFERENCE)
        for name in [name for name in tensors if name.endswith(".alpha")]:
            tensors[name] = tensors[name].to(dtype)
        del tensors["lora_unet_single_blocks_0_linear1.alpha"]
        save_file(tensors, here / "c.safetensors")
        code, out, _ = say("lora", "show", "c.safetensors", model=None)
        assert code == 0
        assert "alpha 2 (28 layers), none (1 layers)" in out
        assert "no metadata" in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["show", "in.png"], "not a whole safetensors file"),
        (["show", "none.safetensors"], "no such file"),
        (["convert", "a.safetensors", "a.safetensors", "--to", "peft"], "is the source"),
        (["convert", "a.safetensors", "b.pt", "--to", "peft"], "ends in .safetensors"),
        (["convert", "a.safetensors", "no/b.safetensors", "--to", "peft"], "no such folder"),
        (["convert", "a.safetensors", "b.safetensors", "--to", "webui"], "'webui'"),
        (["convert", "a.safetensors", "b.safetensors"], "--to"),
    ],
)
def test_bad_commands(say, here, arguments, says):
    before = files_of(here)
    code, out, err = say("lora", *arguments, model=None)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert says in err
    assert files_of(here) == before


def test_a_failed_write_leaves_the_old_file_and_nothing_else(say, here, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    (here / "out.safetensors").write_bytes(b"old")
    before = files_of(here)
    monkeypatch.setattr(Path, "replace", fail)
    code, _, err = say("lora", "convert", "a.safetensors", "out.safetensors", "--to", "peft", model=None)  # fmt: skip  # noqa: E501
    assert (code, len(err.splitlines())) == (1, 1)
    assert "no room" in err
    assert files_of(here) == before
