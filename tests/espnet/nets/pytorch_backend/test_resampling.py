import pytest
import torch

from espnet.nets.pytorch_backend.resampling import resample, resampled_lengths, resampled_width


def sequence(length, width=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, length, width, generator=generator)


@pytest.mark.parametrize("length", [1, 2, 7, 8])
def test_fifty_are_stacked_in_pairs(length):
    x = sequence(length)
    stacked = resample(x, 50, 25)
    pairs = [
        torch.cat([x[:, t], x[:, t + 1] if t + 1 < length else torch.zeros(2, 3)], dim=1)
        for t in range(0, length, 2)
    ]
    torch.testing.assert_close(stacked, torch.stack(pairs, dim=1), rtol=0, atol=0)
    assert stacked.size(2) == resampled_width(3, 50, 25)
    assert resampled_lengths(torch.tensor([length]), 50, 25).item() == stacked.size(1)


def test_twenty_five_are_repeated():
    x = sequence(4)
    repeated = resample(x, 25, 50)
    assert all(torch.equal(repeated[:, t], x[:, t // 2]) for t in range(8))
    assert resampled_width(3, 25, 50) == 3
    assert resampled_lengths(torch.tensor([4, 1]), 25, 50).tolist() == [8, 2]


@pytest.mark.parametrize("rate", [25, 50])
def test_what_has_the_frame_rate_stays_as_it_is(rate):
    x = sequence(5)
    assert resample(x, rate, rate) is x
    assert resampled_width(3, rate, rate) == 3
    assert resampled_lengths(torch.tensor([5]), rate, rate).item() == 5
