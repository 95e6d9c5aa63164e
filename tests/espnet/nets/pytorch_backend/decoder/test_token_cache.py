import pytest
import torch

from espnet.nets.pytorch_backend.decoder import token_cache
from espnet.nets.pytorch_backend.decoder.token_cache import TokenCache

LAYERS, HEADS, HEAD_DIM = 2, 3, 4
ROW_BYTES = 2 * HEADS * HEAD_DIM * 4


def by_head(rows):
    """(N, U, D) -> (N, H, U, D/H)."""
    return rows.unflatten(2, (HEADS, HEAD_DIM)).transpose(1, 2)


@pytest.mark.parametrize("usual_steps", [0, 3, 100])
@pytest.mark.parametrize("piece_bytes", [1, 7 * ROW_BYTES, 2**20])
def test_agrees_with_keys_and_values_that_move_with_their_hypotheses(
    usual_steps, piece_bytes, monkeypatch
):
    monkeypatch.setattr(token_cache, "CHUNK", 4)
    monkeypatch.setitem(token_cache.PIECE_BYTES, "cpu", piece_bytes)
    generator = torch.Generator().manual_seed(0)
    cache = TokenCache(LAYERS, HEADS, usual_steps)
    hypotheses = 6
    expected = torch.empty(LAYERS, 2, hypotheses, 0, HEADS * HEAD_DIM)
    for step in range(11):
        assert cache.length == step
        cache.begin_step(torch.zeros(hypotheses, dtype=torch.int64))
        added = torch.randn(LAYERS, 2, hypotheses, 1, HEADS * HEAD_DIM, generator=generator)
        expected = torch.cat([expected, added], dim=3)
        for layer in range(LAYERS):
            cache.write(layer, *added[layer])
            pieces = list(cache.read(layer))
            rows = max(1, piece_bytes // (ROW_BYTES * (step + 1)))
            assert max(len(keys) for keys, _ in pieces) <= rows
            for got, one in zip(zip(*pieces, strict=True), expected[layer], strict=True):
                torch.testing.assert_close(torch.cat(got), by_head(one), rtol=0, atol=0)
        if step == 5:  # Some hypotheses are over.
            hypotheses = 4
        index = torch.randint(expected.size(2), (hypotheses,), generator=generator)
        cache.reorder(index)
        expected = expected[:, :, index]


def test_room_is_made_by_the_chunk_and_what_is_stored_does_not_move(monkeypatch):
    monkeypatch.setattr(token_cache, "CHUNK", 4)
    cache = TokenCache(1, HEADS, 100)
    tokens, row = torch.zeros(5, dtype=torch.int64), torch.ones(5, 1, HEADS * HEAD_DIM)
    places = []
    for _ in range(9):
        cache.begin_step(tokens)
        cache.write(0, row, row)
        cache.reorder(torch.tensor([1, 1, 0, 2, 4]))
        places.append((cache._stores[0].data_ptr(), len(cache._stores[0])))
    assert [rows for _, rows in places] == [4 * 5] * 4 + [8 * 5] * 4 + [12 * 5]
    assert len({place for place, _ in places[:4]}) == len({place for place, _ in places[4:8]}) == 1


def test_no_more_room_than_usual_steps_need():
    cache = TokenCache(1, HEADS, 3)
    row = torch.ones(5, 1, HEADS * HEAD_DIM)
    cache.begin_step(torch.zeros(5, dtype=torch.int64))
    cache.write(0, row, row)
    assert cache._stores[0].shape == (3 * 5, 2 * HEADS * HEAD_DIM)


def test_keeps_the_precision_of_what_is_written():
    cache = TokenCache(1, HEADS)
    row = torch.ones(2, 1, HEADS * HEAD_DIM, dtype=torch.bfloat16)
    cache.begin_step(torch.zeros(2, dtype=torch.int64))
    cache.write(0, row, row)
    ((keys, values),) = cache.read(0)
    assert keys.dtype == values.dtype == torch.bfloat16
