"""Measures what QLoRA saves: bytes of weights, and the peak memory of training steps.

`python benchmarks/qlora_memory.py [--device cpu|cuda]`, in the repository's root, prints two
tables; three minutes on two CPU cores. If these have other work too, set OMP_NUM_THREADS=1.
All weights are random, in the shapes of published checkpoints.

The first table is for the parts that can be in 4 bits. All of a part is in bfloat16 before
`quantize_4bit`, and what that leaves alone is so afterwards. The ratio with a target is that of
the linear layers but the output layer: one that stayed in bfloat16 would count against it.

The second table is for whole recognisers. They load checkpoints from a temporary folder, LLaMA's
in bfloat16, and take two steps on noise of different lengths, padded: forward, backward and AdamW,
which has its moments in the second step. Each way of training has a process of its own. On a CPU,
its memory is what Linux counts as resident, mapped files of weights included, and training is in
float32; on a GPU, it is that of PyTorch's tensors, and training is in bfloat16 by autocast. LLaMA
gets the memory as a prefix: the gated blocks of cross-attention would be 1.4 billion further
trained parameters for 8B.

On a CPU, LLaMA has 4 of the 16 layers of Llama-3.2-1B. On a GPU, it has all, and the shape of
Llama-3.1-8B follows, which takes 17 GB in the temporary folder (TMPDIR) and in the host's memory.
There, video goes through CLIP 32 frames at a time, not 128: the activations of such a chunk, which
its backward pass computes again, would take most of what training takes beside the weights.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, WhisperForCausalLM
from transformers.utils import logging as transformers_logging

from benchmarks import checkpoints, common, memory
from benchmarks.checkpoints import ENCODER_CLASSES, TITLES
from benchmarks.noise import make_batch, make_utterances
from espnet.formats import MODALITIES, VIDEO_RATE
from espnet.nets.encoders import VISION_ENCODERS
from espnet.nets.pytorch_backend.e2e_asr_conformer import E2E
from espnet.nets.pytorch_backend.encoder.conformer_encoder import ConformerEncoder
from espnet.nets.pytorch_backend.qlora_utils import (
    OUTPUT_LAYERS,
    parameter_report,
    quantize_4bit,
    trainable_parameters,
)

WEIGHT_TARGET = 0.3  # of the bytes in bfloat16
GPU_TARGET = 12e9  # bytes
STEPS = 2  # the moments are there in the second one
TOKEN_RATE = 4  # tokens a second of speech
HEAD_OF_WEIGHTS = (
    *("part", "linear layers in 4 bits (MB)", "in bfloat16 (MB)", "ratio", "target"),
    *("whole part (MB)", "ratio", "left alone (MB)"),
)
HEAD_OF_STEPS = (
    *("what", "trained", "trained parameters", "weights (GB)", "before (GB)"),
    *("peak of loading (GB)", "peak of the steps (GB)", "target"),
)
FRAMES = {  # of the utterances of a batch
    "cpu": (100, 92, 60, 48),
    "cuda": (200, 180, 160, 140, 110, 90, 70, 50),
}


@dataclass(frozen=True)
class WeightRow(common.TableRow):
    """A part's bytes in 4 bits and in bfloat16."""

    part: str  # its name
    linear: int  # bytes of its linear layers but the output layer, in 4 bits
    linear_bfloat16: int  # the same in bfloat16
    whole: int  # bytes of all of it, after its linear layers went into 4 bits
    whole_bfloat16: int  # the same in bfloat16
    left_alone: dict[str, int]  # bytes of what is not in 4 bits, by kind

    @property
    def ratio(self) -> float:
        """The ratio that the target is for."""
        return self.linear / self.linear_bfloat16

    def cells(self) -> list[str]:
        """What its columns hold."""
        return [
            self.part,
            _megabytes(self.linear),
            _megabytes(self.linear_bfloat16),
            f"{self.ratio:.3f}",
            f"at most {WEIGHT_TARGET:.2f}: {common.verdict(self.ratio <= WEIGHT_TARGET)}",
            f"{_megabytes(self.whole)} of {_megabytes(self.whole_bfloat16)}",
            f"{self.whole / self.whole_bfloat16:.3f}",
            ", ".join(f"{kind} {_megabytes(size)}" for kind, size in self.left_alone.items()),
        ]


