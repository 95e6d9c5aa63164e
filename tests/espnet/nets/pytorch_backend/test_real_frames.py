import pytest
import torch
from torch import nn
from torch.nn import functional as F

from espnet.nets.pytorch_backend.real_frames import RealFrames, batch_norm, convolve

LENGTHS = [[5], [3, 5, 1], [4, 4], [2, 0, 3]]
CPU = torch.device("cpu")


def utterances(lengths, *shape):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(length, *shape, generator=generator) for length in lengths]


def padded(parts, length, value=0.0):
    return torch.stack(
        [F.pad(x, [0, 0] * (x.dim() - 1) + [0, length - len(x)], value=value) for x in parts]
    )


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("longer", [0, 2])
def test_packs_and_pads(lengths, longer):
    parts = utterances(lengths, 2, 3)
    length = max(lengths) + longer
    real = RealFrames(torch.tensor(lengths), length, CPU)
    packed = real.pack(padded(parts, length, value=7.0))
    torch.testing.assert_close(packed, torch.cat(parts))
    torch.testing.assert_close(real.pad(packed), padded(parts, length))
    features = padded(parts, length, value=7.0).flatten(2)
    torch.testing.assert_close(real.clear(features), padded(parts, length).flatten(2))
    assert real.number == sum(lengths)
    expected = torch.arange(length) < torch.tensor(lengths).unsqueeze(1)
    if expected.all():
        assert real.mask is None
    else:
        assert torch.equal(real.mask, expected)


def test_an_utterance_is_no_longer_than_the_batch():
    real = RealFrames(torch.tensor([9, 2]), 4, CPU)
    assert real.pack(torch.arange(8).view(2, 4)).tolist() == [0, 1, 2, 3, 4, 5]


def test_blocks_hold_utterances_of_similar_length():
    blocks = RealFrames(torch.tensor([10, 9, 7, 6, 6, 2, 1]), 10, CPU).blocks
    assert [block.lengths.tolist() for block in blocks] == [[10, 9, 7], [6, 6], [2], [1]]
    assert [block.length for block in blocks] == [10, 6, 2, 1]


def test_first_frames_of_each_utterance():
    real = RealFrames(torch.tensor([3, 1, 2]), 4, CPU)
    assert real.first(torch.tensor([2, 1, 0])).tolist() == [0, 1, 3]


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("offset", [-3, -1, 0, 2])
def test_neighbours_are_of_the_same_utterance(lengths, offset):
    real = RealFrames(torch.tensor(lengths), max(lengths), CPU)
    expected, first = [], 0
    for length in lengths:
        inside = range(first, first + length)
        expected += [n + offset if n + offset in inside else sum(lengths) for n in inside]
        first += length
    assert real.neighbour(offset).tolist() == expected


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(("stride", "before", "after"), [(1, 1, 1), (2, 1, 0)])
def test_convolves_frames_like_whole_utterances(lengths, stride, before, after):
    torch.manual_seed(0)
    convolution = nn.Conv1d(3, 2, 3, stride=stride, padding=1)
    parts = utterances(lengths, 4, 3)  # four steps a frame
    real = RealFrames(torch.tensor(lengths), max(lengths), CPU)
    expected = [convolution(x.flatten(0, 1).T)[None].mT.flatten(0, 1) for x in parts if len(x)]
    result = convolve(convolution, real.extend(torch.cat(parts), before, after))
    torch.testing.assert_close(result.flatten(0, 1), torch.cat([x.squeeze(0) for x in expected]))


def test_gradients_of_packing_and_extending():
    lengths = torch.tensor([3, 1, 2])
    x = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
    real = RealFrames.of(lengths, x)
    assert torch.autograd.gradcheck(lambda x: real.pad(real.extend(real.pack(x), 2, 1)), x)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("kernel", "padding"), [(1, 0), (5, 0), (5, 2)])
def test_convolves_channels_last(kernel, stride, padding):
    torch.manual_seed(0)
    convolution = nn.Conv1d(3, 4, kernel, stride=stride)
    x = torch.randn(2, 9, 3)
    expected = convolution(F.pad(x.mT, (padding, padding))).mT
    torch.testing.assert_close(convolve(convolution, x, padding), expected)


def test_batch_norm_is_over_all_but_the_channels():
    torch.manual_seed(0)
    x = torch.randn(6, 5, 3) * 2 + 1
    expected = (x - x.mean((0, 1))) / (x.var((0, 1), correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(batch_norm(nn.BatchNorm1d(3), x), expected)
