import re
from inspect import signature

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import decode, search_step
from benchmarks.common import CPU, Row, Timing
from benchmarks.search_step import FIRST, LAST, SearchBenchmark, SearchWork, Size

pytestmark = pytest.mark.usefixtures("no_gradients")
SIZE, BEAM = Size(odim=40, dim=8, heads=2, units=12, blocks=2), 3
WORK = SearchWork(
    step_frames=(45,),
    step_repeats=2,
    batch_frames=(45, 50, 41),
    batch_tokens=4,
    memory_shapes=((2, 6), (3, 4)),
)


@pytest.fixture
def benchmark():
    return SearchBenchmark(SIZE, BEAM, CPU)


class Products(TorchDispatchMode):
    """Notes the shapes of matrix products, without zeros, and the names of all other operators."""

    def __init__(self):
        super().__init__()
        self.shapes, self.others = [], set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("mm", "bmm", "addmm", "baddbmm"):
            left, right = args[-2:]
            self.shapes.append((*left.shape, right.shape[-1]))
        elif name == "_scaled_dot_product_flash_attention_for_cpu":
            query, keys = args[:2]
            batch, heads, queries, head_dim = query.shape
            length = keys.size(2)
            self.shapes.append((batch * heads, queries, head_dim, length))
            self.shapes.append((batch * heads, queries, length, head_dim))
        else:
            self.others.add(name)
        return function(*args, **(kwargs or {}))


def test_bare_products_are_those_of_the_steps_and_nothing_else(benchmark):
    frames = 45
    compute = benchmark.products(BEAM, frames, range(FIRST, LAST + 1))
    with Products() as bare:
        compute()
    assert not bare.others
    searches = []
    for tokens in (FIRST - 1, LAST):
        with Products() as products:
            benchmark.search(benchmark.memory(frames), tokens)
        searches.append(products.shapes)
    first, last = searches
    assert last[: len(first)] == first
    assert sorted(bare.shapes) == sorted(last[len(first) :])


def test_all_searches_decode_as_many_tokens(benchmark):
    memories = [benchmark.memory(frames, seed) for seed, frames in enumerate((9, 7, 8))]
    together = benchmark.search_batch(memories, 5)
    alone = [benchmark.search(memory, 5) for memory in memories]
    for nbest in (*together, *alone):
        assert {len(hypothesis.yseq) for hypothesis in nbest} == {1 + 5 + 1}
    assert [[one.yseq.tolist() for one in nbest] for nbest in together] == [
        [one.yseq.tolist() for one in nbest] for nbest in alone
    ]


def test_ctc_scores_the_candidates_of_every_step(benchmark, monkeypatch):
    calls = []
    scorer = benchmark.ctc_scorer
    for name in ("score_partial", "reorder_partial"):
        method = getattr(scorer, name)

        def call(*args, name=name, method=method):
            calls.append((name, args[1].shape))
            return method(*args)

        monkeypatch.setattr(scorer, name, call)
    steps = [("score_partial", (BEAM, 5)), ("reorder_partial", (BEAM,))]  # 4 of 1.5 · 3, and eos
    compute = benchmark.ctc_steps(20)
    for _ in range(2):
        calls.clear()
        compute()
        assert calls == steps * (LAST - FIRST + 1)
    calls.clear()
    benchmark.search(benchmark.memory(20), 2)
    assert calls == steps + steps[:1]


def test_the_step_for_a_graph_is_in_the_middle(benchmark):
    step = benchmark.decoder_step(7)
    with Products() as products:
        scores = step()
    assert scores.shape == (BEAM, SIZE.odim)
    head_dim, middle = SIZE.dim // SIZE.heads, (FIRST + LAST) // 2
    assert products.shapes.count((BEAM * SIZE.heads, 1, head_dim, middle)) == SIZE.blocks


def test_a_step_is_what_further_steps_take(benchmark, monkeypatch):
    def time_in_turns(functions, device, repeats):
        assert (device, repeats, len(functions)) == (CPU, 2, 4)
        return [Timing(36 * time, None) for time in (10.0, 70.0, 40.0, 3.0)]

    monkeypatch.setattr(search_step, "time_in_turns", time_in_turns)
    rows = [str(row) for row in search_step.measure_step(benchmark, 45, WORK)]
    assert rows == [
        "| A step, 45 frames, beam 3 (reference: bare products) | 60.0 ms | 40.0 ms | 1.50 times "
        "| at most 1.6 times: yes |",
        "| Its CTC prefix scores, 45 frames, beam 3 (reference: the step) | 3 ms | 60.0 ms "
        "| 0.05 times | at most 0.2 times: yes |",
    ]