def measure_weights(part: str, module: nn.Module) -> WeightRow:
    """Puts a part into 4 bits, which was in bfloat16, and counts its bytes before and after."""
    names = [
        name
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and name.rpartition(".")[2] not in OUTPUT_LAYERS
    ]

    def count() -> tuple[int, int]:
        layers = nn.ModuleList(module.get_submodule(name) for name in names)
        return parameter_report(layers).bytes, parameter_report(module).bytes

    linear_bfloat16, whole_bfloat16 = count()
    quantize_4bit(module)
    linear, whole = count()
    return WeightRow(part, linear, linear_bfloat16, whole, whole_bfloat16, left_alone(module))


def left_alone(module: nn.Module) -> dict[str, int]:
    """Bytes of what a quantised module has in another precision, by kind, the largest first.

    Biases of layers whose weight is in 4 bits are left out: they count with the weight.
    """
    sizes: Counter[str] = Counter()
    seen: set[int] = set()
    for name, layer in module.named_modules():
        own = list(layer.parameters(recurse=False))
        if any(getattr(parameter, "quant_state", None) is not None for parameter in own):
            continue
        # A weight that is normalised has a module of its own, in the layer that it is for.
        name = name.partition(".parametrizations.")[0]
        kind = _kind(module.get_submodule(name), name)
        for parameter in own:
            sizes[kind] += 0 if id(parameter) in seen else parameter.nbytes
            seen.add(id(parameter))
    return {kind: size for kind, size in sizes.most_common() if size}


def _kind(layer: nn.Module, name: str) -> str:
    if isinstance(layer, nn.Linear):
        return "output layer" if name.rpartition(".")[2] in OUTPUT_LAYERS else "linear layers"
    if "Norm" in type(layer).__name__:
        return "norms"
    kinds = {"embeddings": nn.Embedding, "convolutions": (nn.Conv1d, nn.Conv2d)}
    return next((kind for kind, classes in kinds.items() if isinstance(layer, classes)), "others")


def published_parts() -> dict[str, Callable[[], nn.Module]]:
    """What builds the parts that can be in 4 bits, with random weights, by their names."""

    def encoder(name: str) -> nn.Module:
        with checkpoints.encoder_checkpoint(name) as folder:
            return ENCODER_CLASSES[name](folder).backbone

    titles = {**TITLES, "whisper": f"{TITLES['whisper']}, encoder"}
    return {title: partial(encoder, name) for name, title in titles.items()} | {
        "Whisper small, decoder": partial(WhisperForCausalLM, checkpoints.whisper().config),
        "Llama-3.2-1B": partial(random_llama, checkpoints.llama("prefix").config),
        "Conformer, 12 blocks": partial(
            ConformerEncoder,
            attention_dim=768,
            attention_heads=12,
            linear_units=3072,
            num_blocks=12,
            cnn_module_kernel=31,
            dropout_rate=0.1,
        ),
    }


