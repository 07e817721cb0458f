import json

import numpy as np
import pytest
from PIL import Image

from step1x_edit.datagen.config import DataConfig
from step1x_edit.datagen.generate import generate, shard_paths
from step1x_edit.datagen.official_metadata import export
from step1x_edit.datagen.shards import read
from step1x_edit.errors import InvalidRequest


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "set"
    generate(DataConfig(out=out, num=6, shard_size=4, sizes={"48x32": 1}, num_workers=1))
    return out


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_metadata_leads_to_the_same_pictures_and_words(language, folder, tmp_path):
    entries = json.loads(export(folder, tmp_path / "out", language).read_text("utf-8"))
    triplets = [triplet for path in shard_paths(folder) for triplet in read(path)]
    for triplet, (target, entry) in zip(triplets, entries.items(), strict=True):
        assert set(entry) == {"ref_image_path", "caption"}
        assert entry["caption"] == triplet.instructions[language]
        assert np.array_equal(np.asarray(Image.open(target)), triplet.target)
        assert np.array_equal(np.asarray(Image.open(entry["ref_image_path"])), triplet.source)


def test_bad_arguments_write_nothing(folder, tmp_path):
    with pytest.raises(InvalidRequest, match="language 'fr'"):
        export(folder, tmp_path / "out", "fr")
    assert not (tmp_path / "out").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").touch()
    with pytest.raises(InvalidRequest, match="holds something"):
        export(folder, tmp_path / "full")
