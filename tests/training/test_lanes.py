"""The parts of a batch, side by side, are the batch."""

import copy

import pytest
import torch
from torch import nn

from step1x_edit.training.lanes import Lanes, even_parts


class Rows:
    """A batch of numbers."""

    def __init__(self, values):
        self.values = values

    def __len__(self):
        return len(self.values)

    def rows(self, chosen):
        return Rows(self.values[chosen])


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))


def gradients(network):
    return [parameter.grad.clone() for parameter in network.parameters()]


def gradient_of(network, lanes, batch, noise=0.0):
    def loss_of(part, source):
        added = noise * torch.randn(part.values.shape, generator=source)
        return network(part.values + added).square().mean(), len(part)

    torch.manual_seed(3)
    loss, count = lanes.gradient(loss_of, batch, list(network.parameters()))
    assert count == len(batch)
    return loss, gradients(network)


@pytest.mark.parametrize("num_parts", [1, 2, 3, 7])
def test_loss_and_gradient_are_the_whole_batch_s(network, num_parts):
    batch = Rows(torch.randn(7, 8))
    loss, got = gradient_of(network, Lanes(num_parts, 2), batch)
    network.zero_grad()
    whole = network(batch.values).square().mean()
    whole.backward()
    assert loss == pytest.approx(whole.item(), rel=1e-6)
    for own, wanted in zip(got, gradients(network), strict=True):
        torch.testing.assert_close(own, wanted)


def test_chance_does_not_hang_on_the_number_of_threads(network):
    batch = Rows(torch.randn(7, 8))
    loss, got = gradient_of(network, Lanes(3, 1), batch, noise=1.0)
    for _ in range(5):
        again, others = gradient_of(network, Lanes(3, 3), batch, noise=1.0)
        assert again == loss
        assert all(map(torch.equal, got, others))


def test_what_is_not_read_has_no_gradient(network):
    unread = nn.Parameter(torch.zeros(2))
    lanes, batch = Lanes(2, 2), Rows(torch.randn(4, 8))
    parameters = [*network.parameters(), unread]
    lanes.gradient(lambda part, _: (network(part.values).sum(), len(part)), batch, parameters)
    assert unread.grad is None
    assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize("num_parts", [1, 2])
def test_no_two_parameters_share_a_gradient(num_parts):
    """Autograd hands the one of a sum to both its terms; clipping would scale it twice."""
    terms = [nn.Parameter(torch.zeros(8)) for _ in range(2)]
    lanes, batch = Lanes(num_parts, 2), Rows(torch.randn(4, 8))
    lanes.gradient(
        lambda part, _: ((part.values + (terms[0] + terms[1])).square().mean(), len(part)),
        batch,
        terms,
    )
    norm = torch.stack([term.grad for term in terms]).norm()
    nn.utils.clip_grad_norm_(terms, float(norm) / 2)
    torch.testing.assert_close(torch.stack([term.grad for term in terms]).norm(), norm / 2)


def test_an_error_in_a_part_is_the_callers(network):
    def loss_of(part, _):
        raise ValueError(f"{len(part)} rows")

    with pytest.raises(ValueError, match="2 rows"):
        Lanes(2, 2).gradient(loss_of, Rows(torch.randn(4, 8)), list(network.parameters()))


def test_a_step_of_muon_is_its_own(network):
    """Also from a state that was saved."""
    networks = [network, copy.deepcopy(network)]
    optimizers = [
        torch.optim.Muon([own[0].weight, own[2].weight], lr=0.1, weight_decay=0.01)
        for own in networks
    ]
    lanes = Lanes(2, 2)
    for _ in range(3):
        for own in networks:
            own.zero_grad()
            own(torch.ones(1, 8)).square().sum().backward()
        optimizers[0].step()
        lanes.step(optimizers[1])
        optimizers[1].load_state_dict(copy.deepcopy(optimizers[1].state_dict()))
    for a, b in zip(*(own.parameters() for own in networks), strict=True):
        assert torch.equal(a, b)
    saved = [optimizer.state_dict() for optimizer in optimizers]
    assert saved[0]["state"].keys() == saved[1]["state"].keys() == {0, 1}


def test_no_part_is_empty():
    assert even_parts(5, 2) == [slice(0, 2), slice(2, 5)]
    assert even_parts(2, 3) == [slice(0, 1), slice(1, 2)]
