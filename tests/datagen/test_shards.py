import tarfile

import numpy as np
import pytest

from step1x_edit.datagen.atlas import Atlas
from step1x_edit.datagen.operators import OPERATORS
from step1x_edit.datagen.pipeline import make_triplet
from step1x_edit.datagen.shards import PARTS, read, write
from step1x_edit.errors import InvalidRequest
from step1x_edit.training.alignment import token_labels

SUFFIXES = (".tar", ".parquet")


@pytest.fixture(scope="module")
def triplets():
    atlas = Atlas()
    return [make_triplet(i, category, atlas, 64, 48) for i, category in enumerate(OPERATORS)]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_shard_gives_back_what_was_written(suffix, triplets, tmp_path):
    path = tmp_path / f"shard{suffix}"
    assert write(path, triplets) == len(triplets)
    again = list(read(path))
    assert len(again) == len(triplets)
    for made, found in zip(triplets, again, strict=True):
        for name in ("source", "target", "mask"):
            assert np.array_equal(getattr(made, name), getattr(found, name))
        assert made.metadata() == found.metadata()


def test_what_the_trainer_reads_off_a_scene_survives_the_disk(triplets, tmp_path):
    write(tmp_path / "shard.tar", triplets)
    for made, found in zip(triplets, read(tmp_path / "shard.tar"), strict=True):
        assert np.array_equal(token_labels(made, Atlas()), token_labels(found, Atlas()))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_equal_records_give_equal_bytes(suffix, triplets, tmp_path):
    first, second = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
    write(first, triplets)
    write(second, triplets)
    assert first.read_bytes() == second.read_bytes()


def test_a_tar_is_laid_out_as_webdataset_reads_it(triplets, tmp_path):
    write(tmp_path / "shard.tar", triplets)
    with tarfile.open(tmp_path / "shard.tar") as tar:
        names = tar.getnames()
    assert names == [f"{triplet.key}.{part}" for triplet in triplets for part in PARTS]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.8])
def test_a_shard_that_is_cut_short_is_named(suffix, share, triplets, tmp_path):
    path = tmp_path / f"shard{suffix}"
    write(path, triplets)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(InvalidRequest, match=f"{path.name} is damaged"):
        list(read(path))


def test_a_tar_that_is_cut_between_two_records_is_named(triplets, tmp_path):
    path = tmp_path / "shard.tar"
    write(path, triplets)
    with tarfile.open(path) as tar:
        end_of_third = tar.getmembers()[3 * len(PARTS)].offset
    path.write_bytes(path.read_bytes()[:end_of_third])
    with pytest.raises(InvalidRequest, match="its end is missing"):
        list(read(path))


def test_nothing_is_left_when_a_record_fails(triplets, tmp_path):
    def failing():
        yield triplets[0]
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError):
        write(tmp_path / "shard.tar", failing())
    assert not list(tmp_path.iterdir())


def test_licences_of_all_art_are_named(triplets):
    for triplet in triplets:
        licences = triplet.metadata()["licences"]
        objects = {placed.name for placed in triplet.edit.after.objects}
        assert {f"objects/{name}" for name in objects} <= set(licences)
        assert all(licences.values())
