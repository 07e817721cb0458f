"""The model-backed parts on tiny random checkpoints of the classes that they load."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from step1x_edit.apps import cli
from step1x_edit.datagen.generate import shard_paths
from step1x_edit.datagen.photographs import edits
from step1x_edit.datagen.photographs.mllm import QwenChat
from step1x_edit.datagen.photographs.neural import DepthModel, OpenVocabularyDetector, SamSegmenter
from step1x_edit.datagen.photographs.painting import FillPainter, FluxDepthPainter
from step1x_edit.datagen.photographs.roles import (
    DepthEstimator,
    DepthPainter,
    Detector,
    Inpainter,
    Painter,
    Segmenter,
)
from step1x_edit.datagen.shards import read
from step1x_edit.errors import CheckpointError

from . import tiny_parts
from .scenes import with_disc
from .server import serving

pytestmark = pytest.mark.slow
EXAMPLES = Path(__file__).parents[3] / "examples"
NAMES = {"cat": "猫", "dog": "狗"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    writers = {
        "detector": tiny_parts.write_detector, "segmenter": tiny_parts.write_segmenter,
        "depth": tiny_parts.write_depth, "fill": tiny_parts.write_fill,
        "depth_painter": tiny_parts.write_depth_painter, "chat": tiny_parts.write_chat,
    }  # fmt: skip
    return {name: write(folder / f"tiny-{name}") for name, write in writers.items()}


@pytest.fixture(scope="module")
def picture():
    return with_disc(96)[0][:64]


def test_detector(models, picture):
    detector = OpenVocabularyDetector(models["detector"], NAMES, threshold=0.01)
    assert isinstance(detector, Detector)
    things = detector.find(picture)
    assert things
    assert [thing.score for thing in things] == sorted((t.score for t in things), reverse=True)
    for thing in things:
        top, left, bottom, right = thing.box
        assert 0 <= top < bottom <= 64
        assert 0 <= left < right <= 96
        assert NAMES[str(thing.en)] == thing.zh
    assert OpenVocabularyDetector(models["detector"], NAMES, threshold=1.0).find(picture) == []


def test_segmenter_looks_at_the_box(models, picture):
    segmenter = SamSegmenter(models["segmenter"])
    assert isinstance(segmenter, Segmenter)
    one, other = (segmenter.cut(picture, box) for box in ((0, 0, 20, 20), (10, 30, 60, 90)))
    assert one.shape == (64, 96)
    assert one.dtype == bool
    assert (one != other).any()


def test_depth(models, picture):
    estimator = DepthModel(models["depth"])
    assert isinstance(estimator, DepthEstimator)
    depth = estimator.depth(picture)
    assert depth.shape == (64, 96)
    assert (depth.min(), depth.max()) == (0, 1)


def test_fill_painter_paints_the_mask_alone(models, picture):
    painter = FillPainter(models["fill"], num_steps=2, dtype="float32")
    assert isinstance(painter, Painter)
    assert isinstance(painter, Inpainter)
    where = np.zeros((64, 96), bool)
    where[20:50, 30:70] = True
    painted = painter.paint(picture, where, "a cat", seed=3)
    assert np.array_equal(painted[~where], picture[~where])
    assert (painted[where] != picture[where]).any()
    assert np.array_equal(painted, painter.paint(picture, where, "a cat", seed=3))
    assert (painted != painter.paint(picture, where, "a cat", seed=4)).any()
    assert painter.fill(picture, where).shape == picture.shape


def test_depth_painter_follows_the_depth(models):
    painter = FluxDepthPainter(models["depth_painter"], num_steps=2, dtype="float32")
    assert isinstance(painter, DepthPainter)
    depth = np.linspace(0, 1, 64 * 96, dtype=np.float32).reshape(64, 96)
    painted = painter.paint(depth, "a red cat", seed=3)
    assert painted.shape == (64, 96, 3)
    assert (painted != painter.paint(1 - depth, "a red cat", seed=3)).any()


def test_chat_answers_and_rates(models, picture):
    chat = QwenChat(Path(models["chat"]))
    assert chat.name == "tiny-chat"
    assert isinstance(chat.ask([picture, picture], "What changed?"), str)
    rating = chat.rate([picture, picture[:, ::-1]], "How well?")
    assert 0 < rating < 9
    assert rating != chat.rate([picture, picture // 4], "How well?")


@pytest.mark.parametrize("part", [SamSegmenter, DepthModel, FillPainter])
def test_a_wrong_folder_is_named_in_one_line(part, tmp_path):
    with pytest.raises(CheckpointError) as caught:
        part(str(tmp_path / "nothing"))
    assert str(tmp_path / "nothing") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_whole_path_with_a_model_in_every_role(models, tmp_path, monkeypatch, capsys):
    # What random weights cut out is no whole thing, and what they paint is never gone.
    for check in ("check_cut_out", "check_gone"):
        monkeypatch.setattr(edits, check, lambda *_: None)
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    for name in ("cat", "coffee"):
        Image.open(EXAMPLES / f"{name}.jpg").resize((96, 96)).save(photographs / f"{name}.png")
    painting = {"model": models["fill"], "num_steps": 1, "dtype": "float32"}

    def answer(question):
        return "换一换吧" if "Chinese" in question else "Change the thing."

    with serving(answer) as (url, _):
        config = {
            "detector": {"model": models["detector"], "names": NAMES, "threshold": 0.01},
            "segmenter": {"model": models["segmenter"]},
            "inpainter": painting,
            "painter": painting,
            "depth": {"model": models["depth"]},
            "depth_painter": painting | {"model": models["depth_painter"]},
            "captioner": {"model": "captioner", "url": url},
            "judge": {"model": models["chat"], "least_score": 1.0},
        }
        (tmp_path / "parts.yaml").write_text(yaml.safe_dump(config))
        command = ["data", "photographs", str(photographs), "--out", str(tmp_path / "out")]
        command += ["--num", "10", "--size", "64x64", "--config", str(tmp_path / "parts.yaml")]
        assert cli.run(command) == 0, capsys.readouterr().err
    made = [triplet for path in shard_paths(tmp_path / "out") for triplet in read(path)]
    by_category = {triplet.category: triplet.edit.made_by for triplet in made}
    cut = ("tiny-detector", "tiny-segmenter")
    wanted = {
        "removal": (*cut, "tiny-fill", "captioner"),
        "background": (*cut, "tiny-fill", "captioner"),
        "colour": (*cut, "tiny-depth", "tiny-depth_painter", "captioner"),
        "material": (*cut, "tiny-depth", "tiny-depth_painter", "captioner"),
    }
    assert wanted.items() <= by_category.items()
    for triplet in made:
        assert triplet.photograph in ("cat.png", "coffee.png")
        assert triplet.source.shape == triplet.target.shape == (64, 64, 3)
        assert np.array_equal(triplet.mask, (triplet.source != triplet.target).any(-1))
        assert triplet.instructions == {"en": "Change the thing.", "zh": "换一换吧"}
    drops = json.loads((tmp_path / "out" / "drops.json").read_text())
    assert drops["kept"] == len(made)
