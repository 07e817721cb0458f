"""Edits put back into a photograph, through a simulated small and noisy model."""

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from step1x_edit.images import open_picture, placing, restore

from ..pictures import as_image, detailed, disc, rendered, small

WIDTH, HEIGHT = 1200, 800
MODEL_SIZE = (144, 96)
CENTRE, RADIUS = (0.5, 0.5), 0.25
LUMA = np.array([0.299, 0.587, 0.114], np.float32)
NOISE = 0.05


def floats(image) -> np.ndarray:
    return np.asarray(image.convert("RGB"), np.float32) / 255


def edited(source: np.ndarray, wanted: np.ndarray, model_size=MODEL_SIZE, noise=NOISE, **options):
    """`restore` of what a model with errors would have made of a source and a wanted result."""
    picture = open_picture(as_image(source))
    before, after = (small(as_image(p), model_size) for p in (source, wanted))
    result = restore(picture, rendered(before), rendered(after, noise, seed=1), **options)
    return floats(result)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(-10 * np.log10(np.mean(np.square(a - b)) + 1e-12))


def detail_energy(picture: np.ndarray) -> float:
    """Energy of what is finer than four pixels."""
    return float(np.square(picture - ndimage.gaussian_filter(picture, (2, 2, 0))).mean())


def away_from(inside: np.ndarray) -> np.ndarray:
    """What lies ten pixels of the small model or more outside."""
    return ndimage.distance_transform_edt(~inside) > 10 * WIDTH / MODEL_SIZE[0]


def same(result: np.ndarray, source: np.ndarray) -> np.ndarray:
    return (np.rint(result * 255) == np.rint(floats(as_image(source)) * 255)).all(axis=-1)


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    return detailed(WIDTH, HEIGHT)


@pytest.fixture(scope="module")
def inside() -> np.ndarray:
    return disc(WIDTH, HEIGHT, CENTRE, RADIUS)


def test_black_and_white_of_three_megapixels_is_grey_and_sharp():
    source = detailed(2100, 1430)
    wanted = np.repeat((source @ LUMA)[..., None], 3, axis=-1)
    result = edited(source, wanted)
    assert np.ptp(np.rint(result * 255), axis=-1).max() <= 2
    assert 0.9 <= detail_energy(result) / detail_energy(wanted) <= 1.1
    assert psnr(result, wanted) > 38


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x * np.array([1.1, 1.0, 0.85], np.float32),
        lambda x: x**1.5 * np.array([0.4, 0.45, 0.7], np.float32),
        lambda x: x * x * (3 - 2 * x),
        lambda x: 1 - x,
    ],
    ids=["warm", "night", "contrast", "negative"],
)
def test_tone_and_colour_of_the_whole_picture_keep_its_detail(change, photo):
    wanted = change(photo).clip(0, 1)
    result = edited(photo, wanted)
    assert psnr(result, wanted) > 33
    assert 0.85 <= detail_energy(result) / detail_energy(wanted) <= 1.15


def test_faint_changes_of_the_whole_picture_reach_all_of_it(photo):
    wanted = (photo * np.array([1.04, 1.0, 0.94], np.float32)).clip(0, 1)
    result = edited(photo, wanted, noise=0.03)
    shift = (result - photo).mean(axis=(0, 1))
    assert shift == pytest.approx((wanted - photo).mean(axis=(0, 1)), abs=0.006)


def test_an_object_that_changes_colour_keeps_its_texture(photo, inside):
    source = photo.copy()
    source[inside] = source[inside] * np.array([0.9, 0.25, 0.2], np.float32) + [0.1, 0, 0]
    wanted = source.copy()
    wanted[inside] = source[inside][:, ::-1] * np.float32(0.9)
    result = edited(source, wanted, noise=0.02)
    well_inside = ndimage.binary_erosion(inside, iterations=20)
    assert psnr(result[well_inside], wanted[well_inside]) > 28
    crop = np.s_[320:480, 500:700]
    assert 0.8 <= detail_energy(result[crop]) / detail_energy(wanted[crop]) <= 1.2
    far = away_from(inside)
    assert same(result, source)[far].all()


def test_an_object_that_goes_leaves_no_ghost(inside):
    y = np.linspace(0.3, 0.7, HEIGHT, dtype=np.float32)[:, None, None]
    wanted = np.broadcast_to(y, (HEIGHT, WIDTH, 3)).copy()
    source = wanted.copy()
    source[inside] = [0.8, 0.15, 0.1]
    source[inside] += (0.1 * (detailed(WIDTH, HEIGHT, 3) - 0.5))[inside]
    result = edited(source, wanted, noise=0.02)
    steps = np.abs(np.diff(result, axis=1)).max(axis=-1)
    assert np.abs(np.diff(source, axis=1)).max() > 0.4
    assert steps.max() < 0.03
    assert np.abs(result - wanted)[inside].mean() < 0.02
    assert detail_energy(result) < 0.02 * detail_energy(source)


def test_an_object_that_comes_is_there_and_hides_what_was_behind_it(photo, inside):
    wanted = photo.copy()
    wanted[inside] = [0.95, 0.85, 0.1]
    result = edited(photo, wanted)
    middle = ndimage.binary_erosion(inside, iterations=30)
    assert np.abs(result - wanted)[middle].mean() < 0.03
    crop = np.s_[340:460, 530:670]
    assert detail_energy(result[crop]) < 0.05 * detail_energy(photo[crop])
    far = away_from(inside)
    assert same(result, photo)[far].all()


