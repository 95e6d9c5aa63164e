"""Measures what the pretrained encoders save: short inputs, small images, no work on padding.

`python benchmarks/encoders.py [--device cpu|cuda]`, in the repository's root, prints a table of
ratios, each measured in one process; two minutes on two CPU cores. Sizes are those of the
published checkpoints, weights are random, and the front-ends load them from a folder, frozen.
On a CPU, videos have an eighth of the frames.

An eight-utterance ragged batch is compared with the same samples or frames without padding. For
an audio encoder, these are the eight utterances laid end to end and cut into eight of their mean
length: of all batches of eight it is the cheapest, since attention's work grows with the square
of the length. (Utterances one by one would be dearer on a GPU, all in one piece would be dearer
in attention.) For an image encoder, they are one long utterance.
"""

import json
import sys
import tempfile
from argparse import ArgumentParser
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import transformers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedModel,
    ViTConfig,
    ViTModel,
    WavLMConfig,
    WavLMModel,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperModel,
)
from transformers.utils import logging as transformers_logging

from benchmarks.timing import time_in_turns
from espnet.formats import AUDIO_RATE, SAMPLES_PER_FRAME
from espnet.nets.decoders import DECODERS
from espnet.nets.encoders import VISION_ENCODERS, WHISPER_SECONDS
from espnet.nets.pytorch_backend.frontend.clip_encoder import CLIPEncoder
from espnet.nets.pytorch_backend.frontend.pretrained_encoder import PretrainedEncoder
from espnet.nets.pytorch_backend.frontend.vit_encoder import ViTEncoder
from espnet.nets.pytorch_backend.frontend.wavlm_encoder import WavLMEncoder
from espnet.nets.pytorch_backend.frontend.whisper_encoder import WhisperEncoder
from espnet.utils.tiny_checkpoints import NORMALISATION

CROP = 88  # pixels
PUBLISHED_SIZE = 224  # pixels
SHORT_SECONDS = 4
RAGGED_FRAMES = (100, 92, 80, 68, 60, 48, 36, 28)  # of 1/25 s: 1.1 to 4 s, 20.5 s in all
TITLES = {
    "vit": "ViT-B/16",
    "clip": "CLIP ViT-B/16",
    "whisper": "Whisper small",
    "wavlm": "WavLM base plus",
}
ENCODER_CLASSES = {
    "vit": ViTEncoder,
    "clip": CLIPEncoder,
    "whisper": WhisperEncoder,
    "wavlm": WavLMEncoder,
}


@dataclass(frozen=True)
class Work:
    """How much is computed.

    Attributes:
        utterances: Short utterances that Whisper encodes at once.
        images: Frames that are encoded at two sizes.
        frame_step: Videos of the ragged batch have one in so many of its frames.
        repeats: How often each alternative is timed.
    """

    utterances: int
    images: int
    frame_step: int
    repeats: int


