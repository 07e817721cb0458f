"""Checkpoints: whole or not at all, whatever happens while they are written or lie on the disk."""

import resource
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from step1x_edit.errors import CheckpointError, InvalidRequest, Step1XEditError
from step1x_edit.training.checkpoint import Checkpoints, alone
from step1x_edit.training.loop import Pace, TrainingRun, run_loop

from .test_loop import loss_of, state_of, stream, tiny_run


def saved_steps(folder):
    return [int(p.stem.removeprefix("step_")) for p in sorted((folder / "checkpoints").iterdir())]


@contextmanager
def room_for(num_bytes):
    """Files of this process cannot grow beyond it, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_the_last_two_and_every_fourth_are_kept(tmp_path):
    run = tiny_run(tmp_path, keep_every=4)
    run_loop(run, stream(), loss_of(run), pace=Pace(save_every=1))
    assert saved_steps(tmp_path) == [4, 8, 11, 12]


def test_those_to_keep_are_written_whatever_the_clock_says(tmp_path):
    run = tiny_run(tmp_path, keep_every=4)
    run_loop(run, stream(), loss_of(run), pace=Pace(save_every_s=3600))
    assert saved_steps(tmp_path) == [4, 8, 12]


def damage_a_byte(path):
    content = bytearray(path.read_bytes())
    content[content.index(run_marker()) + 5] ^= 1
    path.write_bytes(content)


def run_marker():
    return torch.full((8,), 1.25).numpy().tobytes()


@pytest.mark.parametrize("damage", ["byte", "half", "empty", "other"])
def test_a_damaged_newest_one_is_passed_over_with_a_warning(tmp_path, damage, caplog):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(10, {"step": 10})
    newest = checkpoints.save(20, {"step": 20, "weights": torch.full((8,), 1.25)})
    if damage == "byte":
        damage_a_byte(newest)
        assert torch.load(newest)["step"] == 20  # torch itself does not notice
    else:
        content = newest.read_bytes()
        newest.write_bytes(
            {"half": content[: len(content) // 2], "empty": b"", "other": b"PK no zip"}[damage]
        )
    assert checkpoints.read_newest() == {"step": 10}
    assert "step_00000020.pt is damaged" in caplog.text


def test_none_that_is_whole_is_an_error_and_none_at_all_a_beginning(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.read_newest() is None
    checkpoints.save(1, {"step": 1}).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole"):
        checkpoints.read_newest()


def test_what_a_killed_save_left_is_removed(tmp_path):
    Checkpoints(tmp_path).save(1, {"step": 1})
    left = [tmp_path / "checkpoint.pt.new", tmp_path / "checkpoints" / "step_00000002.pt.new"]
    for path in left:
        path.write_bytes(b"half")
    checkpoints = Checkpoints(tmp_path)
    # Reading leaves it: another process may be saving.
    assert checkpoints.read_newest() == {"step": 1}
    assert all(path.exists() for path in left)
    checkpoints.save(2, {"step": 2})
    assert not any(path.exists() for path in left)


def test_damaged_ones_go_once_the_run_has_saved_again(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_every=100)
    for step in (200, 298, 300):
        checkpoints.save(step, {"step": step})
    for step in (298, 300):
        (tmp_path / "checkpoints" / f"step_{step:08d}.pt").write_bytes(b"")
    assert checkpoints.read_newest() == {"step": 200}
    checkpoints.save(250, {"step": 250})
    assert [path.stem for path in checkpoints._all()] == ["step_00000200", "step_00000250"]
    assert checkpoints.read_newest() == {"step": 250}


def test_a_full_disk_is_one_warning_and_training_goes_on(tmp_path, caplog):
    run = tiny_run(tmp_path, num_steps=6)
    run.save()
    size = (tmp_path / "checkpoints" / "step_00000000.pt").stat().st_size

    def batches():
        source = stream()
        with room_for(size // 2):
            for _ in range(4):  # that of step 4 fails, too, before the fifth batch is asked for
                yield next(source)
        yield from source

    assert run_loop(run, batches(), loss_of(run), pace=Pace(save_every=2)) is None
    assert "no checkpoint of step 2 could be written (File too large)" in caplog.text
    assert saved_steps(tmp_path) == [0, 6]


def test_a_disk_that_is_full_at_the_end_is_one_line_and_the_run_can_go_on(tmp_path):
    run = tiny_run(tmp_path, num_steps=4)
    run_loop(run, stream(), loss_of(run), pace=Pace(save_every=3))
    longer = tiny_run(tmp_path, num_steps=8)
    assert longer.restore()
    size = (tmp_path / "checkpoints" / "step_00000004.pt").stat().st_size
    with room_for(size // 2), pytest.raises(Step1XEditError, match="free some room"):
        run_loop(longer, stream(longer.step), loss_of(longer))
    assert saved_steps(tmp_path) == [3, 4]
    again = tiny_run(tmp_path, num_steps=8)
    assert again.restore()
    assert again.step == 4


def test_a_checkpoint_of_an_earlier_version_restores(tmp_path):
    run = tiny_run(tmp_path / "new", num_steps=6)
    run_loop(run, stream(), loss_of(run))
    old = {
        # As it was: everything that there is, what is frozen too.
        "trained": run.trained.state_dict(),
        "ema": run.ema,
        "optimizers": [optimizer.state_dict() for optimizer in run.optimizers],
        "step": run.step,
        "samples_seen": run.samples_seen,
        "rng": torch.get_rng_state(),
    }
    (tmp_path / "old").mkdir()
    torch.save(old, tmp_path / "old" / "checkpoint.pt")
    restored = tiny_run(tmp_path / "old", num_steps=6)
    restored.trained["first"].requires_grad_(False)
    restored = TrainingRun(tmp_path / "old", restored.trained, restored.optimizers, 1e-2, 6)
    assert restored.restore()
    assert restored.step == 6
    for one, other in zip(
        restored.trained.state_dict().values(), run.trained.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other)
    assert set(restored.ema) == {"second.weight", "second.bias"}


def test_what_is_frozen_is_not_in_a_checkpoint(tmp_path):
    run = tiny_run(tmp_path)
    run.trained["first"].requires_grad_(False)
    run = TrainingRun(tmp_path, run.trained, [], 1e-2, 2)
    run.save()
    saved = torch.load(tmp_path / "checkpoints" / "step_00000000.pt")
    assert set(saved["trained"]) == {"second.weight", "second.bias"}


def test_the_checkpoint_of_another_run_is_refused(tmp_path):
    tiny_run(tmp_path).save()
    other = TrainingRun(tmp_path, nn.ModuleDict({"first": nn.Linear(4, 9)}), [], 1e-2, 2)
    with pytest.raises(CheckpointError, match=r"4 of its tensors do not fit \(first first.weight"):
        other.restore()


def test_two_processes_do_not_train_in_one_folder(tmp_path):
    with alone(tmp_path), pytest.raises(InvalidRequest, match="another process"), alone(tmp_path):
        pass
    with alone(tmp_path):
        pass


def test_averaged_weights_are_there_for_a_while(tmp_path):
    run = tiny_run(tmp_path)
    run_loop(run, stream(), loss_of(run))
    before = [tensor.clone() for tensor in state_of(run)]
    with run.averaged():
        assert torch.equal(run.trained["first"].weight, run.ema["first.weight"])
        assert not torch.equal(run.trained["first"].weight, before[0])
    assert all(map(torch.equal, state_of(run), before))
