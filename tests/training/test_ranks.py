"""Rows, parts and refusals of several processes, looked at in one. See `apps.test_torchrun`."""

import itertools
import signal
from contextlib import nullcontext

import pytest
import torch

from step1x_edit.errors import InvalidRequest, Step1XEditError
from step1x_edit.model.pipeline import Step1XEditPipeline
from step1x_edit.training import ranks
from step1x_edit.training.config import EditRun
from step1x_edit.training.feature_batches import FeatureBatches, feature_batches
from step1x_edit.training.pairs import check
from step1x_edit.training.run import train
from step1x_edit.training.tuning import Tuning

from ..pair_sets import write_metadata
from .test_feature_batches import ENGINE, data, stored
from .test_tuning import run_of


@pytest.fixture
def among(monkeypatch):
    """Be one of several processes, as far as rows are concerned."""

    def become(number, count):
        monkeypatch.setattr(ranks, "rank", lambda: number)
        monkeypatch.setattr(ranks, "world_size", lambda: count)

    return become


@pytest.mark.parametrize(("rows", "count"), [(1, 1), (4, 2), (5, 2), (7, 4), (2, 4), (1, 3)])
def test_every_row_is_one_process_own_and_the_shares_are_one(among, rows, count):
    counted, total = [], 0.0
    for number in range(count):
        among(number, count)
        own, share = ranks.own_rows(rows)
        taken = list(range(rows))[own]
        assert taken  # all compute together
        assert share == pytest.approx(len(taken) / rows if share else 0)
        counted += taken if share else []
        total += share
    assert counted == list(range(rows))
    assert total == pytest.approx(1)


@pytest.fixture(scope="module")
def pipeline(tiny_model):
    loaded = Step1XEditPipeline.from_pretrained(tiny_model)
    # Longer than the folder's own limit, and not padded to it: rows are as long as the longest.
    longer = {"max_length": 400, "pad_to_max_length": False}
    loaded.instruction = loaded.instruction.model_copy(update=longer)
    return loaded


def test_the_parts_of_a_batch_are_the_batch(tmp_path, pipeline, among, monkeypatch):
    metadata = write_metadata(tmp_path / "set", [(64, 64)] * 5)
    settings = data(
        tmp_path, stored(metadata), {**ENGINE, "share": 0.3, "batch_size": 3}, batch_size=4
    )
    checked = check(settings)
    options = {"seed": 0, "instruction_dropout": 0.3}

    def taken() -> list:
        return list(itertools.islice(feature_batches(checked, pipeline, **options), 8))

    whole = taken()
    assert {len(batch.names) for batch in whole} >= {1, 4}
    monkeypatch.setattr(ranks, "wait_for_all", lambda: None)
    parts = []
    for number in range(2):
        among(number, 2)
        parts.append(taken())
    for batch, *own in zip(whole, *parts, strict=True):
        counted = [part for part in own if part.share]
        assert sum(part.share for part in counted) == pytest.approx(1)
        assert all(part.names == batch.names for part in own)
        assert all(part.grid == batch.grid for part in own)
        for name in ("target", "reference", "features", "mask"):
            joined = torch.cat([getattr(part, name) for part in counted])
            torch.testing.assert_close(joined, getattr(batch, name), rtol=1e-5, atol=1e-5)
        assert [part.first for part in counted] == [0, len(counted[0].target)][: len(counted)]


def test_the_parts_of_a_loss_sum_up_to_the_loss(tmp_path, tiny_model, among, monkeypatch):
    tuning = Tuning(run_of(tmp_path / "run", tiny_model))
    checked = check(tuning.config.data.model_copy(update={"batch_size": 3}))
    monkeypatch.setattr(ranks, "wait_for_all", lambda: None)

    def taken() -> FeatureBatches:
        return feature_batches(checked, tuning.pipeline, seed=0)

    for step, batch in zip(range(2), taken(), strict=False):
        loss = tuning.loss_of(batch, step).item()
        parts = []
        for number in range(4):
            among(number, 4)
            part = next(itertools.islice(taken(), step, None))
            parts.append(tuning.loss_of(part, step).item())
            among(0, 1)
        assert sum(parts) == pytest.approx(loss, rel=1e-5)
        assert 0.0 in parts  # a fourth process has no row of three


def test_the_minis_kinds_of_run_are_refused(tmp_path, among):
    among(1, 2)
    config = EditRun(
        kind="edit", folder=tmp_path / "run", vae=tmp_path, processor=tmp_path, num_steps=1
    )
    with pytest.raises(InvalidRequest, match="kind edit trains in one process, not 2"):
        train(config, lambda _: nullcontext())
    assert not config.folder.exists()


def ended():
    signal.raise_signal(signal.SIGTERM)


def ended_in_an_import():
    try:
        ended()
    except Step1XEditError as error:
        raise RuntimeError("Failed to import diffusers") from error


@pytest.mark.parametrize("work", [ended, ended_in_an_import])
def test_what_sigterm_interrupts_is_not_what_is_told(work):
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(Step1XEditError, match="by the launcher"), ranks._ended_by_sigterm():
            work()
    finally:
        signal.signal(signal.SIGTERM, before)


def test_without_sigterm_errors_are_as_they_were():
    before = signal.getsignal(signal.SIGTERM)
    with ranks._ended_by_sigterm():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
    try:
        with pytest.raises(OSError, match="no room"), ranks._ended_by_sigterm():
            raise OSError("no room")
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"optimizer": "adamw8bit"}, r"adamw8bit works in one process, not 2.*adamw"),
        ({"offload": "disk"}, r"offload disk works in one process, not 2.*none"),
    ],
)
def test_what_one_process_alone_can_do_is_refused(tmp_path, tiny_model, among, given, message):
    among(0, 2)
    config = run_of(tmp_path / "run", tiny_model, **given)
    with pytest.raises(InvalidRequest, match=message):
        train(config, lambda _: nullcontext())
    assert not config.folder.exists()
