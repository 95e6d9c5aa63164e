"""The search does not make the host wait for the device, but for the stop test."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from espnet.nets import batch_beam_search
from espnet.nets.batch_beam_search import BatchBeamSearch
from espnet.nets.pytorch_backend.ctc import CTC
from espnet.nets.pytorch_backend.decoder.transformer_decoder import TransformerDecoder
from espnet.nets.scorers.ctc import CTCPrefixScorer
from espnet.nets.scorers.length_bonus import LengthBonus

ODIM, DIM, BEAM, INTERVAL = 30, 16, 4, 5
READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2"}


class HostReads(TorchDispatchMode):
    """Counts reads of values, and results whose size depends on values."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.count = 0
        for name in ("tolist", "cpu", "numpy"):  # On a CPU, no operator tells of these.
            monkeypatch.setattr(torch.Tensor, name, self.counted(getattr(torch.Tensor, name)))

    def counted(self, method):
        def call(*args, **options):
            self.count += 1
            return method(*args, **options)

        return call

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        by_mask = name in {"index", "index_put_"} and any(
            place is not None and place.dtype == torch.bool for place in args[1]
        )
        self.count += name in READS or by_mask
        return function(*args, **(kwargs or {}))


@pytest.fixture
def reads(monkeypatch):
    monkeypatch.setitem(batch_beam_search.STOP_TEST_INTERVAL, "cpu", INTERVAL)
    with HostReads(monkeypatch) as mode:
        yield mode


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x[0].item(),
        lambda x: bool(x.any()),
        lambda x: int(x.sum()),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
    ],
)
def test_reads_are_counted(reads, read):
    read(torch.ones(3))
    assert reads.count == 1


def test_other_operators_are_not(reads):
    x = torch.randn(4, 5)
    x[torch.tensor([1, 0])].masked_fill(x[:2] > 0, 1.0).topk(2).indices.gather(
        1, torch.zeros(2, 1).long()
    )
    assert reads.count == 0


def count_reads(reads, search, tokens):
    before = reads.count
    memory = torch.randn(3, 40, DIM, generator=torch.Generator().manual_seed(1))
    nbest = search(memory, torch.tensor([40, 25, 31]), maxlenratio=-tokens, minlenratio=-tokens)
    assert {len(one.yseq) - 2 for each in nbest for one in each} == {tokens}
    return reads.count - before


@pytest.mark.parametrize("ctc_weight", [0.0, 0.3, 1.0])
def test_steps_read_nothing_but_for_the_stop_test(reads, ctc_weight):
    torch.manual_seed(0)
    decoder = TransformerDecoder(
        odim=ODIM, attention_dim=DIM, attention_heads=2, linear_units=32, num_blocks=2
    ).eval()
    search = BatchBeamSearch(
        BEAM,
        ODIM,
        {"decoder": 1 - ctc_weight, "ctc": ctc_weight, "length_bonus": 0.5},
        {
            "decoder": decoder,
            "ctc": CTCPrefixScorer(CTC(odim=ODIM, encoder_dim=DIM), ODIM - 1),
            "length_bonus": LengthBonus(ODIM),
        },
        ODIM - 1,
        ODIM - 1,
        pre_beam_score_key=None if ctc_weight == 1 else "decoder",
    )
    counts = [count_reads(reads, search, tokens) for tokens in (6, 9, 16, 21)]
    # Stop tests come after every fifth and after the last step.
    assert [count - counts[0] for count in counts] == [0, 0, 2, 3]
