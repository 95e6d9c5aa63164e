"""Measures what the pretrained encoders save: short inputs, small images, no work on padding.

`python benchmarks/encoders.py [--device cpu|cuda]`, in the repository's root, prints a table of
ratios, each measured in one process; two minutes on two CPU cores. Sizes are those of the
published checkpoints, weights are random. On a CPU, videos have an eighth of the frames.

An eight-utterance ragged batch is compared with the same samples or frames without padding: for an
image encoder as one long utterance, for an audio encoder as eight of their mean length, which is
the cheapest of all batches of eight, since attention's work grows with the square of the length.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import WhisperFeatureExtractor, WhisperModel
from transformers.utils import logging as transformers_logging

from benchmarks.checkpoints import ENCODER_CLASSES, IMAGE_SIZE, TITLES, encoder_checkpoint
from benchmarks.common import Row, device_parser, parse, print_report, time_in_turns
from benchmarks.noise import CROP, noise
from espnet.formats import AUDIO_RATE, SAMPLES_PER_FRAME
from espnet.nets.decoders import DECODERS
from espnet.nets.encoders import VISION_ENCODERS, WHISPER_SECONDS
from espnet.nets.pytorch_backend.frontend.pretrained_encoder import PretrainedEncoder

SHORT_SECONDS = 4
RAGGED_FRAMES = (100, 92, 80, 68, 60, 48, 36, 28)  # of 1/25 s: 1.1 to 4 s, 20.5 s in all


@dataclass(frozen=True)
class Work:
    """How much is computed."""

    utterances: int  # short utterances that Whisper encodes at once
    images: int  # frames that are encoded at two sizes
    frame_step: int  # videos of the ragged batch have one in so many of its frames
    repeats: int  # how often each alternative is timed


WORK = {
    "cpu": Work(utterances=2, images=32, frame_step=8, repeats=3),
    "cuda": Work(utterances=8, images=512, frame_step=1, repeats=10),
}


def load_encoder(name: str, folder: str, device: torch.device, **options: Any) -> PretrainedEncoder:
    """Loads a front-end, frozen, with options of its constructor."""
    return ENCODER_CLASSES[name](folder, **options).to(device).eval()


def time_short_utterances(folder: str, work: Work, device: torch.device) -> Row:
    """Times Whisper on short utterances, with the silence that its decoder wants, against 30 s."""
    margin = DECODERS["whisper"].margin
    encoder = load_encoder("whisper", folder, device, margin=margin)
    padded = load_encoder("whisper", folder, device, margin=float(WHISPER_SECONDS))
    x = 0.1 * noise(work.utterances, SHORT_SECONDS * AUDIO_RATE, 1, device=device)
    lengths = torch.full((work.utterances,), x.size(1))
    timings = time_in_turns(
        [lambda: encoder(x, lengths)[0], lambda: padded(x, lengths)[0]], device, work.repeats
    )
    short, long = (timing.result for timing in timings)
    # What transformers gives for the first utterance, from the samples on.
    wave = x[0, :, 0].cpu().numpy()
    mel = WhisperFeatureExtractor()(wave, sampling_rate=AUDIO_RATE, return_tensors="pt")
    model = WhisperModel.from_pretrained(folder).to(device).eval()
    expected = model.encoder(mel.input_features.to(device)).last_hidden_state[:, : long.size(1)]
    change = torch.linalg.vector_norm(short - long[:, : short.size(1)])
    relative = change / torch.linalg.vector_norm(long[:, : short.size(1)])
    title = TITLES["whisper"]
    return Row(
        f"{title}, {work.utterances} utterances of {SHORT_SECONDS} s and {margin:g} s "
        "of silence (reference: padded to 30 s)",
        *(timing.milliseconds for timing in timings),
        target=5,
        faster=True,
        notes=[
            f"{title}: padded to 30 s, an utterance's features differ by at most "
            f"{_largest(long[:1] - expected):.1g} from those of transformers",
            f"{title}: with less silence, which attention sees, they change by "
            f"{100 * relative:.2g} % (these weights are random)",
        ],
    )


def time_small_images(folder: str, work: Work, device: torch.device) -> Row:
    """Times ViT on mouth crops at its small size against the size of its training."""
    small = load_encoder("vit", folder, device)
    large = load_encoder("vit", folder, device, image_size=IMAGE_SIZE)
    x = noise(1, work.images, 1, CROP, CROP, device=device)
    lengths = torch.full((1,), work.images)
    timings = time_in_turns(
        [lambda: small(x, lengths)[0], lambda: large(x, lengths)[0]], device, work.repeats
    )
    side = small.images(x[0, :1]).size(-1)
    return Row(
        f"{TITLES['vit']}, {work.images} frames of {CROP}x{CROP} at {side}x{side} "
        f"(reference: at {IMAGE_SIZE}x{IMAGE_SIZE})",
        *(timing.milliseconds for timing in timings),
        target=7,
        faster=True,
    )


def time_ragged_batch(name: str, folder: str, work: Work, device: torch.device) -> Row:
    """Times an encoder on a ragged batch against as many real frames without padding."""
    encoder = load_encoder(name, folder, device)
    utterances = ragged_utterances(name, work, device)
    lengths = torch.tensor([len(utterance) for utterance in utterances])
    ragged = pad_sequence(utterances, batch_first=True)
    pieces = 1 if name in VISION_ENCODERS else len(utterances)
    unpadded = torch.cat(utterances).unflatten(0, (pieces, -1))
    unpadded_lengths = torch.full((pieces,), unpadded.size(1))
    timings = time_in_turns(
        [lambda: encoder(ragged, lengths), lambda: encoder(unpadded, unpadded_lengths)[0]],
        device,
        work.repeats,
    )
    features, feature_lengths = timings[0].result
    differences = []
    for row, utterance in enumerate(utterances):
        alone, _ = encoder(utterance[None], lengths[row : row + 1])
        differences.append(_largest(features[row, : feature_lengths[row]] - alone[0]))
    seconds = sum(RAGGED_FRAMES) * SAMPLES_PER_FRAME / AUDIO_RATE
    number = f"{int(lengths.sum())} frames" if name in VISION_ENCODERS else f"{seconds:.1f} s"
    return Row(
        f"{TITLES[name]}, {len(utterances)} utterances, {number} in all (reference: the same "
        "without padding)",
        *(timing.milliseconds for timing in timings),
        target=1.15,
        notes=[
            f"{TITLES[name]}: in the ragged batch, features differ by at most "
            f"{max(differences):.1g} from those of the utterances one by one"
        ],
    )


def ragged_utterances(name: str, work: Work, device: torch.device) -> list[Tensor]:
    """Makes videos, (T, 1, H, W) each, or waveforms, (S, 1) each, as the encoder wants."""
    if name in VISION_ENCODERS:
        lengths = [frames // work.frame_step for frames in RAGGED_FRAMES]
        shape: tuple[int, ...] = (1, CROP, CROP)
    else:
        lengths = [frames * SAMPLES_PER_FRAME for frames in RAGGED_FRAMES]
        shape = (1,)
    return list(noise(sum(lengths), *shape, device=device).split(lengths))


@torch.no_grad()
def measure(names: Sequence[str], work: Work, device: torch.device) -> Iterator[Row]:
    """Measures all that is asked of encoders."""
    for name in names:
        with encoder_checkpoint(name) as folder:
            if name == "whisper":
                yield time_short_utterances(folder, work, device)
            if name == "vit":
                yield time_small_images(folder, work, device)
            yield time_ragged_batch(name, folder, work, device)


def _largest(difference: Tensor) -> float:
    return float(difference.abs().max())


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = device_parser("Measure what the pretrained encoders save.")
    parser.add_argument(
        "--encoder",
        nargs="+",
        choices=list(ENCODER_CLASSES),
        default=list(ENCODER_CLASSES),
        help="which to measure (default: all)",
    )
    options, device = parse(parser, argv)
    transformers_logging.disable_progress_bar()
    rows = measure(options.encoder, WORK[device.type], device)
    print_report(device, rows, packages=["transformers"], precision="float32")


if __name__ == "__main__":
    main()
