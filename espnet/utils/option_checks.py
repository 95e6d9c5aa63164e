"""Checks of a whole command line, so that all its problems are named at once."""

from argparse import Namespace
from pathlib import Path

from espnet.nets.adaptation import INSTALLED, adaptation_problems, install_command
from espnet.nets.decoders import (
    DECODERS,
    decoder_problems,
    default_adim,
    default_elayers,
    resolve_parts,
)
from espnet.nets.encoders import encoder_problems
from espnet.utils.model_options import (
    LLAMA_PROMPT,
    adaptation_options,
    decoder_options,
    encoder_options,
)


def training_problems(args: Namespace) -> list[str]:
    """What is wrong with train.py's options.

    Args:
        args: Options.

    Returns:
        A sentence a problem; empty if there is none.
    """
    problems = []
    required = {
        "--exp-name": args.exp_name,
        "--modality (or --vision-encoder, --audio-encoder)": args.modality,
        "--root-dir": args.root_dir,
        "--train-file": args.train_file,
    }
    missing = [flag for flag, value in required.items() if not value]
    if missing:
        problems.append(f"{' and '.join(missing)} must be given (or --demo)")
    problems += _data_problems(args, {"--train-file": args.train_file, "--val-file": args.val_file})
    problems += _model_problems(args, args.modality)
    if (args.transfer_frontend or args.transfer_encoder) and not args.pretrained_model_path:
        problems.append(
            "--transfer-frontend and --transfer-encoder need --pretrained-model-path to take "
            "weights from"
        )
    if args.pretrained_model_path and not Path(args.pretrained_model_path).is_file():
        problems.append(f"--pretrained-model-path {args.pretrained_model_path} does not exist")
    if args.ckpt_path not in (None, "last") and not Path(args.ckpt_path).is_file():
        problems.append(f"--ckpt-path {args.ckpt_path} does not exist: give a file, or 'last'")
    problems += _adaptation_source_problems(args)
    if args.optimizer == "adamw8bit" and "bitsandbytes" not in INSTALLED:
        problems.append(
            "--optimizer adamw8bit needs bitsandbytes, but it is not installed: "
            f"{install_command('bitsandbytes')}"
        )
    if args.warmup_epochs > args.max_epochs:
        problems.append(
            f"--warmup-epochs {args.warmup_epochs:g} is more than --max-epochs {args.max_epochs}: "
            "the rate would never reach --lr"
        )
    return problems


def evaluation_problems(args: Namespace, model_modality: str | None) -> list[str]:
    """What is wrong with eval.py's options, those of the run included.

    Args:
        args: Options.
        model_modality: What the model was trained for, None if nothing tells.

    Returns:
        A sentence a problem; empty if there is none.
    """
    path = args.pretrained_model_path
    problems = []
    if path is None:
        problems += _untrained_problems(args)
    elif not Path(path).is_file():
        problems.append(f"--pretrained-model-path {path} does not exist")
    elif not model_modality:
        problems.append(
            f"no config.yaml beside {path} tells its modality: give --modality, and the model "
            "options that differ from auto_avsr's"
        )
    elif args.modality != model_modality and model_modality != "audiovisual":
        problems.append(f"--modality {args.modality}, but {path} is a model of {model_modality}")
    elif args.modality != model_modality and not any(args.modality_dropout):
        problems.append(
            f"--modality {args.modality}, but {path} was trained without --modality-dropout and "
            "needs both streams"
        )
    if not args.root_dir:
        problems.append("--root-dir must be given")
    problems += _data_problems(args, {"--test-file": args.test_file})
    return problems + _model_problems(args, model_modality)


def _untrained_problems(args: Namespace) -> list[str]:
    """What stands in the way of scoring a model that has not been trained: a published Whisper."""
    if not (args.modality == "audio" and args.audio_encoder == args.decoder == "whisper"):
        return [
            "--pretrained-model-path must be given: only a published Whisper, --audio-encoder "
            "whisper --decoder whisper, is scored without training"
        ]
    given = {
        "--elayers": args.elayers,
        "--adim": args.adim,
        "--ctc-weight": args.ctc_weight,
        "--encoder-layer": None if args.encoder_layer == -1 else args.encoder_layer,
    }
    return [
        f"{flag} {value} without --pretrained-model-path would score random weights: leave it out"
        for flag, value in given.items()
        if value
    ]


