"""The command line at work on a tiny random model; what it refuses is in `test_bad_input`.

Whole processes that load the networks take seconds each. They are few: what does not need one runs
`cli.run` in this process.
"""

from __future__ import annotations

import json
import re
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from step1x_edit.apps import cli
from step1x_edit.checkpoints.catalog import CATALOG
from step1x_edit.request import read_provenance

from .command import STEP1X, files_of, refused, run

SIZE = (72, 50)
EDIT = ["edit", "in.png", "make it red", "-o", "out.png"]


@pytest.fixture
def here(tmp_path):
    """A folder with a good picture in it."""
    pixels = np.random.default_rng(0).integers(0, 256, (*SIZE[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "in.png")
    return tmp_path


@pytest.fixture
def say(here, monkeypatch, capsys, tiny_model):
    """Run a command in this process, in `here`, and give back exit code, stdout and stderr."""
    monkeypatch.chdir(here)

    def said(*command: str, model: bool = True):
        code = cli.run([*command, *(["--model", str(tiny_model)] if model else [])])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return said


def pixels_of(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


@pytest.mark.slow
def test_edit_through_the_installed_command(here, tiny_model):
    options = ["--seed", "3", "--num-images", "2", "--keep", "off"]
    done = run(here, [*EDIT, "--model", str(tiny_model), *options])
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["out-1.png", "out-2.png"]
    assert all("seed 3" in line and line.endswith(" s") for line in lines)
    assert set(files_of(here)) == {"in.png", "out-1.png", "out-2.png"}
    one, two = (pixels_of(here / name) for name in ("out-1.png", "out-2.png"))
    assert one.shape == two.shape == (*SIZE[::-1], 3)
    assert not np.array_equal(one, two)


def test_json_line_says_how_to_make_the_picture_again(say, here, tiny_model):
    options = ["--json", "--steps", "3", "--guidance", "4", "--keep", "off", "--negative", "blur"]
    code, out, err = say(*EDIT, *options)
    assert (code, err) == (0, "")
    assert len(out.splitlines()) == 1
    said = json.loads(out)
    assert said["images"] == ["out.png"]
    assert said["seconds"].keys() >= {"read", "model", "restore"}
    made = read_provenance(here / "out.png")
    dumped = made.model_dump(mode="json")
    assert {name: said[name] for name in dumped} == dumped
    assert (made.num_steps, made.guidance, made.keep) == (3, 4, "off")
    assert (made.prompt, made.negative_prompt) == ("make it red", "blur")
    assert (made.width, made.height) == (64, 48)
    assert made.source_name == "in.png"
    # The drawn seed makes the same picture, and --quiet says nothing.
    again = [*EDIT[:-1], "again.png", *options[1:], "--seed", str(said["seed"]), "--quiet"]
    assert say(*again) == (0, "", "")
    assert np.array_equal(pixels_of(here / "out.png"), pixels_of(here / "again.png"))
    assert say(*again[:-3], "--seed", "5", "--quiet") == (0, "", "")
    assert not np.array_equal(pixels_of(here / "out.png"), pixels_of(here / "again.png"))


def test_warnings_of_the_package_are_notes_at_the_end(say, here):
    code, out, err = say(*EDIT[:-1], "out.bmp", "--keep", "off")
    assert code == 0
    assert out.startswith("out.bmp  seed ")
    assert re.fullmatch(r"step1x: note: .*\.bmp.*\n", err)
    assert say(*EDIT[:-1], "out.bmp", "--keep", "off", "--quiet") == (0, "", "")


def test_the_input_is_replaced_where_that_is_wanted(say, here):
    before = pixels_of(here / "in.png")
    code, _, err = say("edit", "in.png", "a", "-o", "in.png", "--overwrite", "--keep", "off")
    assert (code, err) == (0, "")
    assert not np.array_equal(before, pixels_of(here / "in.png"))
    assert set(files_of(here)) == {"in.png"}


def test_generate(say, here):
    code, out, _ = say("generate", "a red car", "-o", "car.webp", "--width", "96", "--height", "32")
    assert code == 0
    assert out.startswith("car.webp  seed ")
    assert Image.open(here / "car.webp").size == (96, 32)
    assert read_provenance(here / "car.webp").source_sha256 is None


@pytest.mark.slow
def test_over_long_instruction(here, tiny_model):
    command = ["edit", "in.png", "word " * 40, "-o", "out.png", "--model", str(tiny_model)]
    refused(here, command, r"\d+ tokens", "limit of 96", "shorten it by")


@pytest.mark.slow
def test_model_folder_with_wrong_tensors(here, tiny_model):
    """Missing, extra and misshapen: all three are named at once."""
    shutil.copytree(tiny_model, here / "model")
    file = next((here / "model" / "transformer").glob("*.safetensors"))
    tensors = load_file(file)
    del tensors["x_embedder.bias"]
    tensors["y_embedder.bias"] = torch.zeros(3)
    tensors["proj_out.bias"] = torch.zeros(5)
    save_file(tensors, file, metadata={"format": "pt"})
    line = refused(here, [*EDIT, "--model", "model"], "x_embedder.bias", "y_embedder.bias")
    assert "proj_out.bias" in line


@pytest.mark.slow
def test_full_disk(here, tiny_model):
    """A limit on the size of files fails a write in the middle, as a full disk does."""
    before = files_of(here)
    done = subprocess.run(
        [str(STEP1X), *EDIT, "--model", str(tiny_model)],
        cwd=here, capture_output=True, text=True, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)),
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert re.search("out.png.*(disk|File too large)", done.stderr)
    assert done.stdout == ""
    assert files_of(here) == before


@pytest.mark.slow
def test_ctrl_c_leaves_nothing_behind(here, tiny_model):
    before = files_of(here)
    command = [str(STEP1X), *EDIT, "--model", str(tiny_model), "--steps", "1000"]
    process = subprocess.Popen(
        command, cwd=here, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # A shell that runs the tests in its background has Ctrl-C ignored in all its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    maps = Path(f"/proc/{process.pid}/maps")
    while process.poll() is None and "libtorch_cpu" not in maps.read_text():
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert (process.returncode, out) == (130, "")
    assert len(err.splitlines()) == 1, err
    assert "interrupted" in err
    assert files_of(here) == before


@pytest.mark.parametrize("when", ["denoising", "writing"])
def test_ctrl_c_at_the_worst_moment(say, here, monkeypatch, when):
    (here / "out.png").write_bytes(b"old")
    save = Image.Image.save

    def half(image, target, *arguments, **options):
        save(image, target, *arguments, **options)
        raise KeyboardInterrupt

    def stop(*_: object, **__: object):
        raise KeyboardInterrupt

    if when == "writing":
        monkeypatch.setattr(Image.Image, "save", half)
    else:
        monkeypatch.setattr("step1x_edit.model.pipeline.euler_sample", stop)
    before = files_of(here)
    code, out, err = say(*EDIT)
    assert (code, out) == (130, "")
    assert err == "step1x: interrupted; nothing was left half-written\n"
    assert files_of(here) == before


def test_ctrl_c_in_an_import_is_an_interrupt_too(say, here, monkeypatch):
    """A module of C++ that it falls into says that it cannot be imported."""

    def stop(*_: object, **__: object):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            raise ImportError("initialization failed") from error

    monkeypatch.setattr("step1x_edit.model.pipeline.euler_sample", stop)
    code, out, err = say(*EDIT)
    assert (code, out) == (130, "")
    assert err == "step1x: interrupted; nothing was left half-written\n"


def test_a_failure_while_running_is_one_line_with_exit_1(say, here, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("the cat\nsat on it")

    monkeypatch.setattr("step1x_edit.editor.Editor.edit", fail)
    code, out, err = say(*EDIT)
    assert (code, out) == (1, "")
    assert err == "step1x: RuntimeError: the cat sat on it (`step1x --debug …` shows where)\n"
    with pytest.raises(RuntimeError, match="the cat"):
        say(*EDIT, "--debug")
    assert set(files_of(here)) == {"in.png"}


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory. Tried …")])
def test_out_of_memory_names_the_way_out(say, monkeypatch, error):
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("step1x_edit.editor.Editor.edit", fail)
    code, _, err = say(*EDIT)
    assert code == 1
    assert "--size-level" in err


class TestBatch:
    """Three pictures: two can be edited, one is missing."""

    COMMAND = ("batch", "prompts.json", "--input-dir", ".", "--output-dir", "out")

    @pytest.fixture
    def folder(self, here):
        Image.open(here / "in.png").rotate(90).save(here / "b.jpg")
        self.write(here, {"in.png": "make it red", "b.jpg": "变成黑白", "none.png": "a"})
        (here / "out").mkdir()
        return here

    def write(self, folder, prompts):
        (folder / "prompts.json").write_text(json.dumps(prompts), encoding="utf-8")

    def test_resumes(self, say, folder, monkeypatch):
        code, out, err = say(*self.COMMAND)
        assert (code, out) == (1, "2 edited, 0 skipped (done), 1 failed\n"), err
        assert err.startswith("step1x: none.png: ")
        assert len(err.splitlines()) == 1
        made = files_of(folder / "out")
        assert set(made) == {"in.png", "b.jpg"}
        assert read_provenance(folder / "out" / "b.jpg").prompt == "变成黑白"
        assert read_provenance(folder / "out" / "b.jpg").seed == 42

        # All done: no model is loaded, nothing is written.
        with monkeypatch.context() as patch:
            patch.setattr("step1x_edit.editor.Editor.load", None)
            code, out, _ = say(*self.COMMAND)
        assert (code, out) == (1, "0 edited, 2 skipped (done), 1 failed\n")
        assert files_of(folder / "out") == made

        # Another instruction, another source, a broken result: each is made anew.
        self.write(folder, {"in.png": "make it blue", "b.jpg": "变成黑白"})
        assert say(*self.COMMAND) == (0, "1 edited, 1 skipped (done), 0 failed\n", "")
        Image.open(folder / "in.png").rotate(90).save(folder / "b.jpg", quality=50)
        assert say(*self.COMMAND) == (0, "1 edited, 1 skipped (done), 0 failed\n", "")
        result = folder / "out" / "in.png"
        result.write_bytes(result.read_bytes()[:-300])
        assert say(*self.COMMAND) == (0, "1 edited, 1 skipped (done), 0 failed\n", "")
        assert say(*self.COMMAND) == (0, "0 edited, 2 skipped (done), 0 failed\n", "")
        for option in (("--seed", "1"), ("--steps", "3"), ("--guidance", "3"), ("--keep", "off")):
            done = say(*self.COMMAND, *option, "--quiet")
            assert done == (0, "", "")
            assert say(*self.COMMAND, *option)[1] == "0 edited, 2 skipped (done), 0 failed\n"

    def test_goes_on_after_a_failure_in_the_middle(self, say, folder):
        self.write(folder, {"in.png": "word " * 40, "b.jpg": "a", "c/d.png": "a"})
        (folder / "c").mkdir()
        shutil.copy(folder / "in.png", folder / "c" / "d.png")
        code, out, err = say(*self.COMMAND)
        assert (code, out) == (1, "2 edited, 0 skipped (done), 1 failed\n")
        assert "limit of 96" in err
        assert set(files_of(folder / "out")) == {"b.jpg", "c/d.png"}


def test_models_show(say, tiny_model):
    code, out, _ = say("models", "show", str(tiny_model), model=False)
    assert code == 0
    assert "release v1.1; by itself 2 steps, guidance 2, size level 64 px" in out
    rows = {line.split()[0]: line for line in out.splitlines()}
    tensors = load_file(next((tiny_model / "transformer").glob("*.safetensors")))
    assert "Step1XEditTransformer2DModel" in rows["transformer"]
    assert f" {len(tensors)} " in rows["transformer"]
    assert f" {sum(t.numel() for t in tensors.values()):,} " in rows["transformer"]
    assert " F32 " in rows["transformer"]
    assert "Qwen2_5_VLProcessor" in rows["processor"]


def test_doctor_reports_and_is_honest_about_the_mini(say, monkeypatch, tiny_model, here):
    entry = CATALOG["mini"]
    monkeypatch.setitem(CATALOG, "mini", entry._replace(location=str(tiny_model)))
    code, out, _ = say("doctor", model=False)
    assert code == 0
    rows = {line.split()[0]: line for line in out.splitlines() if line}
    assert rows["mini"].split() == ["mini", "complete"]
    assert f"torch {torch.__version__.split('+')[0]}" in rows["packages"]
    assert rows["memory"].endswith("GB")
    monkeypatch.setitem(CATALOG, "mini", entry._replace(location=str(here)))
    code, out, _ = say("doctor", model=False)
    assert code == 1
    assert "model_index.json" in out
