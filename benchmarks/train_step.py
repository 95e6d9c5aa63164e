"""Measures a training step on a ragged batch beside the same utterances without padding.

`python benchmarks/train_step.py`, in the repository's root, prints a table; some minutes on two
CPU cores. The model is the audio-visual one of auto_avsr's sizes, with random weights, in training
mode; on a CPU it has 4 of the 12 Conformer blocks. A step is the loss and its gradients, without
the optimiser. The 8 utterances have 40 to 160 frames; of the padded batch, 37.5 % is padding.

A first reference takes the utterances one by one, never padded, through the same model: the ratio
is what a batch saves. But weights are read and gradients added for each of them, and small products
leave a GPU idle, so that this ratio does not tell what padding costs. A second reference does: the
same frames, samples and tokens as a batch of eight equal utterances, which is the cheapest of all
such batches, since attention's work grows with the square of the length. The ResNet of the video is
also timed alone, beside the same frames as one utterance.

On CUDA, further rows are for bfloat16 and torch.compile (on a CPU: `--compile`) beside the step in
float32 as it is.
"""

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import Row, device_parser, parse, print_report, time_in_turns
from benchmarks.noise import CROP, Utterance, make_batch, make_utterances
from espnet.formats import STREAMS
from espnet.nets.pytorch_backend.e2e_asr_conformer import E2E

TARGET = 1.15
FRAMES_PER_TOKEN = 4
MATRIX_WORK = re.compile(
    r"gemm|gemv|cutlass|xmma|conv|winograd|wgrad|dgrad|fprop|fmha|flash|nvjet"  # kernels
    r"|^aten::(mm|addmm|bmm|baddbmm|.*scaled_dot_product.*attention.*)$",  # on a CPU
    re.IGNORECASE,
)
NO_MATRIX_WORK = re.compile(r"convert|to_?copy", re.IGNORECASE)
Step = Callable[[], Tensor]
"""Computes the gradients of a loss, and returns the loss."""


