"""The command-line options of the model: encoders, Conformer, decoder and adapters.

Nothing here imports torch, so that `--help` and a mistaken option answer at once.
"""

from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from dataclasses import fields
from pathlib import Path
from typing import Any

from espnet.nets.adaptation import PARTS, AdaptationOptions
from espnet.nets.decoders import (
    DECODERS,
    DTYPES,
    LLAMA_CONDITIONINGS,
    WHISPER_TASKS,
    DecoderOptions,
    default_adim,
    default_elayers,
    resolve_parts,
)
from espnet.nets.encoders import (
    AUDIO_ENCODERS,
    FRAME_RATES,
    POOLINGS,
    STREAMS,
    VISION_ENCODERS,
    EncoderOptions,
)
from espnet.utils.option_types import (
    count,
    hidden_layer,
    margin,
    natural,
    positive,
    probability,
    share,
)

LLAMA_PROMPT = "Transcribe speech to text."
ENCODER_FIELDS = fields(EncoderOptions)
DECODER_FIELDS = fields(DecoderOptions)
ADAPTATION_FIELDS = fields(AdaptationOptions)
MODEL_OPTIONS = (
    "adim",
    "aheads",
    "eunits",
    "elayers",
    "dunits",
    "dlayers",
    "cnn_module_kernel",
    "dropout_rate",
    "label_smoothing",
    "ctc_weight",
    "modality_dropout",
    *(field.name for field in ENCODER_FIELDS),
    *(field.name for field in DECODER_FIELDS),
    *(field.name for field in ADAPTATION_FIELDS),
)


