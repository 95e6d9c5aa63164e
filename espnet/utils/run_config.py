"""The options of a run: completed, kept in its folder, and read back to score its checkpoints."""

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import yaml

from espnet.nets.decoders import DECODERS
from espnet.nets.encoders import resolve_encoders
from espnet.utils.model_options import (
    add_adaptation_options,
    add_decoder_options,
    add_encoder_options,
    add_model_options,
)
from espnet.utils.options import add_data_options, add_decoding_options, train_parser

PATHS = (
    "vision_encoder_name",
    "audio_encoder_name",
    "decoder_name",
    "sp_model_path",
    "dict_path",
)


def parse_eval_args(
    parser: ArgumentParser, argv: list[str] | None = None
) -> tuple[Namespace, str | None]:
    """Parses eval.py's command line over the options of the checkpoint's run.

    What neither gives has train.py's default. The run's hardware, and the noise levels that it
    was scored at, are not inherited.

    Args:
        parser: That of eval.py.
        argv: Command line; None for that of the process.

    Returns:
        Options, and the modality that the model was trained for, None if nothing tells.
    """
    inherited = ArgumentParser()
    groups = (add_encoder_options, add_model_options, add_decoder_options, add_adaptation_options)
    for add in (*groups, add_decoding_options):
        add(inherited)
    add_data_options(inherited, training=True)
    names = vars(inherited.parse_args([])).keys() - {"decode_snr_target"}
    given = parser.parse_args(argv)
    try:
        config = load_config(given.pretrained_model_path) if given.pretrained_model_path else {}
    except ValueError as error:
        parser.error(str(error))
    run = {name: value for name, value in config.items() if name in names and value is not None}
    for name in run.keys() & set(PATHS):  # Those of an exported model are relative to its folder.
        beside = Path(given.pretrained_model_path).parent / run[name]
        if beside.exists():
            run[name] = str(beside.resolve())
    if config and "whisper_margin" not in config and not config.get("whisper_pad_30s"):
        run["whisper_margin"] = 0.0  # The run is older than the option.
    if given.whisper_pad_30s or given.whisper_margin is not None:
        run = {name: run[name] for name in run.keys() - {"whisper_pad_30s", "whisper_margin"}}
    if given.sp_model_path:  # The run's units belong to its own model.
        run.pop("dict_path", None)
    for name in ("sp_model_path", "dict_path", "noise_file"):  # The run may come from elsewhere.
        paths = run.get(name, [])
        if not all(Path(path).is_file() for path in ([paths] if isinstance(paths, str) else paths)):
            del run[name]
    parser.set_defaults(**run)
    args = parser.parse_args(argv)
    options = {**vars(train_parser().parse_args([])), **run, **vars(args)}
    args = Namespace(**options)
    if "modality" not in config:
        args.modality, *_ = resolve_encoders(args.modality, args.vision_encoder, args.audio_encoder)
    return args, config.get("modality", args.modality)


def find_vocabulary(args: Namespace, parser: ArgumentParser) -> None:
    """Fills in the paths of the SentencePiece model and its units, or ends with an error.

    A pretrained decoder has a vocabulary of its own; it needs the model only for lists of ids.
    """
    candidates = [
        Path(args.root_dir) / "spm" / "unigram.model",
        Path(__file__).parents[2] / "spm" / "unigram" / "unigram5000.model",
    ]
    if args.sp_model_path:
        candidates = [Path(args.sp_model_path)]
    found = next((path for path in candidates if path.is_file()), None)
    args.noise_file = [str(Path(name).resolve()) for name in args.noise_file or []] or None
    if found is None and DECODERS[args.decoder].pretrained and not args.sp_model_path:
        return
    if found is None:
        parser.error(
            f"no SentencePiece model at {' or '.join(map(str, candidates))}: give --sp-model-path, "
            "or train one with python -m datamodule.train_tokenizer"
        )
    args.sp_model_path = str(found.resolve())
    if args.dict_path is None:
        units = found.with_name(f"{found.stem}_units.txt")
        args.dict_path = str(units.resolve()) if units.is_file() else None


def save_config(args: Namespace, path: Path, versions: dict[str, str]) -> None:
    """Writes every option, resolved, and the versions of what ran it.

    Args:
        args: Options.
        path: File to write.
        versions: Package versions.
    """
    config = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in sorted(vars(args).items())
    }
    path.write_text(yaml.safe_dump({**config, "versions": versions}, sort_keys=False))


def load_config(checkpoint: str) -> dict[str, Any]:
    """Reads the options of the run that a checkpoint belongs to.

    Args:
        checkpoint: Path of the checkpoint.

    Returns:
        The options in the config.yaml beside it; empty if there is none.

    Raises:
        ValueError: If the file holds something else.
    """
    path = Path(checkpoint).with_name("config.yaml")
    if not path.is_file():
        return {}
    try:
        config = yaml.safe_load(path.read_text())
    except yaml.YAMLError:
        config = None
    if not isinstance(config, dict):
        raise ValueError(f"{path} is no list of options: restore it, or move it away")
    return config