def _data_problems(args: Namespace, lists: dict[str, str | None]) -> list[str]:
    if not args.root_dir:
        return []
    if not Path(args.root_dir).is_dir():
        return [f"--root-dir {args.root_dir} does not exist: give the folder of labels/"]
    paths = {
        f"{flag} {name}": Path(args.root_dir) / "labels" / name
        for flag, name in lists.items()
        if name
    }
    paths |= {f"--noise-file {name}": Path(name) for name in args.noise_file or []}
    return [
        f"{what} does not exist: looked for {path}"
        for what, path in paths.items()
        if not path.is_file()
    ]


def _adaptation_source_problems(args: Namespace) -> list[str]:
    """Adapters on weights that are random and stay so would learn next to nothing."""
    if not adaptation_options(args).enabled:
        return []
    last = Path(args.exp_dir) / str(args.exp_name) / "last.ckpt"
    if args.ckpt_path and (args.ckpt_path != "last" or last.is_file()):
        return []  # What is resumed has them.
    own = {"encoder"} if DECODERS[args.decoder].pretrained else {"encoder", "decoder"}
    if args.pretrained_model_path and not args.transfer_frontend and not args.transfer_encoder:
        return []
    if args.pretrained_model_path and args.transfer_encoder:
        own.remove("encoder")
    own = [part for part in args.qlora_parts or () if part in own]
    return [
        f"--qlora-parts {part} freezes weights that are random: give the checkpoint that they come "
        "from, --pretrained-model-path"
        for part in own
    ]


def _model_problems(args: Namespace, modality: str | None) -> list[str]:
    problems = []
    choice = DECODERS[args.decoder]
    of_encoders, of_decoder = encoder_options(args), decoder_options(args)
    elayers = args.elayers
    if elayers is None:
        elayers = default_elayers(of_encoders, of_decoder)
    if modality:
        problems += encoder_problems(modality, of_encoders)
        problems += decoder_problems(modality, of_decoder)
    if modality and not problems:
        of_encoders, of_decoder = resolve_parts(modality, of_encoders, of_decoder)
        adaptation = adaptation_options(args)
        problems += adaptation_problems(adaptation, of_encoders, of_decoder, elayers)
    ctc_weight = choice.ctc_weight if args.ctc_weight is None else args.ctc_weight
    if args.ctc_decode_weight and not ctc_weight:
        problems.append(
            f"--ctc-decode-weight {args.ctc_decode_weight:g}, but a model of --ctc-weight 0 has no "
            "CTC layer: leave it out, or train with CTC"
        )
    has_prefix = args.llama_conditioning == "prefix"
    if has_prefix and args.decoder != "llama":
        problems.append("--llama-conditioning prefix needs --decoder llama")
    if args.llama_prompt != LLAMA_PROMPT and (args.decoder != "llama" or not has_prefix):
        problems.append("--llama-prompt needs --decoder llama --llama-conditioning prefix")
    if args.whisper_language and args.decoder != "whisper":
        problems.append(f"--whisper-language {args.whisper_language} needs --decoder whisper")
    if args.whisper_task != "transcribe" and args.decoder != "whisper":
        problems.append(f"--whisper-task {args.whisper_task} needs --decoder whisper")
    if args.text_case == "lower" and not choice.pretrained:
        problems.append("--text-case lower needs --decoder llama or whisper")
    adim = args.adim or default_adim(of_encoders, elayers)
    attends = elayers or not choice.pretrained  # with so many heads
    if attends and adim is not None and (adim % args.aheads or adim % 2):
        problems.append(f"--adim {adim} must be even and a multiple of --aheads {args.aheads}")
    if args.cnn_module_kernel % 2 == 0:
        problems.append(f"--cnn-module-kernel {args.cnn_module_kernel} must be odd")
    if sum(args.modality_dropout) > 1:
        problems.append(f"--modality-dropout {args.modality_dropout}: the sum must be at most 1")
    if any(args.modality_dropout) and modality in ("audio", "video"):
        problems.append(
            f"--modality-dropout needs a model of video and audio, not of {modality} alone, which "
            "has no stream to spare"
        )
    return problems
