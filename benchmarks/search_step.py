"""Measures the search with the project's own Transformer decoder: a step, a batch, its memory.

`benchmarks/decode.py` without arguments prints the table; two minutes on two CPU cores. Model and
search have the sizes of auto_avsr: 5049 tokens, 6 blocks of 768 features, 12 heads and 3072 hidden
units, beam 40, CTC weight 0.1. Weights are random and no hypothesis may end early, so that what is
compared decodes as many tokens.

- A step: a search of 40 tokens less one of 4, in 36 steps; what precedes the first token counts in
  neither.
- Bare products, its reference on a CPU: the matrix products that a decoder with cached keys and
  values cannot avoid, of the same shapes and numbers, with nothing between them.
- CUDA graph, its reference on a GPU: the decoder's own step after 22 tokens, replayed.
- A batch: 16 utterances of 2 to 6 s at once, and one by one. A note tells how much faster the bare
  products are for so many rows: with one CPU thread little, since 40 rows keep it busy already.
- Memory: what a search takes beside weights and input, for few long utterances and for many short
  ones of as many frames in all; the reference are the keys and values of one token a frame for
  every hypothesis, which is what grows with `--decode-max-frames`. On a CPU, what the C library
  keeps of freed memory counts too.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from benchmarks.common import Row, time_in_turns
from benchmarks.memory import peak_of
from benchmarks.noise import noise
from espnet.formats import VIDEO_RATE
from espnet.nets.batch_beam_search import BatchBeamSearch
from espnet.nets.hypothesis import Hypothesis
from espnet.nets.pytorch_backend.ctc import CTC
from espnet.nets.pytorch_backend.decoder.transformer_decoder import TransformerDecoder
from espnet.nets.scorers.ctc import CTCPrefixScorer

CTC_WEIGHT = 0.1
FIRST, LAST = 5, 40  # tokens that the timed steps attend to
MIDDLE = (FIRST + LAST) // 2
MAX_FRAMES = 1600  # default of --decode-max-frames
CTC_TARGET = 0.2


@dataclass(frozen=True)
class Size:
    """Shape of the decoder."""

    odim: int = 5049  # vocabulary V
    dim: int = 768  # features D
    heads: int = 12  # attention heads H
    units: int = 3072  # hidden units
    blocks: int = 6  # number of blocks L


@dataclass(frozen=True)
class SearchWork:
    """How much is computed."""

    step_frames: tuple[int, ...] = (75, 150)  # frames of the utterances of which a step is timed
    step_repeats: int = 4  # rounds of timing a step
    step_target: float = 1.6  # ratio of a step to its reference
    # Frames of the utterances that are decoded at once.
    batch_frames: tuple[int, ...] = tuple(50 + 100 * i // 15 for i in range(16))  # 2 to 6 s
    batch_tokens: int = 10  # tokens that are decoded of each
    batch_repeats: int = 3  # rounds of timing these
    batch_target: float = 1.5  # how many times faster than one by one
    # Batches whose memory is measured: utterances, and frames of each.
    memory_shapes: tuple[tuple[int, int], ...] = ((2, 80), (8, 20))


ON_GPU = {"step_repeats": 10, "step_target": 2, "batch_tokens": 50, "batch_target": 6}
WORK = {
    "cpu": SearchWork(),
    "cuda": SearchWork(**ON_GPU, memory_shapes=((4, 400), (16, 100))),
}


class SearchBenchmark:
    """A decoder, a CTC layer and searches with them for K hypotheses."""

    def __init__(self, size: Size, beam_size: int, device: torch.device) -> None:
        torch.manual_seed(0)
        self.size = size
        self.beam_size = beam_size
        self.device = device
        self.on_gpu = device.type == "cuda"
        self.eos = size.odim - 1
        self.decoder = TransformerDecoder(
            odim=size.odim,
            attention_dim=size.dim,
            attention_heads=size.heads,
            linear_units=size.units,
            num_blocks=size.blocks,
        )
        self.decoder.to(device).eval()
        self.ctc = CTC(odim=size.odim, encoder_dim=size.dim).to(device).eval()
        self.ctc_scorer = CTCPrefixScorer(self.ctc, self.eos)
        self.beam_search = BatchBeamSearch(
            beam_size=beam_size,
            vocab_size=size.odim,
            weights={"decoder": 1 - CTC_WEIGHT, "ctc": CTC_WEIGHT},
            scorers={"decoder": self.decoder, "ctc": self.ctc_scorer},
            sos=self.eos,
            eos=self.eos,
            pre_beam_score_key="decoder",
        )

    def memory(self, frames: int, seed: int = 0) -> Tensor:
        """Encoder output of an utterance: noise, (T, D)."""
        return noise(frames, self.size.dim, device=self.device, seed=seed)

    def search(self, memory: Tensor, tokens: int) -> list[Hypothesis]:
        """N-best list of one utterance (T, D), all of as many tokens."""
        return self.beam_search(memory, maxlenratio=-tokens, minlenratio=-tokens)

    def search_batch(self, memories: list[Tensor], tokens: int) -> list[list[Hypothesis]]:
        """The same of several utterances at once."""
        lengths = torch.tensor([len(memory) for memory in memories])
        padded = pad_sequence(memories, batch_first=True)
        return self.beam_search(padded, lengths, maxlenratio=-tokens, minlenratio=-tokens)

    def products(self, rows: int, frames: int, lengths: Iterable[int]) -> Callable[[], None]:
        """The matrix products of some steps, and nothing else.

        Rows are hypotheses N, of one utterance as far as its memory of T frames is concerned;
        lengths are the tokens that each step attends to.
        """
        size = self.size
        random = partial(torch.randn, device=self.device)
        head_dim = size.dim // size.heads
        x, hidden = random(rows, size.dim), random(rows, size.units)
        query = random(rows * size.heads, 1, head_dim)
        to_memory = random(size.heads, rows, head_dim)
        tokens = [
            (
                random(len(query), head_dim, length),
                random(len(query), 1, length),
                random(len(query), length, head_dim),
            )
            for length in lengths
        ]
        memory_keys = random(size.heads, head_dim, frames)
        memory_weights = random(size.heads, rows, frames)
        memory_values = random(size.heads, frames, head_dim)
        blocks = [[weight.t() for weight in _block_weights(one)] for one in self.decoder.decoders]
        output = self.decoder.output_layer.weight.t()

        def compute() -> None:
            for keys, weights, values in tokens:
                for *projections, feed_forward_in, feed_forward_out in blocks:
                    for projection in projections:
                        torch.mm(x, projection)
                    torch.bmm(query, keys)
                    torch.bmm(weights, values)
                    torch.bmm(to_memory, memory_keys)
                    torch.bmm(memory_weights, memory_values)
                    torch.mm(x, feed_forward_in)
                    torch.mm(hidden, feed_forward_out)
                torch.mm(x, output)

        return compute

    def ctc_steps(self, frames: int) -> Callable[[], None]:
        """The CTC prefix scores of all timed steps of one utterance of T frames.

        Each step scores the candidates, then takes the recursion for what is kept.
        """
        memory, lengths = self.memory(frames)[None], torch.tensor([frames])
        state = self.ctc_scorer.init(memory, lengths, self.beam_size)
        rows = torch.arange(self.beam_size, device=self.device)
        candidates = self.beam_search.pre_beam_size
        chosen = torch.randint(1, self.eos, (self.beam_size, candidates), device=self.device)
        chosen = torch.nn.functional.pad(chosen, (0, 1), value=self.eos)
        last = torch.full_like(rows, self.eos)

        def compute() -> None:
            tokens, current = last, state
            for step in range(LAST - FIRST + 1):
                scores, current = self.ctc_scorer.score_partial(tokens, chosen, current)
                column = step % candidates
                tokens = chosen[:, column]
                current = self.ctc_scorer.reorder_partial(current, rows, tokens, scores[:, column])

        return compute

    def decoder_step(self, frames: int) -> Callable[[], Tensor]:
        """A cached step of the decoder alone, (K, V), in the middle of the timed ones."""
        memory, lengths = self.memory(frames)[None], torch.tensor([frames])
        state = self.decoder.init(memory, lengths, self.beam_size)
        tokens = torch.randint(1, self.eos, (self.beam_size,), device=self.device)
        for _ in range(MIDDLE - 1):
            _, state = self.decoder.score(tokens, state)
        return lambda: self.decoder.score(tokens, state)[0]

    def reference(self, frames: int) -> tuple[Callable[[], object], str]:
        """What the timed steps of one utterance of T frames cannot do without, and its name."""
        if not self.on_gpu:
            lengths = range(FIRST, LAST + 1)
            return self.products(self.beam_size, frames, lengths), "bare products"
        replay = graph_of(self.decoder_step(frames))
        return lambda: [replay() for _ in range(FIRST, LAST + 1)], "its decoder in a CUDA graph"

    def token_bytes(self) -> int:
        """Keys and values of one token of every hypothesis of an utterance."""
        return self.beam_size * self.size.blocks * 2 * self.size.dim * torch.float32.itemsize


def _block_weights(block: torch.nn.Module) -> list[Tensor]:
    """Weights that a step multiplies by: the memory's keys and values are there already."""
    own, source, feed_forward = block.self_attn, block.src_attn, block.feed_forward
    layers = [own.linear_q, own.linear_k, own.linear_v, own.linear_out]
    layers += [source.linear_q, source.linear_out, feed_forward.w_1, feed_forward.w_2]
    return [layer.weight for layer in layers]


