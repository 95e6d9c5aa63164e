import math

import torch

from espnet.nets.pytorch_backend.transformer.embedding import (
    PositionalEncoding,
    RelPositionalEncoding,
)


def encode(position, dim):
    """The formula of the paper, a number at a time."""
    return [
        (math.sin if k % 2 == 0 else math.cos)(position / 10000 ** ((k - k % 2) / dim))
        for k in range(dim)
    ]


def test_absolute_positions():
    x = torch.randn(2, 6, 8)
    expected = x * math.sqrt(8) + torch.tensor([encode(t, 8) for t in range(6)])
    module = PositionalEncoding(dim=8, dropout_rate=0.0)
    torch.testing.assert_close(module(x), expected)
    torch.testing.assert_close(module(x[:, 4:5], offset=4), expected[:, 4:5])


def test_relative_positions_run_from_the_first_key_to_the_last():
    x = torch.randn(1, 4, 6)
    module = RelPositionalEncoding(dim=6, dropout_rate=0.0)
    torch.testing.assert_close(module(x), x * math.sqrt(6))
    torch.testing.assert_close(
        module.distances(x), torch.tensor([encode(t, 6) for t in range(3, -4, -1)])
    )
