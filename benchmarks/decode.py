"""Compares a step of the beam search with its bare matrix products, or with transformers' step.

`python benchmarks/decode.py [--decoder transformer|llama|whisper]`, in the repository's root,
prints a table of ratios, each measured in one process; two minutes on two CPU cores. If these have
other work too, set OMP_NUM_THREADS=1: waiting for a second thread would drown what is measured.

The Transformer decoder is measured as `benchmarks/search_step.py` tells, a pretrained one beside
transformers' `generate`. Its checkpoint has random weights in the shape of openai/whisper-small, or
of meta-llama/Llama-3.2-1B (on a CPU, 4 of its 16 layers). Both searches are for one utterance, with
the same beam and as many steps: this project's may not end before, and `generate` knows no end
symbol; the decoder is the only scorer. A step is what a longer search takes more than one of a
single step, divided by the steps that it is longer, so what precedes the text does not count.

What `generate` is given:
- Whisper: the memory in place of the encoder's output, and the prompt.
- LLaMA with `--llama-conditioning prefix`: the embeddings of BOS, memory and prompt.
- LLaMA with `cross-attention`: BOS alone. A first row is for the language model as it is: the
  gated blocks, which are this project's own, count against the search. They have a twelfth as
  many weights as the model with 4 layers, and a seventh with 16, which bounds that ratio from
  below. A second row is for `generate` with these blocks before the layers.
"""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn
from transformers import (
    GenerationMixin,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    WhisperForConditionalGeneration,
)
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import logging as transformers_logging

from benchmarks import checkpoints, search_step
from benchmarks.checkpoints import LLAMA_LAYERS, Checkpoint
from benchmarks.common import Row, device_parser, parse, print_report, time_in_turns
from benchmarks.noise import noise
from espnet.nets.batch_beam_search import BatchBeamSearch
from espnet.nets.decoders import LLAMA_CONDITIONINGS
from espnet.nets.pytorch_backend.decoder.llama_decoder import LLaMADecoder
from espnet.nets.pytorch_backend.decoder.whisper_decoder import WhisperDecoder

TARGET = 1.1
FRAMES = 200  # 8 s
OPEN = 0.5  # value of the gates where `generate` has the gated blocks too

Decoder = LLaMADecoder | WhisperDecoder
Search = Callable[[int, int], Tensor]
"""From beam size and number of steps to the tokenizer's ids of the best hypothesis, (U,)."""


@dataclass(frozen=True)
class Work:
    """How much is computed."""

    steps: int  # steps that a search takes after its first one
    llama_layers: int  # layers of LLaMA
    repeats: int  # rounds of timing


WORK = {
    "cpu": Work(steps=12, llama_layers=4, repeats=6),
    "cuda": Work(steps=100, llama_layers=LLAMA_LAYERS, repeats=5),
}


def load(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, **options: Any
) -> tuple[Decoder, PreTrainedModel]:
    """Makes a checkpoint in a folder and loads it from there, in a precision.

    Further options are those of the decoder's constructor.

    Returns:
        The decoder, frozen, and the model of transformers, both in eval mode.
    """
    if isinstance(checkpoint.config, LlamaConfig):
        model_class, decoder_class = LlamaForCausalLM, LLaMADecoder
    else:
        model_class, decoder_class = WhisperForConditionalGeneration, WhisperDecoder
    with checkpoints.saved(model_class(checkpoint.config)) as folder:
        decoder = decoder_class(
            folder,
            memory_dim=checkpoint.memory_dim,
            prompt=checkpoint.prompt,
            eos=checkpoint.eos + decoder_class.first_token,
            dtype=dtype,
            **options,
        )
        model = model_class.from_pretrained(folder, dtype=dtype)
    return decoder.to(device).eval(), model.to(device).eval()


