"""Finished pictures on disk: formats, provenance, and what a failure leaves."""

import errno

import numpy as np
import pytest
from PIL import Image

from step1x_edit import images
from step1x_edit.errors import InvalidRequest, Step1XEditError
from step1x_edit.request import Provenance, read_provenance

PROVENANCE = Provenance(
    model="mini",
    model_hash="0123456789ab",
    prompt='把"OPEN"变成红色 🎈\nnow',
    seed=2**63 - 1,
    num_steps=20,
    guidance=1.5,
    size_level_px=128,
    width=144,
    height=96,
    source_name="фото.png",
    source_sha256="f" * 64,
)


@pytest.fixture
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8))


@pytest.mark.parametrize("suffix", ["png", "jpg", "jpeg", "webp", "avif", "tif", "tiff"])
def test_provenance_comes_back_from_every_format(suffix, picture, tmp_path):
    path = tmp_path / f"out.{suffix}"
    images.save(picture, path, PROVENANCE.model_dump_json())
    assert read_provenance(path) == PROVENANCE
    with Image.open(path) as saved:
        assert saved.size == picture.size


def test_png_is_exact_and_other_pictures_tell_nothing(picture, tmp_path):
    images.save(picture, tmp_path / "out.png", "{}")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out.png")), np.asarray(picture))
    picture.save(tmp_path / "plain.png")
    assert read_provenance(tmp_path / "plain.png") is None


def test_alpha_goes_on_white_where_a_format_has_none(picture, tmp_path):
    clear = picture.convert("RGBA")
    clear.putalpha(0)
    images.save(clear, tmp_path / "out.bmp", "{}")
    assert np.asarray(Image.open(tmp_path / "out.bmp")).min() == 255


def test_outputs_that_cannot_be_are_refused_before_anything_runs(picture, tmp_path):
    source = tmp_path / "in.png"
    picture.save(source)
    for path, says in (
        (tmp_path / "out.xyz", "unknown suffix"),
        (tmp_path / "none" / "out.png", "no such folder"),
        (source, "--overwrite"),
    ):
        with pytest.raises(InvalidRequest, match=says):
            images.check_output(path, source=source)
    images.check_output(source, source=source, overwrite=True)


def test_a_full_disk_keeps_the_old_file_and_leaves_nothing_beside(picture, tmp_path, monkeypatch):
    path = tmp_path / "out.png"
    path.write_bytes(b"old")

    def full(*_args, **_options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(Step1XEditError, match="the disk is full"):
        images.save(picture, path, "{}")
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["out.png"]
