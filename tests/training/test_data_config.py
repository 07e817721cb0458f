import logging
from pathlib import Path

import pytest
from pydantic import ValidationError

from step1x_edit.datagen.config import first_problem, read_yaml
from step1x_edit.errors import InvalidRequest
from step1x_edit.training.data_config import MetadataPairs, PairData, from_official_toml

from ..pair_sets import OFFICIAL_TOML


@pytest.fixture
def toml(tmp_path):
    def write(text):
        path = tmp_path / "data.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


EXAMPLE = OFFICIAL_TOML.format(side=768, folder="pictures", metadata="meta.json")


def test_the_released_example_is_read_as_it_is(toml, caplog):
    data = from_official_toml(toml(EXAMPLE))
    (dataset,) = data.datasets
    assert dataset == MetadataPairs(
        kind="metadata",
        metadata_file=Path("meta.json"),
        image_dir=Path("pictures"),
        size_level_px=768,
        batch_size=1,
    )
    assert (data.bucket_px, caplog.records) == (32, [])


def test_subsets_and_datasets_have_their_own_settings(toml):
    more = (
        "  num_repeats = 3\n[[datasets.subsets]]\nimage_dir = 'b'\nmetadata_file = 'b.json'\n"
        "[[datasets]]\nresolution = [512, 1024]\nbatch_size = 4\nedit_dataset = false\n"
        "[[datasets.subsets]]\nimage_dir = 'c'\nmetadata_file = 'c.json'\n"
    )
    first, second, third = from_official_toml(toml(EXAMPLE + more)).datasets
    assert [d.repeats for d in (first, second, third)] == [3, 1, 1]
    assert [d.size_level_px for d in (first, second, third)] == [768, 768, 724]
    assert [d.batch_size for d in (first, second, third)] == [1, 1, 4]
    assert [d.text_to_image for d in (first, second, third)] == [False, False, True]


def test_what_is_not_done_here_is_named_in_a_warning(toml, caplog):
    text = EXAMPLE.replace("keep_tokens = 1", "flip_aug = true").replace(
        "batch_size = 1", "batch_size = 1\ncaption_dropout_rate = 0.1\ncolor_aug = false"
    )
    with caplog.at_level(logging.WARNING):
        from_official_toml(toml(text))
    (message,) = caplog.messages
    assert "[general] flip_aug = True" in message
    assert "[[datasets]] caption_dropout_rate = 0.1" in message
    assert "color_aug" not in message


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("batch_size", "batchsize", "'batchsize' is unknown: did you mean 'batch_size'?"),
        ("image_dir", "img_dir", "did you mean 'image_dir'?"),
        ("[general]", "[generic]", "did you mean 'general'?"),
        ("resolution = [768, 768]", "", "[[datasets]] has no resolution"),
        ("resolution = [768, 768]", "resolution = 'big'", "resolution 'big'"),
        ("resolution = [768, 768]", "resolution = [7, 7, 7]", "[7, 7, 7]"),
        ("resolution = [768, 768]", "resolution = 8", "size_level_px"),
        ("edit_dataset = true", "", "no edit_dataset"),
        ("edit_dataset = true", "edit_dataset = 1", "edit_dataset 1"),
        ("metadata_file = 'meta.json'", "", "[[datasets.subsets]] has no metadata_file"),
        ("batch_size = 1", "batch_size = 0", "batch_size"),
        ("batch_size = 1", "batch_size = ", "line 9, column"),
        ("batch_size = 1", "bucket_reso_steps = 48", "bucket_px"),
        ("[[datasets]]", "[datasets]", "data.toml"),
    ],
)
def test_what_is_wrong_is_one_line_with_file_and_key(toml, old, new, named):
    path = toml(EXAMPLE.replace(old, new, 1))
    with pytest.raises(InvalidRequest) as error:
        from_official_toml(path)
    message = str(error.value)
    assert str(path) in message
    assert named in message
    assert "\n" not in message


def test_a_toml_without_datasets_is_named(toml):
    with pytest.raises(InvalidRequest, match=r"no \[\[datasets\]\]"):
        from_official_toml(toml("[general]\n"))
    with pytest.raises(InvalidRequest, match=r"no \[\[datasets.subsets\]\]"):
        from_official_toml(toml(EXAMPLE.split("  [[datasets.subsets]]")[0]))
    with pytest.raises(InvalidRequest, match=r"absent\.toml"):
        from_official_toml(Path("absent.toml"))


YAML = """\
size_level_px: 128
bucket_px: 16
datasets:
- {kind: metadata, metadata_file: meta.json, repeats: 2}
- {kind: folder, folder: pairs}
- {kind: shards, folder: runs/data/small, text_to_image: true}
- {kind: engine, sizes: {64x64: 1}, shares: {tone: 1}, share: 0.25}
"""


def test_every_kind_of_dataset_is_a_setting(tmp_path):
    path = tmp_path / "data.yaml"
    path.write_text(YAML)
    data = read_yaml(path, PairData)
    assert [d.kind for d in data.datasets] == ["metadata", "folder", "shards", "engine"]
    assert data.cache.is_absolute()


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("repeats: 2", "repeat: 2", "'repeat' is unknown: did you mean 'repeats'?"),
        ("size_level_px", "size_level", "did you mean 'size_level_px'?"),
        ("bucket_px: 16", "bucket_px: 20", "bucket_px"),
        ("share: 0.25", "share: 1", "leaves nothing"),
        ("kind: folder", "kind: directory", "directory"),
        ("metadata_file: meta.json", "image_dir: a", "metadata_file"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path, old, new, named):
    path = tmp_path / "data.yaml"
    path.write_text(YAML.replace(old, new, 1))
    with pytest.raises(InvalidRequest) as error:
        read_yaml(path, PairData)
    assert named in str(error.value)
    assert "\n" not in str(error.value)


def test_engines_alone_share_all_batches():
    engine = {"kind": "engine", "share": 0.5}
    assert len(PairData.model_validate({"datasets": [engine, engine]}).datasets) == 2
    with pytest.raises(ValidationError) as error:
        PairData.model_validate({"datasets": [engine]})
    assert "make them 1" in first_problem(error.value)


def test_the_heaviest_batches_are_those_with_the_most_pixels():
    folder = {"kind": "folder", "folder": "any"}
    engine = {"kind": "engine", "share": 0.5, "sizes": {"128x128": 0.9, "512x1024": 0.1}}
    small = {**folder, "size_level_px": 256, "batch_size": 4}
    plain = PairData.model_validate({"datasets": [folder, small]})
    assert plain.heaviest == (512, 1)
    mixed = PairData.model_validate({"datasets": [folder, small, engine], "batch_size": 2})
    assert mixed.heaviest == (724, 2)
    assert mixed.at(128).heaviest == (128, 4)
