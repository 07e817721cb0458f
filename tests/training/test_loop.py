import itertools
import json
import os
import signal

import pytest
import torch
from torch import nn

from step1x_edit.errors import Step1XEditError
from step1x_edit.training.loop import Pace, TrainingRun, run_loop


def tiny_run(folder, num_steps=12, **settings):
    torch.manual_seed(0)
    model = nn.ModuleDict({"first": nn.Linear(4, 8), "second": nn.Linear(8, 4)})
    optimizers = [
        torch.optim.Muon([model["first"].weight, model["second"].weight], lr=1e-2),
        torch.optim.AdamW([model["first"].bias, model["second"].bias], lr=1e-2),
    ]
    settings = {"warmup_steps": 3, "decay_share": 0.5, **settings}
    return TrainingRun(folder, model, optimizers, 1e-2, num_steps, **settings)


def stream(first=0):
    for number in itertools.count(first):
        yield torch.randn(6, 4, generator=torch.Generator().manual_seed(number))


def loss_of(run):
    def loss(batch):
        noisy = batch + 0.1 * torch.randn_like(batch)  # uses the global random state
        hidden = torch.tanh(run.trained["first"](noisy))
        return (run.trained["second"](hidden) - batch).square().mean(), len(batch)

    return loss


def state_of(run):
    return [*run.trained.state_dict().values(), *run.ema.values()]


def test_a_resumed_run_is_bit_identical(tmp_path):
    whole = tiny_run(tmp_path / "whole")
    assert run_loop(whole, stream(), loss_of(whole)) is None

    part = tiny_run(tmp_path / "part")
    stopped_by = run_loop(part, stopped(stream(), after=5), loss_of(part))
    assert stopped_by == signal.SIGTERM
    assert part.step == 5

    resumed = tiny_run(tmp_path / "part")
    assert resumed.restore()
    assert resumed.step == 5
    assert run_loop(resumed, stream(resumed.step), loss_of(resumed)) is None
    assert resumed.samples_seen == whole.samples_seen == 12 * 6
    for one, other in zip(state_of(resumed), state_of(whole), strict=True):
        assert torch.equal(one, other)


def stopped(batches, after, number=signal.SIGTERM):
    """The same batches, with a signal to this process before batch number `after`, from 1."""
    yield from itertools.islice(batches, after - 1)
    os.kill(os.getpid(), number)
    yield from batches


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops(tmp_path, number):
    run = tiny_run(tmp_path, num_steps=1000)
    previous = signal.getsignal(number)
    assert run_loop(run, stopped(stream(), 3, number), loss_of(run)) == number
    assert run.step == 3
    assert signal.getsignal(number) is previous
    again = tiny_run(tmp_path, num_steps=1000)
    assert again.restore()
    assert again.step == 3


def test_nothing_to_restore_in_an_empty_folder(tmp_path):
    run = tiny_run(tmp_path)
    assert not run.restore()
    assert not run.restore_weights()


class Named(list):
    names = ("cat.png", "dog.png")


@pytest.mark.parametrize("what", ["loss", "norm of the gradient"])
def test_what_is_not_finite_stops_naming_the_batch_and_keeps_the_last_checkpoint(tmp_path, what):
    run = tiny_run(tmp_path)
    run.save()
    before = (tmp_path / "checkpoints" / "step_00000000.pt").read_bytes()

    def broken(batch):
        mean = run.trained["first"](batch[0]).mean()
        # The square root has a finite value at 0, and an infinite slope.
        return mean * float("nan") if what == "loss" else (mean * 0).sqrt(), len(batch)

    batches = (Named([batch]) for batch in stream())
    with pytest.raises(Step1XEditError, match=f"{what} .*at step 0, .* cat.png, dog.png"):
        run_loop(run, batches, broken)
    assert (tmp_path / "checkpoints" / "step_00000000.pt").read_bytes() == before
    assert list(tmp_path.rglob("*.new")) == []


def test_learning_rate_warms_up_holds_and_falls(tmp_path):
    run = tiny_run(tmp_path, num_steps=20, warmup_steps=4, decay_share=0.5)
    rates = []
    for run.step in range(21):
        rates.append(run.learning_rate() / run.peak_lr)
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1, 1])
    assert rates[4:11] == pytest.approx([1] * 7)
    assert rates[10:] == pytest.approx([1 - i / 10 for i in range(11)])


def test_a_cosine_falls_slowly_first(tmp_path):
    run = tiny_run(tmp_path, num_steps=10, warmup_steps=0, decay_share=1, decay="cosine")
    rates = []
    for run.step in (0, 1, 5, 9, 10):
        rates.append(run.learning_rate() / run.peak_lr)
    assert rates == pytest.approx([1, 0.97553, 0.5, 0.02447, 0], abs=1e-5)


def test_every_optimizer_gets_the_scheduled_rate(tmp_path):
    run = tiny_run(tmp_path, num_steps=2, warmup_steps=2, decay_share=0, lr_scales=(1.0, 0.5))
    run_loop(run, stream(), loss_of(run))
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-2)
    assert run.optimizers[1].param_groups[0]["lr"] == pytest.approx(0.5e-2)


def test_average_follows_quickly_first_and_slowly_later(tmp_path):
    run = tiny_run(tmp_path, ema_decay=0.5)
    run.update_ema()
    weight = run.trained["first"].weight
    before = run.ema["first.weight"].clone()
    assert torch.equal(before, weight)
    with torch.no_grad():
        weight.add_(1)
    run.step = 1
    run.update_ema()  # decay (1 + 1) / (10 + 1), below the limit
    torch.testing.assert_close(run.ema["first.weight"], before + 9 / 11)
    run.step = 1000
    run.update_ema()
    torch.testing.assert_close(run.ema["first.weight"], before + 1 - (2 / 11) / 2)
    run.load_ema_into(run.trained)
    assert torch.equal(run.trained["first"].weight, run.ema["first.weight"])


def test_reports_are_lines_of_json(tmp_path):
    run = tiny_run(tmp_path, num_steps=6)
    run_loop(run, stream(), loss_of(run), pace=Pace(report_every=3))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6]
    assert [line["samples"] for line in lines] == [18, 36]
    assert all(line["loss"] > 0 for line in lines)


def test_lines_of_steps_that_a_kill_undid_are_not_there_twice(tmp_path):
    run = tiny_run(tmp_path, num_steps=6)
    run_loop(run, stream(), loss_of(run), pace=Pace(report_every=1, save_every=4))
    (tmp_path / "checkpoints" / "step_00000006.pt").unlink()
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')  # cut short by the kill
    again = tiny_run(tmp_path, num_steps=6)
    assert again.restore()
    assert again.step == 4
    run_loop(again, stream(4), loss_of(again), pace=Pace(report_every=1))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


def test_a_run_that_begins_anew_begins_its_log_anew(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 3.0}\n{"ste')
    run = tiny_run(tmp_path, num_steps=2)
    assert not run.restore()
    run_loop(run, stream(), loss_of(run), pace=Pace(report_every=1))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