def random_llama(config: LlamaConfig) -> PreTrainedModel:
    """Builds a LLaMA in bfloat16, to be counted or saved: what is not saved is not set."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.to_empty(device="cpu")
    model.tie_weights()
    with torch.no_grad():
        for weight in model.parameters():
            is_norm = weight.dim() == 1
            # Six times faster than in bfloat16, and less memory than all weights in float32.
            weight.copy_(1.0 if is_norm else torch.randn(weight.shape) * config.initializer_range)
    return model


@dataclass(frozen=True)
class Case:
    """A recogniser that is trained in several ways."""

    title: str  # what it is
    encoders: tuple[str, ...]  # names of the pretrained encoders
    llama: checkpoints.Checkpoint  # the decoder's checkpoint
    # Options of `E2E` by the name of the way of training that they make, or why it is left out.
    ways: Mapping[str, Mapping[str, Any] | str]
    target: float | None = None  # most bytes of QLoRA's peak; None for no target


@dataclass(frozen=True)
class StepMemory:
    """What training took, in bytes."""

    trained: int  # number of trained parameters
    total: int  # number of all parameters, frozen ones too
    weights: int  # bytes of all parameters
    before: int  # what the process had before the model was built
    loading: int  # peak while the model was built and moved to the device
    steps: int  # peak of the steps


@dataclass(frozen=True)
class StepRow(common.TableRow):
    """A row of the second table."""

    case: str  # the recogniser
    way: str  # name of the way of training
    memory: StepMemory | str  # what it took, or why that is not known
    target: float | None = None  # most bytes of the peak; None for no target

    def cells(self) -> list[str]:
        """What its columns hold."""
        cells, memory = [self.case, self.way], self.memory
        if isinstance(memory, str):
            return [*cells, *([""] * 5), memory]
        cells.append(f"{memory.trained:,} of {memory.total:,}")
        for size in (memory.weights, memory.before, memory.loading, memory.steps):
            cells.append(_gigabytes(size))
        if self.target is None:
            return [*cells, ""]
        reached = max(memory.loading, memory.steps) < self.target
        return [*cells, f"under {self.target / 1e9:g} GB: {common.verdict(reached)}"]


NO_CONFORMER = {"elayers": 0}
# A parameter takes 16 bytes: itself, its gradient and two moments in float32.
FULL_8B = "not run: the parameters, gradients and moments of 8 billion alone take 128 GB"
SMALL_CHUNKS = {"vision_chunk_frames": 32}
LORA = {**NO_CONFORMER, "use_lora": True}
QLORA = {**NO_CONFORMER, "use_qlora": True}


def full(*parts: str) -> dict[str, Any]:
    """Options that train all of some parts, of `vision_encoder`, `audio_encoder`, `decoder`."""
    return NO_CONFORMER | {f"freeze_{part}": False for part in parts}


def cases(device: str) -> dict[str, Case]:
    """The recognisers that are trained on `cpu` or `cuda`, by the size of their LLaMA."""
    if device == "cpu":
        title = "Whisper small, Llama-3.2-1B with 4 of 16 layers"
        ways = {"full": full("audio_encoder", "decoder"), "LoRA": LORA, "QLoRA": QLORA}
        return {"1b": Case(title, ("whisper",), checkpoints.llama("prefix", 4), ways)}
    parts = ("vision_encoder", "audio_encoder", "decoder")
    return {
        "1b": Case(
            "CLIP ViT-B/16, Whisper small, Llama-3.2-1B",
            ("clip", "whisper"),
            checkpoints.llama("prefix"),
            {"full": full(*parts), "LoRA": LORA, "QLoRA": QLORA},
        ),
        "8b": Case(
            "CLIP ViT-B/16 in chunks of 32 frames, Whisper small, Llama-3.1-8B",
            ("clip", "whisper"),
            checkpoints.llama_8b(),
            {
                "full": FULL_8B,
                "LoRA": {**LORA, **SMALL_CHUNKS},
                "QLoRA": {**QLORA, **SMALL_CHUNKS},
                "QLoRA, and a Conformer of 12 blocks": {"use_qlora": True, **SMALL_CHUNKS},
            },
            target=GPU_TARGET,
        ),
    }


@contextmanager
def saved_case(case: Case) -> Iterator[dict[str, Any]]:
    """Writes the checkpoints of a recogniser, and removes them at the end.

    Yields:
        Options of `E2E` that are the same in each way of training.
    """
    llama = case.llama
    options = {
        "odim": llama.config.vocab_size + 1,
        "modality": "audiovisual" if len(case.encoders) > 1 else "audio",
        "prompt": llama.prompt,
        "sos": llama.prompt[-1] + 1,
        "eos": llama.eos + 1,
        "decoder": "llama",
        "llama_conditioning": "prefix",
    }
    with ExitStack() as stack:
        for name in case.encoders:
            part = "vision_encoder" if name in VISION_ENCODERS else "audio_encoder"
            options[part] = name
            options[f"{part}_name"] = stack.enter_context(checkpoints.encoder_checkpoint(name))
        options["decoder_name"] = stack.enter_context(checkpoints.saved(random_llama(llama.config)))
        yield options


def measure_case(case: Case, frames: tuple[int, ...], device: torch.device) -> Iterator[StepRow]:
    """Trains a recogniser in several ways, each in a process of its own."""
    with saved_case(case) as options:
        for way, more in case.ways.items():
            if isinstance(more, str):
                yield StepRow(case.title, way, more)
                continue
            try:
                took = common.run_apart(measure_training, {**options, **more}, frames, device)
            except BrokenProcessPool:
                took = "ended without a result, as a process that takes more memory than there is"
            yield StepRow(case.title, way, took, case.target if "use_qlora" in more else None)


def measure_training(
    options: dict[str, Any], frames: tuple[int, ...], device: torch.device
) -> StepMemory | str:
    """Builds a recogniser with options of `E2E` and trains it; for a process of its own.

    Returns:
        What it took, or how it ran out of a GPU's memory.
    """
    transformers_logging.disable_progress_bar()
    torch.manual_seed(0)
    batch = batch_of(options, frames, device)
    before = memory.in_use(device)
    try:
        model = E2E.from_keywords(**options).to(device)
        loading = memory.peak(device)
        memory.forget_peak(device)
        train(model, batch, device)
    except torch.cuda.OutOfMemoryError as error:
        return f"out of memory: {str(error).splitlines()[0]}"
    report = parameter_report(model)
    return StepMemory(
        trained=report.trainable,
        total=report.total,
        weights=report.bytes,
        before=before,
        loading=loading,
        steps=memory.peak(device),
    )


def batch_of(
    options: dict[str, Any], frames: tuple[int, ...], device: torch.device
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Makes a batch of the streams and the vocabulary that a model with these options has."""
    tokens = [number * TOKEN_RATE // VIDEO_RATE for number in frames]
    # Special tokens follow the others.
    utterances = make_utterances(frames, tokens, vocabulary=options["eos"] - 1)
    streams = MODALITIES[options["modality"]]
    return make_batch(utterances, device, streams)


def train(
    model: E2E, batch: tuple[dict[str, Tensor], dict[str, Tensor], Tensor], device: torch.device
) -> None:
    """Takes steps on a batch, with AdamW for all trainable parameters.

    Raises:
        RuntimeError: If the loss is not finite.
    """
    on_gpu = device.type == "cuda"
    # As in training: with autocast, gradients of a fused step could not be clipped.
    optimizer = torch.optim.AdamW(trainable_parameters(model), fused=not on_gpu)
    for _ in range(STEPS):
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=on_gpu):
            loss, *_ = model(*batch)
        if not loss.isfinite():
            raise RuntimeError(f"the loss is {loss.item()}: such a step would show nothing")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def _megabytes(size: float) -> str:
    return f"{size / 1e6:,.1f}"


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:,.2f}"


