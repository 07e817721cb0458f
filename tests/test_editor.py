"""`Editor` on the tiny random model: requests in, finished pictures with their provenance out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from step1x_edit import Editor, EditRequest, InvalidRequest, RuntimeConfig
from step1x_edit.checkpoints.contents import fingerprint
from step1x_edit.errors import CheckpointError
from step1x_edit.request import read_provenance

from .tiny_model import SETTINGS, write_tiny_model

SIZE = (150, 100)


@pytest.fixture(scope="module")
def editor(tiny_model):
    return Editor.load(str(tiny_model))


@pytest.fixture
def file(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (*SIZE[::-1], 3), dtype=np.uint8)
    path = tmp_path / "in.png"
    Image.fromarray(pixels).save(path)
    return path


def pixels_of(image) -> np.ndarray:
    return np.asarray(image.convert("RGB"))


def test_result_has_the_pictures_size_and_says_how_it_was_made(editor, file, tiny_model):
    request = EditRequest(image=file, prompt="make it red", seed=7, keep="off")
    result = editor.edit(request)
    made = result.provenance
    assert [image.size for image in result.images] == [SIZE]
    assert (made.model, made.model_hash) == (str(tiny_model), fingerprint(tiny_model))
    assert (made.prompt, made.seed, made.keep) == ("make it red", 7, "off")
    assert (made.num_steps, made.guidance, made.size_level_px) == tuple(SETTINGS.values())
    assert (made.width, made.height) == (64, 48)  # 79 × 53, down to multiples of 16
    assert made.source_name == "in.png"
    assert set(result.seconds) == {"read", "model", "restore"}
    assert min(result.seconds.values()) > 0


def test_the_provenance_is_enough_to_make_it_again(editor, file, tmp_path):
    first = editor.edit(EditRequest(image=file, prompt="make it red", keep="off"))
    (saved,) = first.save([tmp_path / "out.png"])
    made = read_provenance(saved)
    assert made == first.provenance
    again = editor.edit(
        EditRequest(
            image=file, prompt=made.prompt, negative_prompt=made.negative_prompt, seed=made.seed,
            num_steps=made.num_steps, guidance=made.guidance, size_level_px=made.size_level_px,
            keep=made.keep,
        )
    )  # fmt: skip
    assert np.array_equal(pixels_of(Image.open(saved)), pixels_of(again.images[0]))
    assert again.provenance == made


def test_drawn_seeds_differ_and_are_reported(editor, file):
    request = EditRequest(image=file, prompt="a", keep="off")
    one, other = editor.edit(request), editor.edit(request)
    assert one.provenance.seed != other.provenance.seed
    assert not np.array_equal(pixels_of(one.images[0]), pixels_of(other.images[0]))


def test_raw_results_are_the_pipelines_own(editor, file):
    result = editor.edit(EditRequest(image=file, prompt="a", seed=1, keep="off", guidance=3))
    raw = editor.pipeline(
        Image.open(file), "a", guidance_scale=3, generator=torch.Generator().manual_seed(1)
    ).images[0]
    enlarged = pixels_of(raw.resize(SIZE, Image.Resampling.LANCZOS)).astype(int)
    assert np.abs(enlarged - pixels_of(result.images[0])).mean() < 3


def test_outside_a_mask_every_pixel_stays(editor, file):
    mask = np.zeros(SIZE[::-1], np.uint8)
    mask[20:80, 30:90] = 255
    request = EditRequest(image=file, mask=Image.fromarray(mask), prompt="a", seed=1)
    result = editor.edit(request)
    same = (pixels_of(result.images[0]) == pixels_of(Image.open(file))).all(-1)
    assert same[mask == 0].all()
    assert not same[mask > 0].all()
    assert result.provenance.mask_sha256
    assert editor.edit(EditRequest(image=file, prompt="a")).provenance.mask_sha256 is None


def test_several_results(editor, file, tmp_path):
    result = editor.edit(EditRequest(image=file, prompt="a", seed=1, num_images=3, keep="off"))
    assert len({pixels_of(image).tobytes() for image in result.images}) == 3
    paths = result.save([tmp_path / f"{i}.png" for i in range(3)])
    assert [read_provenance(path).index for path in paths] == [0, 1, 2]
    first = editor.edit(EditRequest(image=file, prompt="a", seed=1, keep="off"))
    assert np.array_equal(pixels_of(first.images[0]), pixels_of(result.images[0]))


def test_drawing_from_text(editor):
    result = editor.edit(EditRequest(prompt="a red car", width=96, height=32, seed=1))
    assert result.images[0].size == (96, 32)
    assert (result.provenance.width, result.provenance.height) == (96, 32)
    assert result.provenance.source_sha256 is None


def test_progress_counts_the_steps(editor, file):
    seen = []
    editor.edit(
        EditRequest(image=file, prompt="a", num_steps=3), on_progress=lambda *now: seen.append(now)
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_bad_pictures_are_refused_before_the_networks_run(editor, tmp_path, monkeypatch):
    monkeypatch.setattr(editor, "pipeline", None)
    with pytest.raises(InvalidRequest, match=r"none\.png"):
        editor.edit(EditRequest(image=tmp_path / "none.png", prompt="a"))
    with pytest.raises(InvalidRequest, match="same size"):
        editor.edit(
            EditRequest(image=Image.new("RGB", (32, 32)), mask=Image.new("L", (8, 8)), prompt="a")
        )


def test_runtime(tiny_model, file):
    threads = torch.get_num_threads()
    try:
        loaded = Editor.load(str(tiny_model), RuntimeConfig(dtype="bfloat16", threads=1))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)
    assert loaded.pipeline.transformer.dtype == torch.bfloat16
    assert loaded.pipeline.text_encoder.dtype == torch.bfloat16
    assert loaded.pipeline.vae.dtype == torch.float32
    assert loaded.edit(EditRequest(image=file, prompt="a")).images[0].size == SIZE


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device is there")
def test_device_that_is_not_there_is_refused(tiny_model):
    with pytest.raises(InvalidRequest, match="'cuda'"):
        Editor.load(str(tiny_model), RuntimeConfig(device="cuda"))


def test_unknown_models(tmp_path):
    with pytest.raises(InvalidRequest, match="unknown model 'giant'"):
        Editor.load("giant")
    with pytest.raises(CheckpointError, match=r"model_index\.json"):
        Editor.load(str(tmp_path))


def test_first_release_cannot_draw(tmp_path):
    editor = Editor.load(str(write_tiny_model(tmp_path, version="v1.0")))
    with pytest.raises(InvalidRequest, match="picture to edit"):
        editor.edit(EditRequest(prompt="a red car"))
