import json
from dataclasses import replace

import numpy as np
import pytest

from step1x_edit.datagen.atlas import Atlas
from step1x_edit.datagen.config import DataConfig
from step1x_edit.datagen.filters import (
    Drops,
    Limits,
    NotSeenBefore,
    changed_enough,
    default_checks,
    judged_well,
    keep,
    kept_outside,
    plain_instruction,
    safe,
    sharp_enough,
    text_reads,
    well_exposed,
)
from step1x_edit.datagen.generate import generate, shard_paths
from step1x_edit.datagen.pipeline import make_triplet
from step1x_edit.datagen.refine import DROPS, refine
from step1x_edit.datagen.shards import read
from step1x_edit.errors import InvalidRequest

LIMITS = Limits()


@pytest.fixture(scope="module")
def atlas():
    return Atlas()


@pytest.fixture(scope="module")
def triplet(atlas):
    return make_triplet(1, "removal", atlas, 96, 64)


class Always:
    """Every role at once, with one answer."""

    def __init__(self, answer):
        self.answer = answer

    def read(self, picture):
        return self.answer

    def rate(self, picture):
        return self.answer

    def score(self, triplet):
        return self.answer


def flat(value):
    return np.full((64, 96, 3), value, np.uint8)


def test_a_good_triplet_passes_every_check(triplet):
    for check in default_checks(rater=Always(0.0), judge=Always(9.0)):
        assert check(triplet) is None


@pytest.mark.parametrize(
    ("check", "changes", "reason"),
    [
        (sharp_enough(LIMITS), {"source": flat(90)}, "blurred source"),
        (well_exposed(LIMITS), {"source": flat(4)}, "source too dark"),
        (well_exposed(LIMITS), {"source": flat(250)}, "source too bright"),
        (changed_enough(LIMITS), {"mask": np.zeros((64, 96), bool)}, "change too small"),
        (changed_enough(Limits(change=250.0)), {}, "change too faint"),
        (safe(Always(0.9), LIMITS), {}, "unsafe"),
        (judged_well(Always(3.0), LIMITS), {}, "judged badly"),
    ],
)
def test_a_bad_triplet_is_dropped_for_its_reason(check, changes, reason, triplet):
    assert check(replace(triplet, **changes)) == reason


def test_a_change_outside_the_mask_is_found_in_local_edits_alone(triplet):
    spoilt = replace(triplet, target=np.where(triplet.mask[..., None], triplet.target, 255))
    spoilt = replace(spoilt, target=spoilt.target.astype(np.uint8))
    assert kept_outside(LIMITS)(spoilt) == "changed outside the mask"
    assert kept_outside(LIMITS)(replace(spoilt, category="tone")) is None


def test_text_is_read_back(atlas, triplet):
    made = next(
        t
        for t in (make_triplet(seed, "text", atlas, 96, 64) for seed in range(9))
        if t.edit.phrasing == "text_change"
    )
    wanted = made.edit.words["en"]["new_text"]
    assert text_reads(Always(f"- {wanted.lower()} !"))(made) is None
    assert text_reads(Always("something else"))(made) == "text unread"
    assert text_reads(Always(""))(triplet) is None


def test_a_record_is_kept_once(triplet, atlas):
    check = NotSeenBefore(LIMITS)
    assert check(triplet) is None
    assert check(triplet) == "seen before"
    noisy = triplet.source.astype(int) + np.random.default_rng(0).integers(-2, 3, (64, 96, 1))
    near = replace(triplet, source=noisy.clip(0, 255).astype(np.uint8))
    assert check(near) == "seen before"
    assert check(make_triplet(2, "removal", atlas, 96, 64)) is None
    asked = {"en": "paint the whole thing green", "zh": "全部涂绿"}
    assert check(replace(triplet, instructions=asked)) is None


@pytest.mark.parametrize(
    ("one", "other"),
    [("Please remove the cat.", "remove a cat"), ("请帮我把猫去掉", "把猫去掉")],
)
def test_courtesies_do_not_make_another_instruction(one, other):
    assert plain_instruction(one) == plain_instruction(other)
    assert plain_instruction(one) != plain_instruction(other + " now and here")


def test_the_first_reason_is_counted(triplet):
    drops = Drops()
    bad = replace(triplet, source=flat(4))
    kept = list(keep([triplet, bad, triplet], default_checks(), drops))
    assert kept == [triplet]
    assert (drops.kept, dict(drops.dropped)) == (1, {"blurred source": 1, "seen before": 1})
    assert drops.lines()[0].split() == ["1", "33.3%", "kept"]


def test_a_dataset_is_filtered_into_another(tmp_path):
    config = DataConfig(
        out=tmp_path / "all", num=40, shard_size=20, sizes={"64x48": 1}, num_workers=1
    )
    generate(config)
    told = []
    drops = refine(
        tmp_path / "all", tmp_path / "kept", default_checks(), lambda *now: told.append(now), 15
    )
    kept = [triplet for path in shard_paths(tmp_path / "kept") for triplet in read(path)]
    assert len(kept) == drops.kept
    assert drops.kept + drops.dropped.total() == 40
    assert told == [(1, 2), (2, 2)]
    counts = json.loads((tmp_path / "kept" / DROPS).read_text())
    assert counts == {"kept": drops.kept, "dropped": dict(drops.dropped)}
    with pytest.raises(InvalidRequest, match="holds something"):
        refine(tmp_path / "all", tmp_path / "kept", default_checks())