def search(
    decoder: Decoder, checkpoint: Checkpoint, memory: Tensor, beam_size: int, steps: int
) -> Tensor:
    """Searches with this project's beam search, where the decoder is the only scorer.

    The memory is an encoder's output, (1, T, M).

    Returns:
        The tokenizer's ids of the best hypothesis, (steps,).
    """
    beam_search = BatchBeamSearch(
        beam_size=beam_size,
        vocab_size=decoder.odim,
        weights={"decoder": 1.0},
        scorers={"decoder": decoder},
        sos=checkpoint.prompt[-1] + decoder.first_token,
        eos=checkpoint.eos + decoder.first_token,
        pre_beam_score_key="decoder",
        max_tokens=decoder.max_tokens,
    )
    best = beam_search(memory[0], maxlenratio=-steps, minlenratio=-steps)[0]
    return best.yseq[1:-1] - decoder.first_token


def generate(
    model: PreTrainedModel, make_inputs: Callable[[], dict[str, Any]], beam_size: int, steps: int
) -> Tensor:
    """Searches with transformers, as `search` does: ids of the best hypothesis, (steps,).

    Whisper's own loop over windows of 30 s is left out. What `make_inputs` makes, it changes.
    """
    tokens = GenerationMixin.generate(
        model,
        **make_inputs(),
        num_beams=beam_size,
        do_sample=False,
        max_new_tokens=steps,
        eos_token_id=model.config.vocab_size,  # There is none, and so nothing to forbid.
        pad_token_id=model.config.eos_token_id,
    )
    return tokens[0, -steps:].cpu()


def generate_inputs(
    decoder: Decoder, model: PreTrainedModel, prompt: tuple[int, ...], memory: Tensor
) -> dict[str, Any]:
    """What `generate` is given to do what the search does, by name.

    The project's decoder makes LLaMA's prefix of the memory (1, T, M); ids of the prompt precede
    a text.
    """
    tokens = torch.tensor([prompt], device=memory.device)
    if isinstance(decoder, WhisperDecoder):
        encoder_outputs = BaseModelOutput(last_hidden_state=memory.to(model.dtype))
        mask = torch.ones_like(memory[..., 0], dtype=torch.int64)
        return {
            "encoder_outputs": encoder_outputs,
            "attention_mask": mask,
            "decoder_input_ids": tokens,
        }
    if decoder.memory_prefix is None:
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    lengths = torch.tensor([memory.size(1)])
    prefix, _ = decoder.memory_prefix(memory, lengths)
    embedded = model.get_input_embeddings()(tokens)
    parts = [embedded[:, :1], prefix.to(embedded.dtype), embedded[:, 1:]]
    embedded = torch.cat(parts, dim=1)  # (1, 1 + M + P - 1, D)
    mask = torch.ones_like(embedded[..., 0], dtype=torch.int64)
    return {"inputs_embeds": embedded, "attention_mask": mask}