def test_on_a_gpu_the_reference_is_a_graph(benchmark, monkeypatch):
    replays = []

    def graph_of(function):
        assert function().shape == (BEAM, SIZE.odim)
        return lambda: replays.append(1)

    monkeypatch.setattr(search_step, "graph_of", graph_of)
    benchmark.on_gpu = True
    reference, name = benchmark.reference(45)
    reference()
    assert len(replays) == LAST - FIRST + 1
    assert name == "its decoder in a CUDA graph"


def test_a_batch_beside_one_by_one(benchmark):
    row = search_step.measure_batch(benchmark, WORK)
    assert row.what == (
        "3 utterances of 1.6 to 2.0 s at once, 4 tokens each, an utterance (reference: one by one)"
    )
    assert row.faster
    assert row.value > 0 < row.reference
    assert row.notes[0] == (
        "at once and one by one, the best hypotheses of 3 of 3 utterances have the same tokens; "
        "every hypothesis has 4"
    )
    assert re.search(r"of a step are \d+\.\d\d times faster for 3 utterances at once", row.notes[1])


def test_memory_is_told_beside_keys_and_values(benchmark, monkeypatch):
    searches = []

    def peak_of(function, device):
        searches.append([len(one.yseq) - 2 for nbest in function() for one in nbest])
        assert device == CPU
        return 30_000

    monkeypatch.setattr(search_step, "peak_of", peak_of)
    rows = list(search_step.measure_memory(benchmark, WORK))
    assert [set(tokens) for tokens in searches] == [{6}, {4}]
    # 12 frames of 3 hypotheses, 2 blocks, keys and values of 8 features of 4 bytes
    assert [row.reference for row in rows] == [12 * 3 * 2 * 2 * 8 * 4 / 1e6] * 2
    assert str(rows[0]).startswith("| Memory of 2 utterances of 6 frames (reference: keys and")
    assert "--decode-max-frames 1600, a search of 3 utterances of 533 frames" in rows[1].notes[0]


def test_the_default_is_the_projects_own_decoder(monkeypatch, tables):
    sizes = []

    def measure(size, beam_size, work, device):
        assert work == search_step.WORK["cpu"]
        sizes.append((size, beam_size, device))
        yield Row("a row", 1.0, 2.0, 1.6, "ms", notes=["a note"])

    monkeypatch.setattr(search_step, "measure", measure)
    decode.main(["--device", "cpu"])
    decode.main(["--device", "cpu", "--decoder", "transformer", "--beam-size", "7"])
    assert sizes == [(Size(), beam, CPU) for beam in (40, 7)]
    for table in tables():
        assert table.notes == ["- a note"]
        assert table.head == ["what", "measured", "reference", "ratio", "target"]
        assert table.rows == [["a row", "1 ms", "2 ms", "0.50 times", "at most 1.6 times: yes"]]


def test_command_prints_all_rows(monkeypatch, tables):
    monkeypatch.setattr(search_step, "Size", lambda: SIZE)
    monkeypatch.setitem(search_step.WORK, "cpu", WORK)
    decode.main(["--device", "cpu", "--beam-size", "3"])
    (table,) = tables()
    beginnings = ["A step, 45", "Its CTC", "3 utterances", "Memory of 2", "Memory of 3"]
    for row, beginning in zip(table.rows, beginnings, strict=True):
        assert row[0].startswith(beginning)


def test_the_checkpoints_precision_is_not_for_the_own_decoder(capsys):
    with pytest.raises(SystemExit):
        decode.main(["--device", "cpu", "--dtype", "bfloat16"])
    assert "--dtype bfloat16 is for a checkpoint" in capsys.readouterr().err


def test_the_full_size_is_that_of_published_models():
    defaults = signature(search_step.TransformerDecoder).parameters
    names = ("attention_dim", "attention_heads", "linear_units", "num_blocks")
    assert Size() == Size(5049, *(defaults[name].default for name in names))
    frames = search_step.WORK["cpu"].batch_frames
    assert (len(frames), min(frames), max(frames)) == (16, 50, 150)
