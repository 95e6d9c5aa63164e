"""The pretended device counts what makes the host wait, and refuses what CUDA refuses."""

import pytest
import torch
from torch import nn

from tests.device_waits import DEVICE, OnDevice, Waits, to_device


@pytest.fixture
def waits():
    with Waits() as mode:
        yield mode


@pytest.fixture
def x():
    return to_device(torch.tensor([[3.0, -1.0, 2.0], [0.0, 5.0, -4.0]]))


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x[0, 0].item(),
        lambda x: float(x.sum()),
        lambda x: bool((x > 0).any()),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x[torch.tensor([1, 0])],
        lambda x: x.index_put((x > 0,), x[0]),
        lambda x: x.masked_select(x > 0),
        lambda x: x.long().clamp(min=0)[0].repeat_interleave(x.long().clamp(min=0)[0]),
        lambda x: x.equal(x),
        lambda x: torch.ones(3).to(x.device),
        lambda x: x.copy_(torch.ones(2, 3)),
        lambda x: torch.zeros(2, 3).copy_(x),
        lambda x: torch.tensor([1, 2], device=x.device),
        lambda x: x.new_tensor([1.0]),
    ],
)
def test_waits_are_counted_with_their_line(waits, x, wait):
    wait(x)
    assert waits.count >= 1
    assert {place.split(":")[0] for place in waits.places} == {"tests/test_device_waits.py"}


def test_other_operators_are_no_waits(waits, x):
    rows = torch.tensor([1, 0]).to(x.device, non_blocking=True)
    y = x[rows].masked_fill(x > 0, 1.0).topk(2).values * torch.tensor(2.0)
    y[x[:, :2] > 0] = 7.0  # one value: no place is looked for
    y.view(-1)[:3].zero_()
    places = torch.arange(2, device=x.device) + x.new_zeros(2, dtype=torch.int64)
    y = torch.where(places > 0, y, -y).to("cpu", non_blocking=True)
    assert waits.count == 0
    assert type(y) is torch.Tensor
    assert y.tolist() == [[0.0, 0.0], [0.0, 7.0]]


@pytest.mark.parametrize(
    "mix",
    [
        lambda x: x + torch.ones(3),
        lambda x: x.sum() * torch.ones(3),
        lambda x: torch.ones(3)[x[0].long().clamp(0, 2)],
        lambda x: torch.cat([x, torch.ones(1, 3)]),
        lambda x: nn.functional.linear(x, torch.ones(2, 3)),
        lambda x: x.index_select(0, torch.tensor([0])),
    ],
)
@pytest.mark.usefixtures("waits")
def test_tensors_of_device_and_host_do_not_mix(x, mix):
    with pytest.raises(RuntimeError, match="expected all tensors to be on the same device"):
        mix(x)


def test_lengths_of_ctc_belong_on_the_host(waits):
    torch.manual_seed(0)
    scores, targets = torch.randn(6, 2, 5), torch.tensor([[1, 2], [3, 4]])
    lengths = torch.tensor([6, 5]), torch.tensor([2, 2])
    expected = nn.functional.ctc_loss(scores, targets, *lengths, reduction="none")
    scores, targets = to_device((scores, targets))
    loss = nn.functional.ctc_loss(scores, targets, *lengths, reduction="none")
    assert waits.count == 0
    torch.testing.assert_close(loss.cpu(), expected)
    waits.places.clear()
    nn.functional.ctc_loss(scores, targets, *to_device(lengths), reduction="none")
    assert waits.count == 2


def test_values_and_gradients_are_those_of_the_host(waits):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    x = torch.randn(5, 3)
    loss = layers(x).square().mean()
    loss.backward()
    expected = {name: p.grad for name, p in layers.named_parameters()}
    running = layers[1].running_mean.clone()
    layers[1].reset_running_stats()
    to_device(layers)
    assert layers[0].weight.device == DEVICE
    with torch.autocast(DEVICE.type, enabled=False):
        found = layers(to_device(x)).square().mean()
    found.backward()
    assert waits.count == 0
    torch.testing.assert_close(found.on_host, loss)
    torch.testing.assert_close(layers[1].running_mean.on_host, running)
    for name, parameter in layers.named_parameters():
        assert isinstance(parameter.grad, OnDevice)
        torch.testing.assert_close(parameter.grad.on_host, expected[name])