@contextmanager
def blocks_between_layers(
    model: LlamaForCausalLM, decoder: LLaMADecoder, memory: Tensor
) -> Iterator[None]:
    """Puts the decoder's gated blocks on memory (1, T, M) before the model's layers."""

    def attend(
        block: nn.Module, keys_values: tuple[Tensor, Tensor], _: nn.Module, inputs: tuple
    ) -> tuple:
        hidden = inputs[0]
        return block.attend(hidden, *keys_values, None, len(hidden)), *inputs[1:]

    layers = model.model.layers[:: decoder.cross_every]
    hooks = [
        layer.register_forward_pre_hook(partial(attend, block, block.project_memory(memory)))
        for layer, block in zip(layers, decoder.cross_attention, strict=True)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def compare(
    title: str,
    reference: str,
    searches: tuple[Search, Search],
    beam_size: int,
    work: Work,
    device: torch.device,
) -> Row:
    """Times a step of the project's search and of its reference, and compares what they find."""
    lengths = (1, 1 + work.steps)
    calls = [partial(one, beam_size, steps) for steps in lengths for one in searches]
    timings = time_in_turns(calls, device, work.repeats)
    first, reference_first, last, reference_last = (timing.milliseconds for timing in timings)
    found, expected = (timing.result for timing in timings[2:])
    greedy, expected_greedy = (one(1, 1 + work.steps) for one in searches)
    return Row(
        f"{title}, beam {beam_size} (reference: {reference})",
        (last - first) / work.steps,
        (reference_last - reference_first) / work.steps,
        target=TARGET,
        notes=[
            f"{reference}: {agreement(greedy, expected_greedy)} with beam 1, "
            f"{agreement(found, expected)} with beam {beam_size}",
            f"{reference}: what precedes the text and the first step take {first:.0f} ms, there "
            f"{reference_first:.0f} ms",
        ],
    )


def agreement(found: Tensor, expected: Tensor) -> str:
    """Tells how many tokens (U,) of two hypotheses are the same from the first on."""
    same = int((found == expected).int().cumprod(0).sum())
    which = f"all {same}" if same == len(expected) else f"only the first {same} of {len(expected)}"
    return f"{which} tokens ({len(expected.unique())} different ones) are the same"


def measure(
    checkpoint: Checkpoint,
    work: Work,
    device: torch.device,
    *,
    beam_size: int,
    dtype: torch.dtype,
    **options: Any,
) -> Iterator[Row]:
    """Measures a pretrained decoder; further options are those of its constructor."""
    decoder, model = load(checkpoint, device, dtype, **options)
    memory = noise(1, FRAMES, checkpoint.memory_dim, device=device)
    make_inputs = partial(generate_inputs, decoder, model, checkpoint.prompt, memory)
    searches = (partial(search, decoder, checkpoint, memory), partial(generate, model, make_inputs))
    title = f"{checkpoint.title}, {FRAMES} frames"
    blocks = getattr(decoder, "cross_attention", ())
    reference = "`generate` without gated blocks" if blocks else "`generate`"
    yield compare(title, reference, searches, beam_size, work, device)
    if not blocks:
        return
    for block in blocks:
        nn.init.constant_(block.gate, OPEN)
        nn.init.constant_(block.feed_forward_gate, OPEN)
    with blocks_between_layers(model, decoder, memory):
        reference = "`generate` with gated blocks"
        yield compare(title, reference, searches, beam_size, work, device)


def build_parser() -> ArgumentParser:
    """Builds the command line's parser."""
    parser = device_parser("Compare a step of the beam search with what it needs.")
    parser.add_argument(
        "--decoder",
        choices=["transformer", "llama", "whisper"],
        default="transformer",
        help="what to time (default: %(default)s)",
    )
    parser.add_argument(
        "--llama-conditioning",
        choices=LLAMA_CONDITIONINGS,
        default="cross-attention",
        help="how LLaMA gets the memory (default: %(default)s)",
    )
    parser.add_argument(
        "--beam-size",
        type=int,
        help="hypotheses (default: 40 for the Transformer decoder, 5 for a pretrained one)",
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        default="float32",
        help="precision of a checkpoint's weights (default: %(default)s)",
    )
    parser.add_argument(
        "--llama-layers",
        type=int,
        help=f"layers of LLaMA (default: {WORK['cpu'].llama_layers} on a CPU, all "
        f"{LLAMA_LAYERS} on a GPU)",
    )
    return parser


@torch.no_grad()
def rows_of(options: Namespace, device: torch.device) -> Iterator[Row]:
    """Measures the decoder that the command line names."""
    if options.decoder == "transformer":
        size, work = search_step.Size(), search_step.WORK[device.type]
        yield from search_step.measure(size, options.beam_size or 40, work, device)
        return
    torch.manual_seed(0)
    work, more = WORK[device.type], {}
    checkpoint = checkpoints.whisper()
    if options.decoder == "llama":
        layers = options.llama_layers or work.llama_layers
        checkpoint = checkpoints.llama(options.llama_conditioning, layers)
        more = {"conditioning": options.llama_conditioning}
    beam_size, dtype = options.beam_size or 5, getattr(torch, options.dtype)
    yield from measure(checkpoint, work, device, beam_size=beam_size, dtype=dtype, **more)


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = build_parser()
    options, device = parse(parser, argv)
    own = options.decoder == "transformer"
    if own and options.dtype != "float32":
        parser.error(f"--dtype {options.dtype} is for a checkpoint: name its --decoder too")
    transformers_logging.disable_progress_bar()
    columns = ("measured", "reference") if own else ("step (ms)", "reference (ms)")
    rows, packages = rows_of(options, device), ["transformers"]
    print_report(device, rows, columns, packages, options.dtype)


if __name__ == "__main__":
    main()
