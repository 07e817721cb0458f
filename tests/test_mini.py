"""The model that ships: through the installed command, on real photographs."""

import json
import subprocess
import sys
from pathlib import Path
from statistics import mean

import numpy as np
import pytest
from PIL import Image, ImageFilter

from step1x_edit.checkpoints.catalog import MINI_FOLDER
from step1x_edit.datagen.operators import OPERATORS
from step1x_edit.editor import Editor
from step1x_edit.request import EditRequest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (MINI_FOLDER / "model_index.json").exists(),
        reason="the mini's weights are not in this tree",
    ),
]

STEP1X = Path(sys.executable).parent / "step1x"
PHOTOGRAPH = Path(__file__).parent.parent / "examples" / "coffee.jpg"
LIMIT_BYTES = 48_000_000
MAX_SPREAD = 2
"""Most that the channels of a grey pixel may differ, of 255."""


def edit(picture: Path, instruction: str, out: Path, *options: str) -> Image.Image:
    command = [str(STEP1X), "edit", str(picture), instruction, "-o", str(out), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return Image.open(out)


@pytest.fixture(scope="module")
def three_megapixels(tmp_path_factory) -> Path:
    """The example photograph at 3 megapixels, with the grain that enlarging took from it."""
    path = tmp_path_factory.mktemp("photograph") / "photograph.png"
    with Image.open(PHOTOGRAPH) as file:
        big = file.convert("RGB").resize((2048, 1536), Image.Resampling.LANCZOS)
    grain = np.random.default_rng(0).normal(0, 6, (1536, 2048, 1))
    Image.fromarray((np.asarray(big) + grain).clip(0, 255).astype(np.uint8)).save(path)
    return path


def detail(picture: Image.Image) -> np.ndarray:
    grey = np.asarray(picture.convert("L"), np.float32)
    return grey - np.asarray(picture.convert("L").filter(ImageFilter.GaussianBlur(2)), np.float32)


def spread(picture: Image.Image) -> float:
    """99.9 % of the pixels have channels that differ by no more, of 255."""
    return float(np.quantile(np.ptp(np.asarray(picture.convert("RGB"), np.int16), axis=-1), 0.999))


def test_the_shipped_folder_is_small_enough():
    files = [file for file in MINI_FOLDER.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= LIMIT_BYTES


def test_a_photograph_becomes_grey_and_stays_sharp(three_megapixels, tmp_path):
    result = edit(three_megapixels, "make it black and white", tmp_path / "a.png", "--seed", "1")
    again = edit(three_megapixels, "make it black and white", tmp_path / "b.png", "--seed", "1")
    source = Image.open(three_megapixels)
    pixels = np.asarray(result.convert("RGB"), np.int16)
    assert result.size == source.size
    assert spread(source) > 20, "grey already"
    assert np.ptp(pixels, axis=-1).max() <= MAX_SPREAD, "not grey"
    assert np.std(detail(result)) >= 0.9 * np.std(detail(source)), "detail of the source is lost"
    correlation = np.corrcoef(np.asarray(source.convert("L")).ravel(), pixels[..., 0].ravel())[0, 1]
    assert correlation >= 0.95, f"the picture is another one: correlation {correlation:.3f}"
    assert np.array_equal(pixels, np.asarray(again.convert("RGB"), np.int16)), "not repeatable"


def test_the_demo_is_grey(tmp_path):
    result = edit(PHOTOGRAPH, "make it black and white", tmp_path / "demo.png", "--seed", "0")
    with Image.open(PHOTOGRAPH) as source:
        assert spread(source) > 20, "grey already"
    assert spread(result) <= MAX_SPREAD


@pytest.mark.parametrize("name", ["coffee", "cat", "rocket"])
def test_no_seed_leaves_a_tint(name):
    editor = Editor.load()
    picture = PHOTOGRAPH.with_name(f"{name}.jpg")
    for words in ("make it black and white", "把照片变成黑白的"):
        for seed in range(10):
            (result,) = editor.edit(EditRequest(image=picture, prompt=words, seed=seed)).images
            pixels = np.asarray(result.convert("RGB"), np.int16)
            assert np.ptp(pixels, axis=-1).max() <= MAX_SPREAD, (words, seed)


def test_a_chinese_instruction_does_the_same(three_megapixels, tmp_path):
    result = edit(three_megapixels, "变成黑白", tmp_path / "zh.png", "--seed", "1")
    assert spread(result) <= MAX_SPREAD


def test_held_out_edits_gain(tmp_path):
    """A few items of each category; the full table is `step1x bench mini`."""
    command = [str(STEP1X), "bench", "mini", "--items", "8", "--out", str(tmp_path), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = {row["category"]: row for row in json.loads(done.stdout)}
    assert set(rows) == set(OPERATORS)
    medians = {category: row["median_gain"] for category, row in rows.items()}
    for category in ("tone", "colour", "removal", "background", "addition"):
        assert medians[category] >= 0.5, medians
    assert min(medians.values()) >= 0.1, medians
    assert mean(row["success"] for row in rows.values()) >= 0.6, rows