def graph_of(function: Callable[[], Tensor]) -> Callable[[], None]:
    """Captures what a function starts on the GPU; it is called once."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def measure_step(benchmark: SearchBenchmark, frames: int, work: SearchWork) -> Iterator[Row]:
    """Times a step of the search of one utterance of T frames, and its CTC prefix scores."""
    memory, steps = benchmark.memory(frames), LAST - FIRST + 1
    reference, name = benchmark.reference(frames)
    alternatives = [
        partial(benchmark.search, memory, FIRST - 1),
        partial(benchmark.search, memory, LAST),
        reference,
        benchmark.ctc_steps(frames),
    ]
    timings = time_in_turns(alternatives, benchmark.device, work.step_repeats)
    first, last, bare, ctc = (timing.milliseconds / steps for timing in timings)
    title, unit = f"{frames} frames, beam {benchmark.beam_size}", "ms"
    step = last - first
    yield Row(f"A step, {title} (reference: {name})", step, bare, work.step_target, unit)
    what = f"Its CTC prefix scores, {title} (reference: the step)"
    yield Row(what, ctc, step, CTC_TARGET, unit)


def measure_batch(benchmark: SearchBenchmark, work: SearchWork) -> Row:
    """Times the search of several utterances at once and one by one, in ms per utterance."""
    memories = [benchmark.memory(frames, seed) for seed, frames in enumerate(work.batch_frames)]
    count, tokens = len(memories), work.batch_tokens
    timings = time_in_turns(
        [
            lambda: benchmark.search_batch(memories, tokens),
            lambda: [benchmark.search(memory, tokens) for memory in memories],
        ],
        benchmark.device,
        work.batch_repeats,
    )
    together, alone = (timing.milliseconds / count for timing in timings)
    best_together, best_alone = (
        [nbest[0].yseq.tolist() for nbest in timing.result] for timing in timings
    )
    same = sum(one == other for one, other in zip(best_together, best_alone, strict=True))
    products = [
        benchmark.products(benchmark.beam_size * rows, max(work.batch_frames), [tokens])
        for rows in (count, 1)
    ]
    repeats = 3 * work.batch_repeats
    timings = time_in_turns(products, benchmark.device, repeats)
    at_once, bare = (timing.milliseconds for timing in timings)
    shortest, longest = (edge(work.batch_frames) / VIDEO_RATE for edge in (min, max))
    return Row(
        f"{count} utterances of {shortest:.1f} to {longest:.1f} s at once, {tokens} tokens each, "
        "an utterance (reference: one by one)",
        together,
        alone,
        work.batch_target,
        "ms",
        faster=True,
        notes=[
            f"at once and one by one, the best hypotheses of {same} of {count} utterances have the "
            f"same tokens; every hypothesis has {tokens}",
            f"the bare products of a step are {count * bare / at_once:.2f} times faster for "
            f"{count} utterances at once: the most to be gained where little else takes time",
        ],
    )


def measure_memory(benchmark: SearchBenchmark, work: SearchWork) -> Iterator[Row]:
    """Measures the memory of batches of as many padded frames, decoded to one token a frame."""
    for utterances, frames in work.memory_shapes:
        memories = [benchmark.memory(frames, seed) for seed in range(utterances)]
        peak = peak_of(partial(benchmark.search_batch, memories, frames), benchmark.device)
        yield Row(
            f"Memory of {utterances} utterances of {frames} frames (reference: keys and values)",
            peak / 1e6,
            utterances * frames * benchmark.token_bytes() / 1e6,
            unit="MB",
            notes=[
                f"with --decode-max-frames {MAX_FRAMES}, a search of {utterances} utterances of "
                f"{MAX_FRAMES // utterances} frames would take "
                f"{MAX_FRAMES / (utterances * frames) * peak / 1e9:.1f} GB at most: memory grows "
                "with the frames of a batch, padding included"
            ],
        )


def measure(size: Size, beam_size: int, work: SearchWork, device: torch.device) -> Iterator[Row]:
    """Measures the search with K hypotheses."""
    benchmark = SearchBenchmark(size, beam_size, device)
    benchmark.search(benchmark.memory(10), 2)  # Libraries take memory on their first use.
    # Memory first: the less is kept from before, the more exact it is.
    memory = list(measure_memory(benchmark, work))
    for frames in work.step_frames:
        yield from measure_step(benchmark, frames, work)
    yield measure_batch(benchmark, work)
    yield from memory
