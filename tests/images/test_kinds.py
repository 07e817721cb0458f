"""The odd kinds of picture: wide values, transparency, profiles, rotations, broken files."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from step1x_edit.errors import InvalidRequest
from step1x_edit.images import open_mask, open_picture

from ..pictures import (
    as_image,
    bomb,
    detailed,
    encoded,
    png_of,
    profile_that_swaps_red_and_blue,
    sixteen_bit_colour,
)

PICTURE = as_image(detailed(40, 24))
PIXELS = np.asarray(PICTURE, int)
UPRIGHT = {1: 0, 3: 2, 6: -1, 8: 1}  # EXIF orientation → quarter turns to the left


@pytest.fixture
def opened(tmp_path):
    def open_bytes(data: bytes, **options):
        path = tmp_path / "picture"
        path.write_bytes(data)
        return open_picture(path, **options)

    return open_bytes


def test_wide_values_are_scaled_by_their_range(opened):
    ramp = np.linspace(0, 1, 40 * 24, dtype=np.float32).reshape(24, 40)
    wanted = np.rint(ramp * 255)
    for data in (
        encoded(Image.fromarray(ramp), "TIFF"),
        encoded(Image.fromarray(ramp * 255), "TIFF"),
        encoded(Image.fromarray(ramp * 65535), "TIFF"),
        encoded(Image.fromarray(np.int32(ramp * 65535)), "TIFF"),
        encoded(Image.fromarray(np.int32(ramp * 2e9 - 1e9)), "TIFF"),
        encoded(Image.fromarray(np.uint16(ramp * 65535)), "TIFF"),
        encoded(Image.fromarray(np.uint16(ramp * 65535)), "PNG"),
    ):
        grey = np.asarray(opened(data).rgb, int)
        assert np.abs(grey - wanted[..., None]).max() <= 1


def test_a_dark_sixteen_bit_picture_stays_dark(opened):
    grey = np.asarray(opened(encoded(Image.new("I;16", (4, 4), 2570), "PNG")).rgb)
    assert (grey == 10).all()


def test_sixteen_bit_colours_keep_their_high_byte(opened):
    found = np.asarray(opened(sixteen_bit_colour(PIXELS * 257)).rgb, int)
    assert np.abs(found - PIXELS).max() <= 1


def test_values_that_are_no_numbers_are_refused(opened):
    values = np.full((4, 4), np.nan, np.float32)
    with pytest.raises(InvalidRequest, match="not numbers"):
        opened(encoded(Image.fromarray(values), "TIFF"))


def test_cmyk_of_photo_editors_is_not_inverted(opened):
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))  # red
    for data in (encoded(cmyk, "JPEG", quality=100), encoded(cmyk, "TIFF")):
        red, green, blue = opened(data).rgb.getpixel((4, 4))
        assert red > 200
        assert max(green, blue) < 60


def test_a_palette_may_have_a_transparent_colour(opened):
    image = Image.new("P", (4, 2), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((3, 1), 1)
    for kind in ("GIF", "PNG"):
        picture = opened(encoded(image, kind, transparency=1))
        assert np.asarray(picture.alpha).tolist() == [[255] * 4, [255, 255, 255, 0]]
        assert picture.rgb.getpixel((0, 0)) == (255, 0, 0)
    assert opened(encoded(image, "PNG")).alpha is None


def test_a_colour_may_stand_for_transparent(opened):
    image = Image.new("RGB", (2, 1), (10, 20, 30))
    image.putpixel((1, 0), (1, 2, 3))
    alpha = opened(encoded(image, "PNG", transparency=(1, 2, 3))).alpha
    assert np.asarray(alpha).tolist() == [[255, 0]]


def test_the_hidden_colours_of_a_clear_picture_are_kept_and_shown_on_white(opened):
    clear = PICTURE.convert("RGBA")
    clear.putalpha(0)
    picture = opened(encoded(clear, "PNG"))
    assert np.array_equal(np.asarray(picture.rgb), PIXELS)
    assert np.asarray(picture.on_white).min() == 255


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "AVIF", "GIF", "TIFF"])
def test_the_first_frame_is_taken(kind, opened):
    first, second = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    data = encoded(first, kind, save_all=True, append_images=[second])
    assert opened(data).rgb.getpixel((3, 3))[2] < 60


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_every_rotation_is_undone_once(orientation, opened):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for kind in ("PNG", "TIFF"):
        picture = opened(encoded(PICTURE, kind, exif=exif))
        assert np.array_equal(np.asarray(picture.rgb), np.rot90(PIXELS, UPRIGHT[orientation]))
        assert not picture.rgb.info  # else Pillow would write the rotation back


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_another_profile_is_converted_to_srgb(mode, opened):
    profile = profile_that_swaps_red_and_blue()
    data = encoded(PICTURE.convert(mode), "PNG", icc_profile=profile)
    found = np.asarray(opened(data).rgb, int)
    assert np.abs(found - PIXELS[..., ::-1]).max() <= 3


def test_a_broken_profile_is_left_out_and_said(opened, caplog):
    found = np.asarray(opened(encoded(PICTURE, "PNG", icc_profile=b"nonsense")).rgb)
    assert np.array_equal(found, PIXELS)
    assert "profile" in caplog.text


def test_lab_becomes_rgb(opened):
    lab = Image.new("LAB", (4, 4), (138, 128, 128))  # a middle grey
    red, green, blue = opened(encoded(lab, "TIFF")).rgb.getpixel((0, 0))
    assert abs(red - 128) < 10
    assert max(red, green, blue) - min(red, green, blue) <= 6


def test_a_bomb_is_refused_by_its_header(opened):
    with pytest.raises(InvalidRequest, match=r"3600000000 pixels .*limit of"):
        opened(bomb())


def test_the_limit_can_be_lifted_above_pillows_own(opened, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert opened(encoded(PICTURE, "GIF"), max_pixels=None).size == PICTURE.size
    assert Image.MAX_IMAGE_PIXELS == 100


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "AVIF", "TIFF", "BMP"])
def test_truncated_files_are_refused(kind, opened):
    data = encoded(as_image(detailed(64, 64)), kind)
    for share in (0.02, 0.3, 0.7):
        with pytest.raises(InvalidRequest) as refusal:
            opened(data[: int(len(data) * share)])
        assert "\n" not in str(refusal.value)


def test_pictures_without_pixels_are_refused(opened):
    for data in (png_of(0, 0, 8, 2, b""), b"P6 0 0 255\n"):
        with pytest.raises(InvalidRequest):
            opened(data)
    with pytest.raises(InvalidRequest, match="0 × 5"):
        open_picture(Image.new("RGB", (0, 5)))


def test_formats_that_run_programs_are_not_opened(opened):
    with pytest.raises(InvalidRequest, match="no picture"):
        opened(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"]),
    places=st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), min_size=1, max_size=6),
)
def test_damage_gives_a_picture_or_one_line(kind, places, tmp_path_factory):
    data = bytearray(encoded(PICTURE, kind))
    for share, value in places:
        data[int(share * len(data))] = value
    path = tmp_path_factory.mktemp("damaged") / "picture"
    path.write_bytes(data)
    try:
        assert open_picture(path, max_pixels=100_000).rgb.mode == "RGB"
    except InvalidRequest as refusal:
        assert "\n" not in str(refusal)  # noqa: PT017 - either outcome is right


def test_equal_pictures_have_equal_hashes_and_others_not():
    brighter = PICTURE.point(lambda value: min(255, value + 1))
    hashes = [open_picture(image).sha256 for image in (PICTURE, PICTURE.copy(), brighter)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_masks_are_read_as_yes_and_no():
    picture = open_picture(PICTURE)
    grey = Image.fromarray(np.tile(np.linspace(0, 255, 40).astype(np.uint8), (24, 1)))
    assert set(np.unique(np.asarray(open_mask(grey, picture)))) == {0, 255}
    painted = Image.new("RGBA", PICTURE.size, (255, 255, 255, 0))
    painted.paste((255, 255, 255, 255), (5, 5, 10, 10))
    assert open_mask(painted, picture).getbbox() == (5, 5, 10, 10)
    with pytest.raises(InvalidRequest, match="nothing may change"):
        open_mask(Image.new("L", PICTURE.size, 100), picture)