WORK = {
    "cpu": Work(utterances=2, images=32, frame_step=8, repeats=3),
    "cuda": Work(utterances=8, images=512, frame_step=1, repeats=10),
}


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        what: What was timed, and against what.
        time: Its time in milliseconds.
        reference: That of its reference, likewise.
        target: Ratio to be reached.
        faster: Whether the ratio is how many times faster than the reference it is, with a target
            of at least so many, or the share of the reference's time that it takes, of at most.
        notes: What its outputs have shown, a sentence each.
    """

    what: str
    time: float
    reference: float
    target: float
    faster: bool
    notes: list[str] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """The ratio that the target is for."""
        return self.reference / self.time if self.faster else self.time / self.reference

    def __str__(self) -> str:
        """The row in Markdown."""
        ratio, target = (
            (f"{self.ratio:.1f} times faster", f"at least {self.target:g} times faster")
            if self.faster
            else (f"{self.ratio:.2f} times", f"at most {self.target:g} times")
        )
        return f"| {self.what} | {self.time:.1f} | {self.reference:.1f} | {ratio} | {target} |"


def published_model(name: str) -> PreTrainedModel:
    """Builds a model of a published checkpoint's size with random weights.

    Parts that the encoder leaves out and that would take long to write are small or missing.

    Args:
        name: Encoder that loads it.

    Returns:
        The model.
    """
    if name == "vit":  # google/vit-base-patch16-224-in21k
        return ViTModel(ViTConfig(image_size=PUBLISHED_SIZE, patch_size=16))
    if name == "clip":  # openai/clip-vit-base-patch16
        return CLIPVisionModel(CLIPVisionConfig(image_size=PUBLISHED_SIZE, patch_size=16))
    if name == "wavlm":  # microsoft/wavlm-base-plus
        return WavLMModel(WavLMConfig())
    config = WhisperConfig(  # openai/whisper-small, but for its decoder
        d_model=768,
        encoder_layers=12,
        encoder_attention_heads=12,
        encoder_ffn_dim=3072,
        decoder_layers=1,
        decoder_attention_heads=12,
        vocab_size=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
        decoder_start_token_id=2,
    )
    return WhisperModel(config)


@contextmanager
def checkpoint(name: str) -> Iterator[str]:
    """Writes a checkpoint of random weights.

    Args:
        name: Encoder that loads it.

    Yields:
        Its folder, which is removed at the end.
    """
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        published_model(name).save_pretrained(folder)
        if name in NORMALISATION:
            path = Path(folder) / "preprocessor_config.json"
            path.write_text(json.dumps(NORMALISATION[name]))
        yield folder


def load_encoder(name: str, folder: str, device: torch.device, **options: Any) -> PretrainedEncoder:
    """Loads a front-end, frozen.

    Args:
        name: Encoder.
        folder: Its checkpoint.
        device: Where it computes.
        **options: Of its constructor.

    Returns:
        The front-end.
    """
    return ENCODER_CLASSES[name](folder, **options).to(device).eval()


def time_short_utterances(folder: str, work: Work, device: torch.device) -> Row:
    """Times Whisper on short utterances, with the silence that its decoder wants, against 30 s.

    Args:
        folder: Checkpoint of Whisper.
        work: How much is computed.
        device: Where.

    Returns:
        A row of the table.
    """
    margin = DECODERS["whisper"].margin
    encoder = load_encoder("whisper", folder, device, margin=margin)
    padded = load_encoder("whisper", folder, device, margin=float(WHISPER_SECONDS))
    x = 0.1 * _random(work.utterances, SHORT_SECONDS * AUDIO_RATE, 1, device=device)
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
    return Row(
        f"{TITLES['whisper']}, {work.utterances} utterances of {SHORT_SECONDS} s and {margin:g} s "
        "of silence (reference: padded to 30 s)",
        *(timing.milliseconds for timing in timings),
        target=5,
        faster=True,
        notes=[
            f"{TITLES['whisper']}: padded to 30 s, an utterance's features differ by at most "
            f"{_largest(long[:1] - expected):.1g} from those of transformers",
            f"{TITLES['whisper']}: with less silence, which attention sees, they change by "
            f"{100 * relative:.2g} % (these weights are random)",
        ],
    )


def time_small_images(folder: str, work: Work, device: torch.device) -> Row:
    """Times ViT on mouth crops at its small size against the size of its training.

    Args:
        folder: Checkpoint of ViT.
        work: How much is computed.
        device: Where.

    Returns:
        A row of the table.
    """
    small = load_encoder("vit", folder, device)
    large = load_encoder("vit", folder, device, image_size=PUBLISHED_SIZE)
    x = _random(1, work.images, 1, CROP, CROP, device=device)
    lengths = torch.full((1,), work.images)
    timings = time_in_turns(
        [lambda: small(x, lengths)[0], lambda: large(x, lengths)[0]], device, work.repeats
    )
    side = small.images(x[0, :1]).size(-1)
    return Row(
        f"{TITLES['vit']}, {work.images} frames of {CROP}x{CROP} at {side}x{side} "
        f"(reference: at {PUBLISHED_SIZE}x{PUBLISHED_SIZE})",
        *(timing.milliseconds for timing in timings),
        target=7,
        faster=True,
    )


def time_ragged_batch(name: str, folder: str, work: Work, device: torch.device) -> Row:
    """Times an encoder on a ragged batch against as many real frames without padding.

    Args:
        name: Encoder.
        folder: Its checkpoint.
        work: How much is computed.
        device: Where.

    Returns:
        A row of the table.
    """
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
    number = f"{int(lengths.sum())} frames" if name in VISION_ENCODERS else f"{_seconds()} s"
    return Row(
        f"{TITLES[name]}, {len(utterances)} utterances, {number} in all (reference: the same "
        "without padding)",
        *(timing.milliseconds for timing in timings),
        target=1.15,
        faster=False,
        notes=[
            f"{TITLES[name]}: in the ragged batch, features differ by at most "
            f"{max(differences):.1g} from those of the utterances one by one"
        ],
    )


def ragged_utterances(name: str, work: Work, device: torch.device) -> list[Tensor]:
    """Makes utterances of different lengths: noise.

    Args:
        name: Encoder that they are for.
        work: How much is computed.
        device: Where.

    Returns:
        Videos, (T, 1, H, W) each, or waveforms, (S, 1) each.
    """
    if name in VISION_ENCODERS:
        lengths = [frames // work.frame_step for frames in RAGGED_FRAMES]
        shape: tuple[int, ...] = (1, CROP, CROP)
    else:
        lengths = [frames * SAMPLES_PER_FRAME for frames in RAGGED_FRAMES]
        shape = (1,)
    return list(_random(sum(lengths), *shape, device=device).split(lengths))


def measure(name: str, work: Work, device: torch.device) -> list[Row]:
    """Measures all that is asked of an encoder.

    Args:
        name: Encoder.
        work: How much is computed.
        device: Where.

    Returns:
        Rows of the table.
    """
    rows = []
    with torch.no_grad(), checkpoint(name) as folder:
        if name == "whisper":
            rows.append(time_short_utterances(folder, work, device))
        if name == "vit":
            rows.append(time_small_images(folder, work, device))
        rows.append(time_ragged_batch(name, folder, work, device))
    return rows


def _random(*shape: int, device: torch.device) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(device)


def _largest(difference: Tensor) -> float:
    return float(difference.abs().max())


def _seconds() -> float:
    return round(sum(RAGGED_FRAMES) * SAMPLES_PER_FRAME / AUDIO_RATE, 1)


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = ArgumentParser(description="Measure what the pretrained encoders save.")
    parser.add_argument(
        "--device",
        choices=list(WORK),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where to compute (default: %(default)s)",
    )
    parser.add_argument(
        "--encoder",
        nargs="+",
        choices=list(ENCODER_CLASSES),
        default=list(ENCODER_CLASSES),
        help="which to measure (default: all)",
    )
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    transformers_logging.disable_progress_bar()
    where = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, {where}, "
        f"{torch.get_num_threads()} CPU threads, float32\n"
    )
    print("| what | time (ms) | reference (ms) | ratio | target |")
    print("|---|---|---|---|---|", flush=True)
    notes = []
    for name in options.encoder:
        for row in measure(name, WORK[device.type], device):
            print(row, flush=True)
            notes += row.notes
    print("", *(f"- {note}" for note in notes), sep="\n")


if __name__ == "__main__":
    main()
