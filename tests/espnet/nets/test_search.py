"""How many tokens a recogniser's search may find."""

import pytest
import torch

from espnet.nets.pytorch_backend.e2e_asr_conformer import E2E
from espnet.nets.search import build_beam_search
from espnet.nets.search_options import SearchOptions

ODIM = 13
FRAMES = 5
SIZES = {
    "adim": 16,
    "aheads": 2,
    "eunits": 32,
    "elayers": 1,
    "dunits": 32,
    "dlayers": 1,
    "cnn_module_kernel": 7,
}
TEXT = [2, 3, 4, 5, 6, 7, 8, 9, 10, 11] * 2  # 4 tokens a frame


class Writes(torch.nn.Module):
    """A decoder that writes a text, whatever it hears."""

    def __init__(self, text, positions=10**6):
        super().__init__()
        self.text = [*text, ODIM - 1]
        self.positions = positions

    def max_tokens(self, frames):
        return self.positions

    def init(self, memory, memory_lengths, beam_size):
        return torch.zeros(len(memory_lengths) * beam_size, dtype=torch.int64)

    def score(self, tokens, state):
        scores = torch.full((len(tokens), ODIM), -20.0)
        for row, step in enumerate(state.tolist()):
            scores[row, self.text[min(step, len(self.text) - 1)]] = -0.1
        return scores, state + 1

    def reorder(self, state, index):
        return state[index]


def search_with(decoder, ctc_weight=0.0, **options):
    torch.manual_seed(0)
    model = E2E.from_keywords(ODIM, "video", ctc_weight=ctc_weight, **SIZES).eval()
    search = build_beam_search(
        model, SearchOptions(beam_size=2, **options), list(map(str, range(ODIM)))
    )
    model.decoder = decoder
    search.scorers["decoder"] = decoder
    return search


def found(search):
    best = search(torch.randn(FRAMES, 16))[0]
    return best.yseq[1:-1].tolist(), search.is_cut(best, FRAMES)


def test_without_ctc_there_may_be_more_tokens_than_frames():
    assert found(search_with(Writes(TEXT))) == (TEXT, False)


def test_the_option_lowers_and_raises_the_limit():
    assert found(search_with(Writes(TEXT), max_dec_tokens=7)) == (TEXT[:7], True)
    long = TEXT * 30
    assert found(search_with(Writes(long))) == (long[:448], True)
    assert found(search_with(Writes(long), max_dec_tokens=1000)) == (long, False)
    assert search_with(Writes(long)).most_tokens(1000) == 4000


@pytest.mark.parametrize("options", [{}, {"max_dec_tokens": 1000}])
def test_the_positions_of_the_decoder_are_the_limit(options):
    assert found(search_with(Writes(TEXT, positions=11), **options)) == (TEXT[:11], True)


def test_ctc_takes_a_frame_for_each_token():
    for options in ({}, {"max_dec_tokens": 1000}):
        search = search_with(Writes(TEXT), ctc_weight=0.5, **options)
        assert search.most_tokens(FRAMES) == FRAMES
    search = search_with(Writes(TEXT), ctc_weight=0.5, ctc_decode_weight=0.0)
    assert found(search) == (TEXT, False)
