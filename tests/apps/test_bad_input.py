"""Every bad input of the command line, through the installed command: one line, exit 2, no harm.

What is refused before a model is loaded does not import torch, and so answers at once; what needs
the networks is in `test_cli`.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from step1x_edit.apps import cli

from .command import files_of, refused, run

SIZE = (64, 48)
EDIT = ["edit", "in.png", "a", "-o", "out.png"]


@pytest.fixture
def here(tmp_path):
    """A folder with a good picture in it."""
    pixels = np.random.default_rng(0).integers(0, 256, (*SIZE[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "in.png")
    return tmp_path


def png(width: int, height: int) -> bytes:
    """A PNG whose header claims a size, with next to nothing behind it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def test_missing_picture(here):
    refused(here, ["edit", "none.png", "a", "-o", "out.png"], "none.png", "no such file|not exist")


def test_empty_file(here):
    (here / "in.png").write_bytes(b"")
    refused(here, EDIT, "in.png", "empty", "0 bytes")


def test_truncated_picture(here):
    whole = (here / "in.png").read_bytes()
    (here / "in.png").write_bytes(whole[: len(whole) // 2])
    refused(here, EDIT, "in.png", "broken|cut off|truncated")


def test_truncated_jpeg(here):
    Image.open(here / "in.png").save(here / "in.jpg")
    whole = (here / "in.jpg").read_bytes()
    (here / "in.jpg").write_bytes(whole[: len(whole) // 2])
    refused(here, ["edit", "in.jpg", "a", "-o", "out.png"], "in.jpg", "broken|cut off|truncated")


def test_no_picture(here):
    (here / "in.png").write_text("once upon a time")
    refused(here, EDIT, "in.png", "no picture|not a picture")


def test_folder_for_a_picture(here):
    refused(here, ["edit", ".", "a", "-o", "out.png"], "folder")


def test_zero_pixels(here):
    (here / "in.png").write_bytes(png(0, 10))
    refused(here, EDIT, "in.png", "0|broken")


def test_decompression_bomb(here):
    (here / "in.png").write_bytes(png(60_000, 60_000))
    refused(
        here, EDIT, "60.?000", r"3.?600.?000.?000",
        "limit", "--max-pixels",
    )  # fmt: skip
    # The limit can be switched: lower, and off (the file is then found to be broken).
    command = [*EDIT, "--max-pixels"]
    (here / "in.png").write_bytes(png(100, 100))
    refused(here, [*command, "9999"], r"10.?000", r"9.?999", "--max-pixels")
    refused(here, [*command, "0"], "broken|cut off|truncated")
    refused(here, [*command, "-5"], "--max-pixels", "-5")


def test_elongated_picture(here, tiny_model):
    Image.new("RGB", (3000, 2)).save(here / "in.png")
    command = [*EDIT, "--model", str(tiny_model)]
    refused(here, command, "3000", "elongated", "crop")
    refused(here, [*command, "--size-level", "128"], "3000", "128")


@pytest.mark.parametrize("words", ["", "  \n "])
def test_empty_instruction(here, words):
    refused(here, ["edit", "in.png", words, "-o", "out.png"], "prompt", "empty")


def test_endless_instruction(here):
    refused(here, ["edit", "in.png", "a" * 9000, "-o", "out.png"], "9000", "8000", "shorten")


def test_mask_of_another_size(here, tiny_model):
    Image.new("L", (32, 48)).save(here / "mask.png")
    refused(
        here,
        [*EDIT, "--model", str(tiny_model), "--mask", "mask.png"],
        "32.?.?.?48", "64.?.?.?48", "same size",
    )  # fmt: skip


def test_missing_mask(here, tiny_model):
    command = [*EDIT, "--model", str(tiny_model)]
    refused(here, [*command, "--mask", "no.png"], "no.png")


def test_unknown_model(here):
    command = [*EDIT, "--model", "giant"]
    refused(here, command, "'giant'", "mini", "folder")


def test_folder_that_is_no_model(here):
    command = [*EDIT, "--model", "."]
    refused(here, command, "model_index.json")


def test_model_of_another_family(here):
    (here / "other").mkdir()
    (here / "other" / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    command = [*EDIT, "--model", "other"]
    refused(here, command, "FluxPipeline", "Step1XEditPipeline")


def test_model_with_a_truncated_file(here, tiny_model):
    shutil.copytree(tiny_model, here / "model")
    file = next((here / "model" / "transformer").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])
    command = [*EDIT, "--model", "model"]
    refused(here, command, file.name, "cannot be read")
    file.unlink()
    refused(here, command, "transformer", "no safetensors file")
    (here / "model" / "vae" / "config.json").unlink()
    shutil.rmtree(here / "model" / "transformer")
    refused(here, command, "no transformer folder")


def test_output_folder_that_does_not_exist(here):
    refused(here, ["edit", "in.png", "a", "-o", "no/out.png"], "no", "exist|no such folder")


def test_output_that_is_a_folder(here):
    (here / "dir.png").mkdir()
    refused(here, ["edit", "in.png", "a", "-o", "dir.png"], "dir.png", "folder")


def test_unknown_output_format(here):
    refused(here, ["edit", "in.png", "a", "-o", "out.xyz"], "xyz", r"\.png")


@pytest.mark.parametrize("how", ["same", "link", "hard link", "other spelling"])
def test_output_that_is_the_input(here, how):
    out = {"same": "in.png", "other spelling": "../" + here.name + "/in.png"}.get(how, "link.png")
    if how == "link":
        (here / "link.png").symlink_to("in.png")
    if how == "hard link":
        (here / "link.png").hardlink_to(here / "in.png")
    refused(here, ["edit", "in.png", "a", "-o", out], "input", "--overwrite")


def test_second_output_that_is_the_input(here):
    shutil.move(here / "in.png", here / "out-2.png")
    command = ["edit", "out-2.png", "a", "-o", "out.png", "--num-images", "2"]
    refused(here, command, "out-2.png", "--overwrite")


def test_output_that_is_the_mask(here):
    shutil.copy(here / "in.png", here / "mask.png")
    command = ["edit", "in.png", "a", "-o", "mask.png", "--mask", "mask.png"]
    refused(here, command, "mask.png", "--overwrite")


@pytest.mark.parametrize(
    ("option", "value", "limit"),
    [
        ("--steps", "0", "1 to 1000"),
        ("--guidance", "31", "1 to 30"),
        ("--size-level", "8", "64 to"),
    ],
)
def test_setting_out_of_range(here, option, value, limit):
    refused(here, [*EDIT, option, value], option, value, limit)


@pytest.mark.parametrize(
    ("option", "value", "limit"),
    [
        ("--steps", "1001", "1 to 1000"),
        ("--steps", "many", "1 to 1000"),
        ("--guidance", "0.5", "1 to 30"),
        ("--guidance", "nan", "1 to 30"),
        ("--size-level", "100000", "to 2048"),
        ("--num-images", "0", "1 to 16"),
        ("--seed", "-1", "0 to"),
        ("--keep", "sometimes", "auto"),
        ("--dtype", "float8", "bfloat16"),
        ("--device", "tpu", "cuda"),
        ("--threads", "0", "1"),
        ("--weights", "fp7", "fp8"),
        ("--offload", "cloud", "disk"),
    ],
)
def test_every_setting_names_its_limit(here, monkeypatch, capsys, option, value, limit):
    """The other limits, in this process: they take the same way as those above."""
    monkeypatch.chdir(here)
    assert cli.run([*EDIT, option, value]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) == 1
    for word in (option, value, limit):
        assert word in said.err
    assert list(here.iterdir()) == [here / "in.png"]


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["edit", "in.png"], "INSTRUCTION"),
        (["edit", "in.png", "a"], "--output"),
        ([*EDIT, "--stepz", "3"], "--stepz"),
        (["paint"], "paint"),
        (["generate", "a", "-o", "out.png", "--width", "100"], "in steps of 16"),
        (["generate", "", "-o", "out.png"], "empty"),
        (["generate", "a", "-o", "no/out.png"], "no"),
        (["models", "show", "giant"], "giant"),
    ],
)
def test_wrong_command_line(here, command, says):
    refused(here, command, says)


BATCH = ["batch", "prompts.json", "--input-dir", ".", "--output-dir", "out"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"in.png": "a",\n  "b.png" "c"}', ["line 2", "column 11"]),
        ("", ["line 1"]),
        ("{}", ["prompts.json"]),
        ('["in.png"]', ["prompts.json"]),
        ('{"in.png": 3}', ["'in.png'", "int"]),
        ('{"in.png": "a", "in.png": "b"}', ["'in.png'", "twice"]),
        ('{"../in.png": "a"}', ["../in.png"]),
        ('{"/etc/in.png": "a"}', ["/etc/in.png"]),
        ('{"in.png": "\udcff"}', ["UTF-8", "byte 12"]),
        (None, ["prompts.json", "cannot be read"]),
    ],
)
def test_bad_prompt_json(here, text, says):
    (here / "out").mkdir()
    if text is not None:
        (here / "prompts.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    refused(here, BATCH, *says)


@pytest.mark.parametrize("missing", ["--input-dir", "--output-dir"])
def test_batch_folder_that_does_not_exist(here, missing):
    (here / "out").mkdir()
    (here / "prompts.json").write_text('{"in.png": "a"}')
    command = [*BATCH]
    command[command.index(missing) + 1] = "nowhere"
    refused(here, command, "nowhere", "not exist")


def test_bad_setting_of_a_batch(here):
    (here / "out").mkdir()
    (here / "prompts.json").write_text('{"in.png": "a"}')
    refused(here, [*BATCH, "--steps", "0"], "--steps", "1 to 1000")


def test_batch_onto_its_own_pictures_fails_item_by_item(here, tiny_model):
    (here / "prompts.json").write_text('{"in.png": "a", "none.png": "a"}')
    before = files_of(here)
    command = ["batch", "prompts.json", "--input-dir", ".", "--output-dir", "."]
    done = run(here, [*command, "--model", str(tiny_model)])
    assert done.returncode == 1
    assert done.stdout.strip() == "0 edited, 0 skipped (done), 2 failed"
    lines = done.stderr.splitlines()
    assert len(lines) == 2
    assert "in.png" in lines[0]
    assert "--overwrite" in lines[0]
    assert "none.png" in lines[1]
    assert files_of(here) == before


def test_no_command_shows_the_help(here):
    done = run(here, [])
    assert "edit" in done.stdout
    assert (done.returncode, done.stderr) == (2, "")


def test_help_and_errors_do_not_import_torch(here):
    """As `python -X importtime` sees it: the name of every module that was imported."""
    for command in (["--help"], ["edit", "--help"], ["models", "list"], ["edit", "no.png", "a"]):
        done = run(here, command, PYTHONPROFILEIMPORTTIME="1")
        imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
        assert "step1x_edit.apps.cli" in imported
        heavy = {"torch", "transformers", "diffusers", "scipy"}
        assert not heavy & imported, heavy & imported


def test_importing_the_package_imports_next_to_nothing():
    script = (
        "import sys, step1x_edit\n"
        "assert not {'torch', 'numpy', 'pydantic', 'PIL'} & set(sys.modules)\n"
        "from step1x_edit import EditRequest, InvalidRequest, RuntimeConfig\n"
        "assert 'torch' not in sys.modules\n"
        "assert set(step1x_edit.__all__) <= set(dir(step1x_edit))\n"
        "assert step1x_edit.__version__\n"
        "try: step1x_edit.Editer\n"
        "except AttributeError as error: assert 'Editer' in str(error)\n"
        "else: raise SystemExit('no error')\n"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