def test_a_tone_and_an_object_at_once(photo, inside):
    wanted = photo * np.array([0.5, 0.55, 0.8], np.float32)
    wanted[inside] = [0.95, 0.9, 0.8]
    result = edited(photo, wanted)
    far = away_from(inside)
    assert psnr(result[far], wanted[far]) > 33
    middle = ndimage.binary_erosion(inside, iterations=30)
    assert np.abs(result - wanted)[middle].mean() < 0.04


def test_noise_alone_changes_nothing_and_is_said(photo, caplog):
    result = edited(photo, photo, noise=0.08)
    assert same(result, photo).all()
    assert "no change" in caplog.text


def test_always_keeps_what_auto_would_touch(photo):
    source = photo.copy()
    source[:, : WIDTH // 2] = (source[:, : WIDTH // 2] @ LUMA)[..., None]
    source[:, : WIDTH // 2, 2] += 0.01
    wanted = np.repeat((source @ LUMA)[..., None], 3, axis=-1)
    auto, always = (edited(source, wanted, keep=keep) for keep in ("auto", "always"))
    assert np.ptp(np.rint(auto * 255), axis=-1).max() <= 2
    assert same(always, source)[:, : WIDTH // 3].all()
    assert same(always, source)[:, 2 * WIDTH // 3 :].mean() < 0.1


def test_off_is_the_enlarged_result(photo):
    result = rendered(small(as_image(photo), MODEL_SIZE), 0.1)
    found = restore(open_picture(as_image(photo)), result, result, keep="off")
    wanted = as_image(result).resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)
    assert np.array_equal(np.asarray(found), np.asarray(wanted))


@pytest.mark.parametrize("keep", ["auto", "always", "off"])
def test_outside_a_mask_every_pixel_stays_and_inside_the_edit_shows(keep, photo):
    wanted = photo[..., ::-1] * np.float32(0.7)
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[200:500, 301:799] = 255
    mask[600:603] = 255
    result = edited(photo, wanted, keep=keep, mask=Image.fromarray(mask))
    assert same(result, photo)[mask == 0].all()
    middle = np.s_[230:470, 331:769]
    assert psnr(result[middle], wanted[middle]) > (30 if keep != "off" else 18)
    assert not same(result, photo)[601].all()


def test_a_mask_is_soft_inside(photo):
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[200:600, 300:900] = 255
    flat = np.full_like(photo, 0.2)
    result = edited(flat, flat + np.float32(0.5), mask=Image.fromarray(mask))
    assert np.abs(np.diff(result[400], axis=0)).max() < 0.2


@pytest.mark.parametrize("keep", ["auto", "off"])
def test_alpha_comes_back(keep, photo):
    image = as_image(photo).convert("RGBA")
    alpha = Image.fromarray(np.uint8(np.arange(WIDTH) % 256)[None].repeat(HEIGHT, 0))
    image.putalpha(alpha)
    result = rendered(small(as_image(photo), MODEL_SIZE))
    found = restore(open_picture(image), result, result, keep=keep)
    assert found.mode == "RGBA"
    assert np.array_equal(np.asarray(found.getchannel("A")), np.asarray(alpha))


def test_bytes_and_floats_give_the_same(photo, inside):
    wanted = photo.copy()
    wanted[inside] = 0.1
    picture = open_picture(as_image(photo))
    pair = [as_image(rendered(small(as_image(p), MODEL_SIZE))) for p in (photo, wanted)]
    as_bytes = [np.asarray(image) for image in pair]
    as_floats = [floats(image) for image in pair]
    assert np.array_equal(
        np.asarray(restore(picture, *as_bytes)), np.asarray(restore(picture, *as_floats))
    )


def test_tiles_leave_no_seams(photo, inside, monkeypatch):
    source = photo.copy()
    source[inside] *= np.array([0.9, 0.25, 0.2], np.float32)
    wanted = source.copy()
    wanted[inside] = source[inside][:, ::-1]
    wanted[:200, :300] = 0.9
    tiled = edited(source, wanted)
    monkeypatch.setattr(placing, "TILE_PX", 10_000)
    whole = edited(source, wanted)
    assert np.abs(tiled - whole).max() <= 1.1 / 255
    assert (tiled != whole).mean() < 0.001


@pytest.mark.parametrize("size", [(37, 53), (17, 9), (640, 20)])
def test_small_and_odd_sizes(size):
    source = detailed(*size)
    wanted = np.repeat((source @ LUMA)[..., None], 3, axis=-1)
    result = edited(source, wanted, model_size=(96, 64), noise=0)
    assert result.shape == source.shape
    assert psnr(result, wanted) > 25


def test_models_of_large_sizes(photo, inside):
    wanted = photo.copy()
    wanted[inside] = [0.95, 0.85, 0.1]
    result = edited(photo, wanted, model_size=(960, 640), noise=0.02)
    far = away_from(inside)
    assert same(result, photo)[far].all()
    middle = ndimage.binary_erosion(inside, iterations=15)
    assert np.abs(result - wanted)[middle].mean() < 0.02


def test_the_source_and_the_arguments_stay_as_they_are(photo, inside):
    wanted = photo.copy()
    wanted[inside] = 0.1
    picture = open_picture(as_image(photo))
    before, after = (rendered(small(as_image(p), MODEL_SIZE)) for p in (photo, wanted))
    copies = np.asarray(picture.rgb).copy(), before.copy(), after.copy()
    first, second = (restore(picture, before, after) for _ in range(2))
    assert np.array_equal(np.asarray(first), np.asarray(second))
    for kept, now in zip(copies, (np.asarray(picture.rgb), before, after), strict=True):
        assert np.array_equal(kept, now)
