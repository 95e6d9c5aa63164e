"""The options of a run: completed, kept in its folder, and read back to score its checkpoints."""

import hashlib
from argparse import ArgumentParser
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from datamodule.options import DataOptions
from espnet.nets.model_options import ModelOptions
from espnet.nets.search_options import SearchOptions
from espnet.option_tree import changed, flag, from_flat, names, to_flat
from espnet.utils.options import Options, train_parser

CHECKPOINTS = ("vision_encoder_name", "audio_encoder_name", "decoder_name")
VOCABULARY_PATHS = ("sp_model_path", "dict_path")
PATHS = (*CHECKPOINTS, *VOCABULARY_PATHS)
DECIDING = {"test_file", "crop_size", "noise_file", "seed"}  # of the data, what is decoded
BLOCK = 1 << 22  # bytes of a checkpoint that are read at once
FIXED = {"optimizer"}  # for a whole training
# What says nothing of the training that is resumed.
MAY_DIFFER = {
    *("ckpt_path", "exp_dir", "exp_name", "group_name", "logger", "save_minutes", "slurm_job_id"),
    *("debug", "num_workers", "probe_batch", "pretrained_model_path"),
}


def parse_eval_args(
    parser: ArgumentParser, argv: list[str] | None = None
) -> tuple[Options, str | None]:
    """Parses eval.py's command line over the options of the checkpoint's run.

    What neither gives has train.py's default. The run's hardware, and the noise levels that it
    was scored at, are not inherited.

    Returns:
        Options, whose modality is what the model was trained for, None if nothing tells; and the
        modality to score.
    """
    inherited = names(ModelOptions) | names(SearchOptions) | names(DataOptions) | {"normalize"}
    inherited -= {"skip_bad_clips"}  # That of a training says nothing of a test list.
    given = parser.parse_args(argv)
    try:
        config = load_config(given.pretrained_model_path) if given.pretrained_model_path else {}
    except ValueError as error:
        parser.error(str(error))
    run = {name: value for name, value in config.items() if name in inherited and value is not None}
    for name in run.keys() & set(PATHS):  # Those of an exported model are relative to its folder.
        folder = Path(given.pretrained_model_path).parent
        found = folder / run[name]
        if name in VOCABULARY_PATHS and (folder / found.name).exists():
            found = folder / found.name  # The run's own copy: the other may have been made anew.
        if found.exists():
            run[name] = str(found.resolve())
    if config and "whisper_margin" not in config and not config.get("whisper_pad_30s"):
        run["whisper_margin"] = 0.0  # The run is older than the option.
    if given.whisper_pad_30s or given.whisper_margin is not None:
        run = {name: run[name] for name in run.keys() - {"whisper_pad_30s", "whisper_margin"}}
    if given.ctc_decode_weight is not None:  # The run's followed from another weight.
        run.pop("stop_repeats", None)
    if given.sp_model_path:  # The run's units belong to its own model.
        run.pop("dict_path", None)
    for name in ("sp_model_path", "dict_path", "noise_file"):  # The run may come from elsewhere.
        paths = run.get(name, [])
        if not all(Path(path).is_file() for path in ([paths] if isinstance(paths, str) else paths)):
            del run[name]
    parser.set_defaults(**run)
    values = {**vars(train_parser().parse_args([])), **run, **vars(parser.parse_args(argv))}
    options = from_flat(Options, values)
    modality = options.model.encoders.modality
    if "modality" not in config:
        modality = options.model.encoders.resolved().modality
    return changed(options, modality=config.get("modality", modality)), modality


def completed(options: Options) -> Options:
    """Fills in all that follows from what was given, which is free of contradictions.

    Checkpoints in folders get their whole paths.
    """
    model = options.model.resolved()
    given = {name: value for name, value in to_flat(model).items() if name in CHECKPOINTS and value}
    folders = {name: str(Path(v).resolve()) for name, v in given.items() if Path(v).is_dir()}
    model = changed(model, **folders)
    return replace(options, model=model, search=options.search.resolved(model))


def find_vocabulary(options: Options, parser: ArgumentParser) -> Options:
    """Fills in the paths of the SentencePiece model and its units, or ends with an error.

    A pretrained decoder has a vocabulary of its own; it needs the model only for lists of ids.
    """
    data = options.data
    noise = tuple(str(Path(name).resolve()) for name in data.noise_file or ()) or None
    candidates = [
        Path(data.root_dir) / "spm" / "unigram.model",
        Path(__file__).parents[2] / "spm" / "unigram" / "unigram5000.model",
    ]
    if data.sp_model_path:
        candidates = [Path(data.sp_model_path)]
    found = next((path for path in candidates if path.is_file()), None)
    if found is None and options.model.decoder.choice.pretrained and not data.sp_model_path:
        return replace(options, data=replace(data, noise_file=noise))
    if found is None:
        parser.error(
            f"no SentencePiece model at {' or '.join(map(str, candidates))}: give --sp-model-path, "
            "or train one with python -m datamodule.train_tokenizer"
        )
    units = found.with_name(f"{found.stem}_units.txt")
    beside = str(units.resolve()) if units.is_file() else None
    data = replace(
        data,
        noise_file=noise,
        sp_model_path=str(found.resolve()),
        dict_path=data.dict_path or beside,
    )
    return replace(options, data=data)


def decoding_settings(options: Options) -> dict[str, Any]:
    """What the hypotheses of a checkpoint depend on, beside the noise and the streams."""
    deciding = names(ModelOptions) | names(SearchOptions) | DECIDING
    settings = {name: value for name, value in to_flat(options).items() if name in deciding}
    checkpoint = options.training.pretrained_model_path
    if checkpoint:
        digest = hashlib.sha256()
        with open(checkpoint, "rb") as file:
            while block := file.read(BLOCK):
                digest.update(block)
        settings["checkpoint"] = digest.hexdigest()[:16]
    return settings


def save_config(values: Mapping[str, Any], path: Path, versions: Mapping[str, str]) -> None:
    """Writes every option by name, resolved, and the versions of the packages that ran it."""
    config = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in sorted(values.items())
    }
    path.write_text(yaml.safe_dump({**config, "versions": dict(versions)}, sort_keys=False))


def resumed_from(
    options: Options, checkpoint: str, content: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The history of a run that is resumed: from what, where, and with what other options.

    Args:
        options: Of the command line that resumes.
        checkpoint: Path that it resumes from.
        content: Of the checkpoint.

    Returns:
        What the config.yaml beside the checkpoint has under `resumed`, and this time.

    Raises:
        ValueError: If an option differs that cannot change in the middle of a training.
    """
    config, now = load_config(checkpoint), to_flat(options)
    differs = {
        name: [config[name], list(value) if isinstance(value, tuple) else value]
        for name, value in now.items()
        if name in config and name not in MAY_DIFFER
    }
    differs = {name: pair for name, pair in differs.items() if pair[0] != pair[1]}
    for name in FIXED & differs.keys():
        before, given = differs[name]
        raise ValueError(
            f"{flag(name)} {given}, but {checkpoint} was trained with {before}: resume with that, "
            "or start anew from its weights with --pretrained-model-path"
        )
    place = {"checkpoint": checkpoint, "epoch": content["epoch"], "step": content["global_step"]}
    return [*config.get("resumed", []), {**place, "changed": differs}]


def load_config(checkpoint: str) -> dict[str, Any]:
    """Reads the options in the config.yaml beside a checkpoint; empty if there is none.

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
