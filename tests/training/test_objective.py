import pytest
import torch

from step1x_edit.training.objective import add_noise, sample_times, token_weights, velocity_loss


def test_times_are_logit_normal_and_shifted():
    plain = sample_times(200_000, (1.0, 1.0), torch.Generator().manual_seed(0))
    assert ((plain > 0) & (plain < 1)).all()
    logits = torch.logit(plain)
    assert logits.mean().item() == pytest.approx(0, abs=0.01)
    assert logits.std().item() == pytest.approx(1, abs=0.01)
    shifted = sample_times(200_000, (3.0, 3.0), torch.Generator().manual_seed(0))
    # t' = st / (1 + (s - 1) t) adds log(s) to the logit.
    torch.testing.assert_close(
        torch.logit(shifted), logits + torch.log(torch.tensor(3.0)), atol=1e-2, rtol=1e-3
    )


def test_shifts_are_drawn_log_uniformly_from_their_range():
    times = sample_times(200_000, (1.0, 12.0), torch.Generator().manual_seed(0))
    logits = torch.logit(times)
    # Each logit is a unit normal plus log(s), itself uniform between 0 and log(12).
    spread = torch.log(torch.tensor(12.0)).item()
    assert logits.mean().item() == pytest.approx(spread / 2, abs=0.01)
    assert logits.var().item() == pytest.approx(1 + spread**2 / 12, rel=0.02)


def test_noise_is_mixed_on_a_straight_line():
    clean, noise = torch.randn(2, 3, 5, 4)
    assert torch.equal(add_noise(clean, noise, torch.zeros(3)), clean)
    assert torch.equal(add_noise(clean, noise, torch.ones(3)), noise)
    times = torch.tensor([0.25, 0.5, 0.75])
    noisy = add_noise(clean, noise, times)
    for i, time in enumerate(times):
        torch.testing.assert_close(noisy[i], (1 - time) * clean[i] + time * noise[i])


def test_one_euler_step_of_the_target_velocity_reaches_the_clean_tokens():
    clean, noise = torch.randn(2, 1, 5, 4)
    time = torch.tensor([0.6])
    noisy = add_noise(clean, noise, time)
    torch.testing.assert_close(noisy - time * (noise - clean), clean)


def test_loss_is_the_mean_square_against_the_velocity():
    clean, noise, predicted = torch.randn(3, 2, 5, 4)
    assert velocity_loss(noise - clean, clean, noise).item() == 0
    expected = ((predicted - (noise - clean)) ** 2).mean()
    torch.testing.assert_close(velocity_loss(predicted, clean, noise), expected)


def test_weights_are_relative():
    clean, noise, predicted = torch.randn(3, 2, 5, 4)
    plain = velocity_loss(predicted, clean, noise)
    torch.testing.assert_close(
        velocity_loss(predicted, clean, noise, torch.full((2, 5), 7.0)), plain
    )
    first_only = torch.zeros(2, 5)
    first_only[:, 0] = 3
    expected = velocity_loss(predicted[:, :1], clean[:, :1], noise[:, :1])
    torch.testing.assert_close(velocity_loss(predicted, clean, noise, first_only), expected)


def test_every_sample_counts_alike():
    clean, noise, predicted = torch.randn(3, 2, 5, 4)
    weight = torch.ones(2, 5)
    weight[1] = 9
    torch.testing.assert_close(
        velocity_loss(predicted, clean, noise, weight), velocity_loss(predicted, clean, noise)
    )


def test_outlines_weigh_more_than_what_they_enclose():
    changed = torch.tensor([[0.0, 0.25, 1.0]])
    torch.testing.assert_close(token_weights(changed, 2.0, 4.0), torch.tensor([[1.0, 5.5, 3.0]]))