def add_model_options(parser: ArgumentParser) -> None:
    """Adds what model to build; the defaults are auto_avsr's."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--adim",
        type=count,
        help="feature size (default: 768, but without encoder blocks that of a pretrained audio "
        "encoder)",
    )
    group.add_argument("--aheads", type=count, default=12, help="attention heads (%(default)s)")
    group.add_argument(
        "--eunits", type=count, default=3072, help="encoder feed-forward units (%(default)s)"
    )
    group.add_argument(
        "--elayers",
        type=natural,
        help="encoder blocks, 0 leaves the encoder out (default: 12, but 0 from Whisper's encoder "
        "to Whisper's decoder)",
    )
    group.add_argument(
        "--dunits", type=count, default=3072, help="decoder feed-forward units (%(default)s)"
    )
    group.add_argument("--dlayers", type=count, default=6, help="decoder blocks (%(default)s)")
    group.add_argument(
        "--cnn-module-kernel", type=count, default=31, help="Conformer kernel, odd (%(default)s)"
    )
    group.add_argument("--dropout-rate", type=probability, default=0.1, help="(%(default)s)")
    group.add_argument(
        "--label-smoothing",
        type=probability,
        help="of the decoder's targets (default: 0.1, but 0 for pretrained decoders)",
    )
    group.add_argument(
        "--ctc-weight",
        type=probability,
        help="CTC's share of the loss; 0: no CTC layer (default: 0.1, but 0 for pretrained "
        "decoders)",
    )
    group.add_argument(
        "--modality-dropout",
        type=probability,
        nargs=2,
        default=(0.0, 0.0),
        metavar=("P_AUDIO", "P_VIDEO"),
        help="probabilities that a training utterance loses its audio, its video (0 0); the model "
        "then also takes one stream alone",
    )


def add_encoder_options(parser: ArgumentParser) -> None:
    """Adds what encodes the streams; what is left out follows from `EncoderOptions`."""
    group = parser.add_argument_group("encoders")
    group.add_argument(
        "--modality",
        choices=tuple(STREAMS),
        help="streams that the model takes (default: those of the encoders)",
    )
    group.add_argument(
        "--vision-encoder",
        choices=tuple(VISION_ENCODERS),
        help="video front-end: auto_avsr's ResNet, or a pretrained ViT or CLIP on each frame "
        "(default: resnet if the modality has video)",
    )
    group.add_argument(
        "--audio-encoder",
        choices=tuple(AUDIO_ENCODERS),
        help="audio front-end: auto_avsr's ResNet on the waveform, a log-mel filter bank with two "
        "convolutions, or a pretrained Whisper or WavLM (default: resnet1d if the modality has "
        "audio)",
    )
    for word, table in (("vision", VISION_ENCODERS), ("audio", AUDIO_ENCODERS)):
        usual = [f"{name}: {choice.checkpoint}" for name, choice in table.items()]
        group.add_argument(
            f"--{word}-encoder-name",
            metavar="ID|FOLDER",
            help="checkpoint of it: a Hugging Face hub id, or a folder as save_pretrained leaves "
            f"it (default: {', '.join(text for text in usual if 'None' not in text)})",
        )
    for word in ("vision", "audio"):
        group.add_argument(
            f"--freeze-{word}-encoder",
            action=BooleanOptionalAction,
            help="leave its weights as they are (default: if it is pretrained)",
        )
    group.add_argument(
        "--unfreeze-last-layers",
        type=natural,
        default=0,
        metavar="N",
        help="train the last N layers of frozen pretrained encoders (%(default)s)",
    )
    group.add_argument(
        "--encoder-layer",
        type=hidden_layer,
        default=-1,
        metavar="-1|K|weighted",
        help="hidden layer of pretrained encoders that feeds the fusion, 0 being the input of the "
        "first; -1: their output; weighted: a learned mean over all (%(default)s)",
    )
    group.add_argument(
        "--gradient-checkpointing",
        action=BooleanOptionalAction,
        default=True,
        help="pretrained parts through which gradients flow compute their activations again in the "
        "backward pass, which saves memory (%(default)s)",
    )
    group.add_argument(
        "--frame-rate",
        type=int,
        choices=FRAME_RATES,
        help="frames a second at which the streams are fused: at 25, features of Whisper and WavLM "
        "are stacked in pairs, at 50, video is repeated (default: 25, but 50 from Whisper's "
        "encoder to Whisper's decoder)",
    )
    group.add_argument(
        "--video-width", type=count, default=64, help="channels of the video ResNet (%(default)s)"
    )
    group.add_argument(
        "--audio-width", type=count, default=64, help="channels of the audio ResNet (%(default)s)"
    )
    group.add_argument(
        "--vision-pooling",
        choices=POOLINGS,
        default="cls",
        help="feature of a frame: ViT's and CLIP's class token, or the mean over their patches "
        "(%(default)s)",
    )
    group.add_argument(
        "--vision-image-size",
        type=count,
        metavar="PIXELS",
        help="side to which ViT and CLIP resize frames; 224 is most checkpoints' own (default: the "
        "smallest multiple of the patch size that holds the crop)",
    )
    group.add_argument(
        "--vision-chunk-frames",
        type=count,
        default=128,
        help="frames that ViT and CLIP encode at once; bounds the memory (%(default)s)",
    )
    margins = [f"{n}: {c.whisper_margin:g}" for n, c in DECODERS.items() if c.whisper_margin]
    group.add_argument(
        "--whisper-margin",
        type=margin,
        metavar="SECONDS|30s",
        help="silence that follows an utterance in Whisper's encoder; 30s: as much as it takes "
        f"(default: 0, but with --decoder {', '.join(margins)}: where no silence follows the "
        "words, Whisper repeats them)",
    )
    group.add_argument(
        "--whisper-pad-30s",
        action="store_true",
        help="the same as --whisper-margin 30s, as Whisper was trained: slower",
    )


def add_decoder_options(parser: ArgumentParser) -> None:
    """Adds what writes the transcript; what is left out follows from `DecoderOptions`."""
    group = parser.add_argument_group("decoder")
    group.add_argument(
        "--decoder",
        choices=tuple(DECODERS),
        default="transformer",
        help="Transformer over a SentencePiece vocabulary, or a pretrained LLaMA or Whisper with "
        "its own (%(default)s)",
    )
    usual = [f"{n}: {choice.checkpoint}" for n, choice in DECODERS.items() if choice.pretrained]
    group.add_argument(
        "--decoder-name",
        metavar="ID|FOLDER",
        help="checkpoint of it, with its tokenizer: a Hugging Face hub id, or a folder (default: "
        f"{', '.join(usual)})",
    )
    group.add_argument(
        "--freeze-decoder",
        action=BooleanOptionalAction,
        help="leave the weights of its checkpoint as they are (default: if it has one)",
    )
    group.add_argument(
        "--decoder-dtype",
        choices=DTYPES,
        default="auto",
        help="precision of a frozen checkpoint's weights; auto: bfloat16 on a GPU that has it, "
        "else float32 (%(default)s)",
    )
    group.add_argument(
        "--llama-conditioning",
        choices=LLAMA_CONDITIONINGS,
        default="cross-attention",
        help="gated cross-attention blocks between LLaMA's layers, or the encoder's output as a "
        "prefix of the text (%(default)s)",
    )
    group.add_argument(
        "--llama-cross-every",
        type=count,
        default=4,
        metavar="N",
        help="a cross-attention block before every N-th layer (%(default)s)",
    )
    group.add_argument(
        "--llama-downsample",
        type=count,
        default=3,
        metavar="N",
        help="frames that are stacked into one embedding of the prefix (%(default)s)",
    )
    group.add_argument(
        "--llama-prompt",
        default=LLAMA_PROMPT,
        help="instruction between prefix and text (%(default)s)",
    )
    group.add_argument("--whisper-language", help="code of the language, as en (default: en)")
    group.add_argument(
        "--whisper-task", choices=WHISPER_TASKS, default="transcribe", help="(%(default)s)"
    )
    group.add_argument(
        "--whisper-gated-video",
        action="store_true",
        help="video enters each block of Whisper's decoder by a gated cross-attention of its own, "
        "and the encoder's output is the audio's alone",
    )
    group.add_argument(
        "--text-case",
        choices=("keep", "lower"),
        help="case of the text that a pretrained decoder learns (default: lower)",
    )


def add_adaptation_options(parser: ArgumentParser) -> None:
    """Adds which parts get adapters; what is left out follows from `AdaptationOptions`."""
    group = parser.add_argument_group("adaptation")
    group.add_argument(
        "--use-qlora",
        action="store_true",
        help="put the linear layers of --qlora-parts into 4 bits, and train low-rank adapters "
        "beside them instead of the weights",
    )
    group.add_argument(
        "--use-lora", action="store_true", help="the same adapters without the 4 bits"
    )
    group.add_argument(
        "--qlora-parts",
        nargs="+",
        choices=PARTS,
        metavar="PART",
        help=f"parts that are adapted, for --use-lora too: {' '.join(PARTS)}; encoder is the "
        "Conformer (default: every pretrained part)",
    )
    group.add_argument(
        "--lora-rank", type=count, default=16, help="rank of the updates (%(default)s)"
    )
    group.add_argument(
        "--lora-alpha",
        type=positive,
        default=32.0,
        help="updates are scaled by alpha / rank (%(default)g)",
    )
    group.add_argument(
        "--lora-dropout",
        type=share,
        default=0.05,
        help="dropout on what the adapters take (%(default)s)",
    )
    group.add_argument(
        "--lora-targets",
        nargs="+",
        metavar="NAME",
        help="linear layers that get adapters, by their name's last parts, with * for anything: "
        "q_proj, layers.0.* (default: all of attention and feed-forward blocks)",
    )


def encoder_options(args: Namespace) -> EncoderOptions:
    """The options of the encoders group, for `E2E` and for checks."""
    return EncoderOptions(**{field.name: getattr(args, field.name) for field in ENCODER_FIELDS})


def decoder_options(args: Namespace) -> DecoderOptions:
    """The options of the decoder group, for `E2E` and for checks."""
    return DecoderOptions(**{field.name: getattr(args, field.name) for field in DECODER_FIELDS})


def adaptation_options(args: Namespace) -> AdaptationOptions:
    """The options of the adaptation group, for `E2E` and for checks."""
    return AdaptationOptions(**{f.name: getattr(args, f.name) for f in ADAPTATION_FIELDS})


def complete_model(args: Namespace, modality: str) -> None:
    """Fills in the encoders, the checkpoints, what is frozen, and what follows from the decoder.

    Args:
        args: Options, free of contradictions.
        modality: Of the model.
    """
    encoders, decoder = resolve_parts(modality, encoder_options(args), decoder_options(args))
    for name, value in (vars(encoders) | vars(decoder)).items():
        if name.endswith("_name") and value is not None and Path(value).is_dir():
            value = str(Path(value).resolve())
        setattr(args, name, value)
    args.qlora_parts = adaptation_options(args).resolved(encoders, decoder).qlora_parts
    choice = DECODERS[args.decoder]
    if args.elayers is None:
        args.elayers = default_elayers(encoders, decoder)
    if args.adim is None:
        args.adim = default_adim(encoders, args.elayers)
    defaults = {
        "ctc_weight": choice.ctc_weight,
        "label_smoothing": 0.0 if choice.pretrained else 0.1,
        "text_case": "lower" if choice.pretrained else "keep",
    }
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.ctc_decode_weight is None:
        args.ctc_decode_weight = 0.1 if args.ctc_weight else 0.0
    if args.beam_size is None:
        args.beam_size = choice.beam_size
    if args.stop_repeats is None:
        args.stop_repeats = choice.pretrained and not args.ctc_decode_weight


def model_options(args: Namespace) -> dict[str, Any]:
    """The options that `E2E` takes, by keyword."""
    return {name: getattr(args, name) for name in MODEL_OPTIONS}
