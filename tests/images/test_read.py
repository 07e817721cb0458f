"""Pictures of every common kind, and those that cannot be read."""

import io

import numpy as np
import pytest
from PIL import Image, ImageCms

from step1x_edit.errors import InvalidRequest
from step1x_edit.images import open_mask, open_picture

RAMP = np.linspace(0, 255, 32 * 24).reshape(24, 32).astype(np.uint8)
COLOURS = np.stack([RAMP, RAMP[::-1], RAMP[:, ::-1]], -1)


@pytest.mark.parametrize(
    ("suffix", "options"),
    [
        ("png", {}),
        ("bmp", {}),
        ("tiff", {}),
        ("webp", {"lossless": True}),
        ("jpg", {"quality": 100, "subsampling": 0}),
        ("avif", {"quality": 100, "subsampling": "4:4:4"}),
    ],
)
def test_common_kinds_keep_their_colours(suffix, options, tmp_path):
    path = tmp_path / f"picture.{suffix}"
    Image.fromarray(COLOURS).save(path, **options)
    picture = open_picture(path)
    assert picture.size == (32, 24)
    assert picture.name == path.name
    assert picture.alpha is None
    assert np.abs(np.asarray(picture.rgb, int) - COLOURS).max() <= 4


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise
    Image.fromarray(COLOURS).save(tmp_path / "turned.png", exif=exif)
    picture = open_picture(tmp_path / "turned.png")
    assert picture.size == (24, 32)
    assert np.array_equal(np.asarray(picture.rgb), np.rot90(COLOURS, -1))


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path):
    deep = np.linspace(0, 65535, 32 * 24).reshape(24, 32).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    grey = np.asarray(open_picture(tmp_path / "deep.png").rgb, int)[..., 0]
    assert np.abs(grey - deep / 257).max() <= 1


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "RGBA", "LA"])
def test_modes_become_rgb(mode, tmp_path):
    image = Image.fromarray(COLOURS).convert("RGBA" if mode == "LA" else "RGB").convert(mode)
    path = tmp_path / ("picture.tiff" if mode == "CMYK" else "picture.png")
    image.save(path)
    picture = open_picture(path)
    assert picture.rgb.mode == "RGB"
    expected = np.asarray(image.convert("RGB"), int)
    assert np.abs(np.asarray(picture.rgb, int) - expected).mean() <= 2


def test_alpha_is_set_aside(tmp_path):
    image = Image.fromarray(COLOURS).convert("RGBA")
    image.putalpha(Image.fromarray(RAMP))
    image.save(tmp_path / "clear.png")
    picture = open_picture(tmp_path / "clear.png")
    assert picture.alpha is not None
    assert np.array_equal(np.asarray(picture.alpha), RAMP)


def test_the_first_frame_of_an_animation_is_taken(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert open_picture(tmp_path / "moving.gif").rgb.getpixel((0, 0)) == (255, 0, 0)


def test_an_embedded_srgb_profile_changes_nothing(tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(COLOURS).save(tmp_path / "srgb.png", icc_profile=profile)
    found = np.asarray(open_picture(tmp_path / "srgb.png").rgb, int)
    assert np.abs(found - COLOURS).max() <= 1


def png_bytes(size=(64, 64)) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise(size, 50).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "no such file"),
        (b"", "empty"),
        (b"not a picture at all", "is no picture"),
        (png_bytes()[:1500], "broken or cut off"),
    ],
    ids=["missing", "empty", "text", "truncated"],
)
def test_unusable_files_are_refused_in_one_line(content, says, tmp_path):
    path = tmp_path / "picture.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InvalidRequest, match=says) as refusal:
        open_picture(path)
    assert "\n" not in str(refusal.value)
    assert str(path) in str(refusal.value)


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(InvalidRequest, match="is a folder"):
        open_picture(tmp_path)


def test_the_size_limit_is_stated_switchable_and_leaves_pillow_alone(tmp_path):
    limit = Image.MAX_IMAGE_PIXELS
    path = tmp_path / "large.png"
    path.write_bytes(png_bytes())
    with pytest.raises(InvalidRequest, match=r"4096 pixels .* limit of 4000"):
        open_picture(path, max_pixels=4000)
    assert open_picture(path, max_pixels=None).size == (64, 64)
    assert limit == Image.MAX_IMAGE_PIXELS


def test_equal_files_have_equal_hashes(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(png_bytes((9, 9)) if name == "a.png" else b"")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes())
    first, second = (open_picture(tmp_path / name) for name in ("a.png", "b.png"))
    assert first.sha256 == second.sha256


def test_a_mask_of_another_size_is_refused():
    picture = open_picture(Image.new("RGB", (10, 10)))
    assert open_mask(Image.new("L", (10, 10), 255), picture).mode == "L"
    with pytest.raises(InvalidRequest, match="9 × 10") as refusal:
        open_mask(Image.new("L", (9, 10)), picture)
    assert "10 × 10" in str(refusal.value)
