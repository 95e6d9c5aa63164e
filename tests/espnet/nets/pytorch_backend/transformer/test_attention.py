import math

import pytest
import torch

from espnet.nets.pytorch_backend.real_frames import RealFrames
from espnet.nets.pytorch_backend.transformer.attention import (
    MultiHeadedAttention,
    RelPositionMultiHeadedAttention,
    shift_distances,
)
from espnet.nets.pytorch_backend.transformer.embedding import RelPositionalEncoding


def heads_of(x, heads):
    return x.view(*x.shape[:-1], heads, -1)


def test_attention_agrees_with_pytorchs_own():
    torch.manual_seed(0)
    ours = MultiHeadedAttention(heads=3, dim=12)
    theirs = torch.nn.MultiheadAttention(12, 3, batch_first=True)
    theirs.in_proj_weight.data = torch.cat(
        [ours.linear_q.weight, ours.linear_k.weight, ours.linear_v.weight]
    )
    theirs.in_proj_bias.data = torch.cat(
        [ours.linear_q.bias, ours.linear_k.bias, ours.linear_v.bias]
    )
    theirs.out_proj = ours.linear_out
    query, memory = torch.randn(2, 5, 12), torch.randn(2, 7, 12)
    mask = torch.arange(7) < torch.tensor([[7], [4]])
    expected, _ = theirs(query, memory, memory, key_padding_mask=~mask)
    torch.testing.assert_close(ours(query, memory, mask[:, None, None, :]), expected)


def test_causal_attention_sees_no_later_frame():
    torch.manual_seed(0)
    attention = MultiHeadedAttention(heads=2, dim=8)
    x = torch.randn(1, 6, 8)
    whole = attention(x, x, is_causal=True)
    for length in range(1, 7):
        part = attention(x[:, length - 1 : length], x[:, :length])
        torch.testing.assert_close(whole[:, length - 1 : length], part)


@pytest.mark.parametrize("sizes", [(5,), (2, 3), (1, 1, 1, 1, 1)])
def test_attention_by_pieces_is_attention(sizes):
    torch.manual_seed(0)
    attention = MultiHeadedAttention(heads=2, dim=8)
    query, memory = torch.randn(5, 3, 8), torch.randn(5, 7, 8)
    keys, values = attention.project_memory(memory)
    pieces = zip(keys.split(sizes), values.split(sizes), strict=True)
    torch.testing.assert_close(attention.attend_by_pieces(query, pieces), attention(query, memory))


@pytest.mark.parametrize("length", [1, 2, 9])
def test_relative_attention_agrees_with_a_loop_over_pairs(length):
    """Scores by the definition of Transformer-XL, a query and a key at a time."""
    torch.manual_seed(0)
    heads, dim = 2, 8
    attention = RelPositionMultiHeadedAttention(heads=heads, dim=dim)
    x = torch.randn(2, length, dim)
    encoding = RelPositionalEncoding(dim=dim, dropout_rate=0.0).distances(x)
    lengths = [length, max(1, length - 3)]
    real = RealFrames.of(torch.tensor(lengths), x)
    result = real.pad(attention(real.pack(x), encoding, real))

    queries, keys = heads_of(attention.linear_q(x), heads), heads_of(attention.linear_k(x), heads)
    values = heads_of(attention.linear_v(x), heads)
    positions = heads_of(attention.linear_pos(encoding), heads)
    for row, frames in enumerate(lengths):
        for i in range(frames):
            context = []
            for h in range(heads):
                scores = torch.stack(
                    [
                        (queries[row, i, h] + attention.pos_bias_u[h]) @ keys[row, j, h]
                        + (queries[row, i, h] + attention.pos_bias_v[h])
                        @ positions[length - 1 - (i - j), h]
                        for j in range(frames)
                    ]
                )
                weights = torch.softmax(scores / math.sqrt(dim / heads), dim=0)
                context.append(weights @ values[row, :frames, h])
            torch.testing.assert_close(result[row, i], attention.linear_out(torch.cat(context)))


def test_shift_distances_puts_each_distance_at_its_key():
    length = 5
    distances = torch.arange(length - 1, -length, -1.0).expand(1, 1, length, -1).contiguous()
    i, j = torch.meshgrid(torch.arange(length), torch.arange(length), indexing="ij")
    torch.testing.assert_close(shift_distances(distances)[0, 0], (i - j).float())


def test_heads_must_divide_the_dimension():
    with pytest.raises(ValueError, match="attention size 10 is no multiple of 4 heads"):
        MultiHeadedAttention(heads=4, dim=10)