def measure_parts(device: torch.device) -> Iterator[WeightRow]:
    """Measures the parts that can be in 4 bits one after the other."""
    for part, build in published_parts().items():
        yield measure_weights(part, build().to(device, torch.bfloat16))


def measure_steps(device: torch.device, llama: str | None) -> Iterator[StepRow]:
    """Trains the recognisers, all or those with one LLaMA."""
    for size, case in cases(device.type).items():
        if llama in (None, size):
            yield from measure_case(case, FRAMES[device.type], device)


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = common.device_parser("Measure the memory that QLoRA takes and saves.")
    parser.add_argument(
        "--table", choices=["weights", "steps"], help="print this table only (default: both)"
    )
    parser.add_argument(
        "--llama",
        choices=["1b", "8b"],
        help="train recognisers with this LLaMA only (default: 1b on a CPU, both on a GPU)",
    )
    options, device = common.parse(parser, argv)
    status = memory.PROCESS / "status"
    if options.device == "cpu" and options.table != "weights" and not status.exists():
        parser.error(f"{status} is missing, where Linux tells the peak: choose --table weights")
    if options.llama and options.llama not in cases(options.device):
        parser.error(f"--llama {options.llama} needs --device cuda")
    transformers_logging.disable_progress_bar()
    common.print_facts(device, "transformers", "bitsandbytes", "peft")
    if options.table != "steps":
        common.print_table(HEAD_OF_WEIGHTS, measure_parts(device))
    if options.table is None:
        print()
    if options.table != "weights":
        frames = FRAMES[options.device]
        print(
            f"{len(frames)} utterances, {sum(frames)} video frames, "
            f"{sum(frames) / VIDEO_RATE:g} s of audio; without padding; no Conformer unless "
            f"it is named; {STEPS} steps\n"
        )
        common.print_table(HEAD_OF_STEPS, measure_steps(device, options.llama))


if __name__ == "__main__":
    main()