@dataclass(frozen=True)
class Work:
    """How much is computed."""

    elayers: int  # Conformer blocks
    repeats: int  # rounds of timing
    frames: tuple[int, ...] = (160, 143, 126, 109, 91, 74, 57, 40)  # video frames of each utterance
    crop: int = CROP  # height and width of the video
    odim: int = 5049  # vocabulary
    # Further sizes of the model; those that are not given are auto_avsr's.
    sizes: dict[str, int | float] = field(default_factory=dict)

    @property
    def tokens(self) -> list[int]:
        """Tokens of each utterance."""
        return [max(1, frames // FRAMES_PER_TOKEN) for frames in self.frames]

    def __str__(self) -> str:
        return f"{len(self.frames)} utterances, {sum(self.frames)} frames in all"


WORK = {"cpu": Work(elayers=4, repeats=3), "cuda": Work(elayers=12, repeats=10)}


def build_model(work: Work, device: torch.device) -> E2E:
    """Builds the recogniser with random weights, in training mode."""
    torch.manual_seed(0)
    model = E2E.from_keywords(work.odim, "audiovisual", elayers=work.elayers, **work.sizes)
    return model.to(device)


def utterances_of(work: Work) -> list[Utterance]:
    """Makes utterances of different lengths."""
    return make_utterances(work.frames, work.tokens, work.odim - 1, work.crop)


def equal_utterances(utterances: Sequence[Utterance]) -> list[Utterance]:
    """Lays utterances end to end and cuts them into as many of their mean length."""
    number = len(utterances)
    videos, audios = (
        torch.cat([getattr(one, stream) for one in utterances]).unflatten(0, (number, -1))
        for stream in STREAMS
    )
    targets = torch.cat([one.target for one in utterances]).tensor_split(number)
    return [Utterance(*parts) for parts in zip(videos, audios, targets, strict=True)]


def step_on(model: nn.Module, batches: Sequence[Sequence[Utterance]], device: torch.device) -> Step:
    """Makes a step on equally large batches one after the other, whose loss is their mean."""
    inputs = [make_batch(utterances, device) for utterances in batches]

    def step() -> Tensor:
        model.zero_grad(set_to_none=True)
        total = torch.zeros((), device=device)
        for batch in inputs:
            loss = model(*batch)[0] / len(inputs)
            loss.backward()
            total += loss.detach()
        return total

    return step


def time_ragged_step(work: Work, device: torch.device) -> Iterator[Row]:
    """Times a step on a ragged batch beside one by one, and beside equal utterances."""
    model, utterances = build_model(work, device), utterances_of(work)
    alternatives = ([utterances], [[one] for one in utterances], [equal_utterances(utterances)])
    steps = [step_on(model, batches, device) for batches in alternatives]
    ragged, alone, equal = (t.milliseconds for t in time_in_turns(steps, device, work.repeats))
    title = f"training step, {work.elayers} Conformer blocks, {work}"
    yield Row(f"{title} (reference: one by one)", ragged, alone, target=1, faster=True)
    notes = [_speed("float32", steps[0], ragged, work, device)]
    what = f"{title} (reference: the same without padding)"
    yield Row(what, ragged, equal, TARGET, notes=notes)


def time_video_resnet(work: Work, device: torch.device) -> Iterator[Row]:
    """Times the video's ResNet on a ragged batch and on one utterance of the same frames."""
    frontend = build_model(work, device).video_frontend
    padded, lengths, _ = make_batch(utterances_of(work), device, streams=("video",))
    row = torch.cat([one.video for one in utterances_of(work)])[None].to(device)

    def run(x: Tensor, lengths: Tensor) -> None:
        frontend.zero_grad(set_to_none=True)
        frontend(x, lengths)[0].sum().backward()

    calls = [
        partial(run, padded["video"], lengths["video"]),
        partial(run, row, lengths["video"].sum(0, keepdim=True)),
    ]
    ragged, alone = (t.milliseconds for t in time_in_turns(calls, device, work.repeats))
    yield Row(f"ResNet of the video, {work} (reference: as one utterance)", ragged, alone, TARGET)


def time_settings(work: Work, device: torch.device) -> Iterator[Row]:
    """Times bfloat16 and torch.compile, each and together, beside float32 without."""
    model, utterances = build_model(work, device), utterances_of(work)
    plain = step_on(model, [utterances], device)
    compiled = step_on(torch.compile(model), [utterances], device)
    steps = {
        "bfloat16": partial(_in_bfloat16, plain, device),
        "torch.compile": compiled,
        "torch.compile and bfloat16": partial(_in_bfloat16, compiled, device),
    }
    for name, step in steps.items():
        timings = time_in_turns([step, plain], device, max(2, work.repeats))
        fast, slow = (timing.milliseconds for timing in timings)
        what = f"training step in {name} (reference: float32, not compiled)"
        notes = [_speed(name, step, fast, work, device)]
        yield Row(what, fast, slow, target=1, faster=True, notes=notes)


def _in_bfloat16(step: Step, device: torch.device) -> Tensor:
    # The gradients are computed in the types of the forward pass.
    with torch.autocast(device.type, torch.bfloat16):
        return step()


def _speed(name: str, step: Step, milliseconds: float, work: Work, device: torch.device) -> str:
    """What a step achieves, as a note."""
    seconds = milliseconds / 1000
    return (
        f"{name}: {sum(work.frames) / seconds:.0f} frames and {sum(work.tokens) / seconds:.0f} "
        f"tokens a second; {100 * other_share(profiled(step, device)):.0f} % of the computing time "
        "goes neither into matrix products nor into convolutions"
    )


def profiled(step: Step, device: torch.device) -> list[tuple[str, float]]:
    """Profiles a step: names and microseconds of kernels, or of operators on a CPU.

    The time of an operator is without what it calls.
    """
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]
    with profile(activities=activities, acc_events=True) as recorded:
        step()
        if on_gpu:
            torch.cuda.synchronize(device)
    return [
        (event.key, event.self_device_time_total if on_gpu else event.self_cpu_time_total)
        for event in recorded.key_averages()
    ]


def other_share(times: Iterable[tuple[str, float]]) -> float:
    """Share of the time that goes neither into matrix products nor into convolutions.

    Names are those of kernels or operators; attention's products count too.
    """
    times = list(times)
    matrices = sum(
        time for name, time in times if MATRIX_WORK.search(name) and not NO_MATRIX_WORK.search(name)
    )
    return 1 - matrices / sum(time for _, time in times)


def measure(work: Work, device: torch.device, *, settings: bool) -> Iterator[Row]:
    """Measures all; `settings`: bfloat16 and torch.compile too."""
    yield from time_ragged_step(work, device)
    yield from time_video_resnet(work, device)
    if settings:
        yield from time_settings(work, device)


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = device_parser("Measure what padding costs in a training step.")
    parser.add_argument(
        "--compile",
        action="store_true",
        help="time bfloat16 and torch.compile on a CPU too, which takes minutes",
    )
    options, device = parse(parser, argv)
    settings = options.compile or device.type == "cuda"
    rows = measure(WORK[device.type], device, settings=settings)
    print_report(device, rows, precision="float32")


if __name__ == "__main__":
    main()
