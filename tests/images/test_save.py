"""Finished pictures on disk: formats, provenance, and what a failure leaves."""

import errno
import importlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from step1x_edit import images
from step1x_edit.errors import InvalidRequest, Step1XEditError
from step1x_edit.request import Provenance, read_provenance

save_module = importlib.import_module("step1x_edit.images.save")  # `images.save` is the function

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


def test_formats_that_are_too_small_are_refused(tmp_path):
    wide = Image.new("RGB", (16_384, 1))
    with pytest.raises(InvalidRequest, match=r"at most 16383 px .* save it as \.png"):
        images.save(wide, tmp_path / "out.webp", "{}")
    images.save(wide, tmp_path / "out.png", "{}")


@pytest.mark.parametrize("suffix", ["png", "webp", "avif", "tiff"])
def test_alpha_is_written_where_there_is_room(suffix, picture, tmp_path):
    clear = picture.convert("RGBA")
    clear.putalpha(77)
    images.save(clear, tmp_path / f"out.{suffix}", PROVENANCE.model_dump_json())
    alpha = np.asarray(Image.open(tmp_path / f"out.{suffix}").getchannel("A"), int)
    assert np.abs(alpha - 77).max() <= 2


def test_what_has_no_metadata_says_so(picture, tmp_path, caplog):
    images.save(picture, tmp_path / "out.bmp", PROVENANCE.model_dump_json())
    assert "no metadata" in caplog.text
    assert read_provenance(tmp_path / "out.bmp") is None


def test_a_kill_at_the_last_moment_leaves_the_old_file(picture, tmp_path, monkeypatch):
    path = tmp_path / "out.png"
    path.write_bytes(b"old")

    def killed(*_args):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        images.save(picture, path, "{}")
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["out.png"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tiff"])
def test_a_real_full_disk(suffix, picture, tmp_path, monkeypatch):
    """The device that is always full stands for the file beside the target."""
    monkeypatch.setattr(save_module.secrets, "token_hex", lambda _: "full")
    path = tmp_path / f"out.{suffix}"
    path.write_bytes(b"old")
    (tmp_path / f".out.full.{suffix}").symlink_to("/dev/full")
    with pytest.raises(Step1XEditError, match="the disk is full"):
        images.save(picture, path, "{}")
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_saved_files_have_the_usual_permissions(picture, tmp_path):
    images.save(picture, tmp_path / "out.png", "{}")
    (tmp_path / "other").touch()
    assert (tmp_path / "out.png").stat().st_mode == (tmp_path / "other").stat().st_mode
