import itertools
import os
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset

from step1x_edit.checkpoints.catalog import MINI_FOLDER
from step1x_edit.datagen.atlas import Atlas
from step1x_edit.datagen.config import DataConfig
from step1x_edit.datagen.generate import generate, shard_paths
from step1x_edit.datagen.pipeline import HELD_OUT_SEED, make_triplet
from step1x_edit.datagen.shards import read
from step1x_edit.datagen.variety import PLAIN
from step1x_edit.errors import InvalidRequest
from step1x_edit.model.instruction_tokens import InstructionTokenizer
from step1x_edit.model.processor import PictureProcessor
from step1x_edit.training.config import DataSettings
from step1x_edit.training.dataset import (
    WORKER_NICENESS,
    EditCollate,
    TripletBatches,
    batches,
    in_worker,
    picture_batches,
    to_unit,
)
from step1x_edit.training.mini import INSTRUCTION


@dataclass(frozen=True)
class Drawn:
    """What tells triplets apart, quick to send from a worker."""

    seed: int
    category: str
    shape: tuple[int, ...]
    total: int


def summary(triplets, _):
    return [Drawn(t.seed, t.category, t.source.shape, int(t.target.sum())) for t in triplets]


def settings(**changes):
    return DataSettings(**{"sizes": {"32x32": 0.5, "48x32": 0.5}, "num_workers": 0, **changes})


def first(stream, count):
    return list(itertools.islice(batches(stream), count))


@pytest.fixture(scope="module")
def expected():
    return first(TripletBatches(settings(), 3, summary), 6)


@pytest.mark.parametrize("unread", [1, 3])
def test_a_batch_of_which_nothing_can_be_read_is_drawn_anew(expected, unread):
    refused = []

    def collate(triplets, rng):
        found = summary(triplets, rng)
        if len(refused) < unread:
            refused.append(found)
            raise InvalidRequest("too long")
        return found

    found = first(TripletBatches(settings(), 3, collate), 2)
    assert refused[0] == expected[0]
    assert found[1] == expected[1]
    seeds = [triplet.seed for batch in [*refused, found[0]] for triplet in batch]
    assert len({*seeds}) == len(seeds) == 3 * (unread + 1)


def test_where_no_batch_can_be_read_it_says_why():
    def collate(*_):
        raise InvalidRequest("too long")

    with pytest.raises(InvalidRequest, match="too long"):
        first(TripletBatches(settings(), 1, collate), 1)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_the_number_of_workers_does_not_change_the_set(num_workers, expected):
    stream = TripletBatches(settings(num_workers=num_workers), 3, summary)
    assert first(stream, 6) == expected


def test_a_resumed_stream_goes_on_where_it_was(expected):
    assert first(TripletBatches(settings(), 3, summary, first_batch=4), 2) == expected[4:]


def test_a_batch_has_one_size_and_its_own_seeds(expected):
    assert all(len({drawn.shape for drawn in batch}) == 1 for batch in expected)
    assert {drawn.shape for batch in expected for drawn in batch} == {(32, 32, 3), (32, 48, 3)}
    seeds = [drawn.seed for batch in expected for drawn in batch]
    assert seeds == list(range(len(seeds)))


def test_streams_of_other_seeds_share_nothing(expected):
    other = first(TripletBatches(settings(seed=1), 3, summary), 6)
    seeds = {drawn.seed for batch in expected for drawn in batch}
    assert not seeds & {drawn.seed for batch in other for drawn in batch}


def test_held_out_seeds_are_apart():
    held_out = first(TripletBatches(settings(), 3, summary, held_out=True), 2)
    assert all(drawn.seed >= HELD_OUT_SEED for batch in held_out for drawn in batch)


def test_shares_choose_the_categories():
    stream = TripletBatches(settings(shares={"tone": 1.0}), 4, summary)
    assert {drawn.category for batch in first(stream, 3) for drawn in batch} == {"tone"}


def test_pictures_are_sources_and_targets_in_unit_range():
    batch = next(picture_batches(settings(sizes={"48x32": 1.0}), batch_size=4))
    assert batch.shape == (4, 3, 32, 48)
    assert batch.dtype == torch.float32
    assert batch.min() >= -1
    assert batch.max() <= 1


def test_to_unit_maps_black_and_white_to_the_ends():
    pictures = torch.from_numpy(np.uint8([[[[0, 127, 255]]]]))
    assert to_unit(pictures).flatten().tolist() == pytest.approx([-1, -0.0039, 1], abs=1e-3)
    assert pictures.dtype == torch.uint8


def test_a_dataset_on_disk_is_read_as_it_is(tmp_path):
    out = tmp_path / "set"
    generate(DataConfig(out=out, num=24, shard_size=8, sizes={"48x32": 1}, num_workers=1))
    made = {t.seed: int(t.target.sum()) for path in shard_paths(out) for t in read(path)}
    stream = TripletBatches(settings(shards=out), 5, summary)
    found = first(stream, 12)
    assert all(len({drawn.seed for drawn in batch}) == 5 for batch in found)
    assert all(made[drawn.seed] == drawn.total for batch in found for drawn in batch)
    assert len({drawn.seed for batch in found for drawn in batch}) > 16
    assert first(TripletBatches(settings(shards=out), 5, summary, first_batch=8), 4) == found[8:]


def test_a_folder_without_a_dataset_is_named(tmp_path):
    with pytest.raises(InvalidRequest, match="holds no shards"):
        first(TripletBatches(settings(shards=tmp_path), 5, summary), 1)


@pytest.fixture(scope="module")
def mini_tokenizer():
    processor = PictureProcessor.from_pretrained(MINI_FOLDER / "processor")
    return InstructionTokenizer(processor, INSTRUCTION)


def test_a_sentence_without_room_leaves_the_batch_and_not_the_run(mini_tokenizer):
    atlas = Atlas()
    triplets = [make_triplet(seed, "removal", atlas, 64, 64, PLAIN) for seed in range(3)]
    long = dict.fromkeys(("en", "zh"), "remove the cat, " * 20)
    triplets[1] = replace(triplets[1], instructions=long)
    collate = EditCollate(mini_tokenizer, dropout=0, zh_share=0.5, text_to_image_share=0)
    batch = collate(triplets, np.random.default_rng(0))
    assert len(batch.target) == len(batch.instructions.lengths) == len(batch.labels) == 2
    assert np.array_equal(batch.target[1].numpy(), triplets[2].target)


class Numbers(IterableDataset):
    def __iter__(self):
        yield from itertools.count()


def test_workers_leave_torchs_own_random_state_alone():
    # A resumed run restores it before its workers start.
    before = torch.get_rng_state()
    assert next(in_worker(Numbers(), 1)) == 0
    assert torch.equal(torch.get_rng_state(), before)


class Niceness(IterableDataset):
    def __iter__(self):
        yield os.nice(0)


@pytest.mark.skipif(not hasattr(os, "nice"), reason="no priorities of this kind here")
def test_workers_leave_the_cores_to_the_step():
    assert next(in_worker(Niceness(), 1)) == min(19, os.nice(0) + WORKER_NICENESS)
