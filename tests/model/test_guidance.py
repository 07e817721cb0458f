"""Schedule, positions, guidance and the Euler walk."""

import json
import math
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file

from step1x_edit.model.guidance import (
    euler_sample,
    guided_velocity,
    is_guided,
    prepare_ids,
    schedule,
)
from step1x_edit.model.transformer import Step1XEditTransformer2DModel

REFERENCE = Path(__file__).parents[1] / "reference"


def relative_error(got, wanted):
    return ((got - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("key", json.loads((REFERENCE / "schedule.json").read_text()))
def test_schedule_is_the_reference_schedule(key):
    steps, tokens = map(int, key.split("x"))
    wanted = torch.tensor(json.loads((REFERENCE / "schedule.json").read_text())[key])
    assert relative_error(schedule(steps, tokens), wanted) <= 1e-6


def test_a_shift_of_its_own_replaces_the_rule():
    assert schedule(2, 64, shift=4.0).tolist() == pytest.approx([1.0, 0.8, 0.0])
    assert schedule(4, 64, shift=1.0).tolist() == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0])


@pytest.mark.parametrize("tokens", [64, 1024, 4096])
def test_schedule_is_that_of_diffusers_with_dynamic_shifting(tokens):
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    mu = 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / 28, 28).tolist(), mu=mu)
    assert relative_error(schedule(28, tokens), scheduler.sigmas) <= 1e-6


@pytest.mark.parametrize(("level", "normalised"), [(512, 4), (768, 5), (1024, 6)])
def test_cut_covers_the_first_steps_that_the_release_normalises(level, normalised):
    times = schedule(28, (level // 16) ** 2)[:-1]
    assert (times > 0.93).sum() == normalised


@pytest.mark.parametrize("version", ["v1.0", "v1.1"])
def test_positions_are_the_reference_positions(version):
    io = load_file(REFERENCE / f"transformer_{version.replace('.', 'p')}_io.safetensors")
    img_ids, txt_ids = prepare_ids(12, (6, 4), (6, 4), version=version)
    assert torch.equal(img_ids, io["img_ids"][0])
    assert torch.equal(txt_ids, io["txt_ids"][0])


def test_reference_may_have_another_size():
    img_ids, _ = prepare_ids(1, (2, 3), (1, 2))
    assert img_ids[6:].tolist() == [[1, 1, 1], [1, 1, 2]]


@torch.no_grad()
@pytest.mark.parametrize("version", ["v1.0", "v1.1"])
@pytest.mark.parametrize("cut", ["0.93", "1.0"])
def test_guided_denoising_is_the_reference_denoising(version, cut):
    name = version.replace(".", "p")
    io = load_file(REFERENCE / f"transformer_{name}_io.safetensors")
    model = Step1XEditTransformer2DModel.from_official(
        REFERENCE / f"transformer_{name}_official.safetensors", torch_dtype=torch.float32
    )
    noise, source = io["hidden_states"][:1].split(24, dim=1)
    img_ids, txt_ids = prepare_ids(12, (6, 4), (6, 4), version=model.version)
    times = schedule(6, 24)
    assert relative_error(times, io["schedule_6"].float()) <= 1e-6

    def velocity(latents, time):
        tokens = torch.cat([latents, source], dim=1).expand(2, -1, -1)
        features, mask = io["encoder_hidden_states"], io["mask"]
        output = model(tokens, features, mask, torch.full((2,), time), img_ids, txt_ids).sample
        conditional, unconditional = output[:, :24].chunk(2)
        return guided_velocity(conditional, unconditional, 6.0, time, float(cut))

    got = euler_sample(velocity, noise, times)
    assert relative_error(got, io[f"denoised_cfg6_truncate_{cut}"]) <= 1e-5


def test_guidance_normalises_long_vectors_alone_and_above_the_cut_alone():
    conditional = torch.tensor([[[3.0, 4.0], [0.3, 0.4]]])  # lengths 5 and 0.5
    unconditional = torch.zeros_like(conditional)
    plain = guided_velocity(conditional, unconditional, 2.0, time=0.93)
    assert torch.equal(plain, 2 * conditional)
    tamed = guided_velocity(conditional, unconditional, 2.0, time=0.94)
    torch.testing.assert_close(tamed[0, 0], plain[0, 0] / 5**0.4)
    assert torch.equal(tamed[0, 1], plain[0, 1])


def test_guidance_of_one_is_the_conditional_velocity():
    conditional, unconditional = torch.randn(2, 1, 3, 4, generator=torch.Generator().manual_seed(0))
    got = guided_velocity(conditional, unconditional, 1.0, time=0.5)
    torch.testing.assert_close(got, conditional)


def test_no_unconditional_row_for_none_and_minus_one():
    assert [is_guided(scale) for scale in (None, -1.0, 1.0, 6.0)] == [False] * 2 + [True] * 2


def test_euler_follows_a_straight_flow_exactly_and_reports_every_step():
    noise, picture = torch.tensor([[[2.0]]]), torch.tensor([[[-1.0]]])
    seen = []

    def watch(step, time, latents):
        seen.append((step, time, latents.item()))

    got = euler_sample(lambda _latents, _time: noise - picture, noise, schedule(4, 1024), watch)
    torch.testing.assert_close(got, picture)
    assert [step for step, _, _ in seen] == [0, 1, 2, 3]
    assert seen[-1][1] == 0.0
    for _, time, value in seen:
        assert math.isclose(value, 3 * time - 1, abs_tol=1e-5)


def test_callback_may_put_other_latents_in_place():
    def reset(step, _time, latents):
        return torch.full_like(latents, 10.0) if step == 0 else None

    got = euler_sample(
        lambda x, _: torch.ones_like(x), torch.zeros(1, 1, 1), schedule(2, 64), reset
    )
    assert got.item() == pytest.approx(10 - schedule(2, 64)[1].item())
