"""Checks of a whole command line, so that all its problems are named at once."""

from pathlib import Path

from datamodule.options import DataOptions
from espnet.nets.adaptation import INSTALLED, install_command
from espnet.nets.decoders import are_one
from espnet.nets.model_options import ModelOptions, model_problems
from espnet.nets.search_options import search_problems
from espnet.utils.options import Options


def training_problems(options: Options) -> list[str]:
    """What is wrong with train.py's options as they were given, a sentence a problem."""
    problems = []
    run, data, training = options.run, options.data, options.training
    modality = options.model.encoders.resolved().modality
    required = {
        "--exp-name": run.exp_name,
        "--modality (or --vision-encoder, --audio-encoder)": modality,
        "--root-dir": data.root_dir,
        "--train-file": data.train_file,
    }
    missing = [flag for flag, value in required.items() if not value]
    if missing:
        problems.append(f"{' and '.join(missing)} must be given (or --demo)")
    problems += _data_problems(data, {"--train-file": data.train_file, "--val-file": data.val_file})
    if modality:
        problems += model_problems(options.model)
    problems += search_problems(options.search, options.model)
    path = training.pretrained_model_path
    transfers = (training.transfer_frontend, training.transfer_encoder, training.transfer_all)
    if any(transfers) and not path:
        problems.append(
            "--transfer-frontend, --transfer-encoder and --transfer-all need "
            "--pretrained-model-path to take weights from"
        )
    if path and not Path(path).is_file():
        problems.append(f"--pretrained-model-path {path} does not exist")
    if run.ckpt_path not in (None, "last") and not Path(run.ckpt_path).is_file():
        problems.append(f"--ckpt-path {run.ckpt_path} does not exist: give a file, or 'last'")
    problems += _adaptation_source_problems(options)
    if training.optimizer == "adamw8bit" and "bitsandbytes" not in INSTALLED:
        problems.append(
            "--optimizer adamw8bit needs bitsandbytes, but it is not installed: "
            f"{install_command('bitsandbytes')}"
        )
    if training.ctc_first_epochs and not options.model.ctc_share:
        problems.append(
            f"--ctc-first-epochs {training.ctc_first_epochs}, but CTC has no share of the loss: "
            "give --ctc-weight, or --llama-prefix-ctc"
        )
    if training.warmup_epochs > training.max_epochs:
        problems.append(
            f"--warmup-epochs {training.warmup_epochs:g} is more than --max-epochs "
            f"{training.max_epochs}: the rate would never reach --lr"
        )
    return problems


def evaluation_problems(options: Options, modality: str | None) -> list[str]:
    """What is wrong with eval.py's options; as for `checkpoint_problems`."""
    data = options.data
    problems = [] if data.root_dir else ["--root-dir must be given"]
    problems += _data_problems(data, {"--test-file": data.test_file})
    return checkpoint_problems(options, modality) + problems


def checkpoint_problems(options: Options, modality: str | None) -> list[str]:
    """What is wrong with the options of a model that is to be loaded, a sentence a problem.

    The options' modality is what the model was trained for, None if nothing tells; `modality` is
    what is to be scored: the streams of the model, or one of them.
    """
    path = options.training.pretrained_model_path
    model = options.model
    trained_for = model.encoders.modality
    problems = []
    if path is None:
        problems += _untrained_problems(model)
    elif not Path(path).is_file():
        problems.append(f"--pretrained-model-path {path} does not exist")
    elif not trained_for:
        problems.append(
            f"no config.yaml beside {path} tells its modality: give --modality, and the model "
            "options that differ from auto_avsr's"
        )
    elif modality != trained_for and trained_for != "audiovisual":
        problems.append(f"--modality {modality}, but {path} is a model of {trained_for}")
    elif modality != trained_for and not any(model.modality_dropout):
        problems.append(
            f"--modality {modality}, but {path} was trained without --modality-dropout and "
            "needs both streams"
        )
    if trained_for:
        problems += model_problems(model)
    return problems + search_problems(options.search, model)


def _untrained_problems(model: ModelOptions) -> list[str]:
    """What stands in the way of scoring a model that has not been trained: a published Whisper."""
    encoders = model.encoders.resolved()
    if encoders.modality != "audio" or not are_one(encoders, model.decoder):
        return [
            "--pretrained-model-path must be given: only a published Whisper, --audio-encoder "
            "whisper --decoder whisper, is scored without training"
        ]
    given = {
        "--elayers": model.elayers,
        "--adim": model.adim,
        "--ctc-weight": model.ctc_weight,
        "--encoder-layer": None if encoders.encoder_layer == -1 else encoders.encoder_layer,
    }
    return [
        f"{flag} {value} without --pretrained-model-path would score random weights: leave it out"
        for flag, value in given.items()
        if value
    ]


def _data_problems(data: DataOptions, lists: dict[str, str | None]) -> list[str]:
    if not data.root_dir:
        return []
    if not Path(data.root_dir).is_dir():
        return [f"--root-dir {data.root_dir} does not exist: give the folder of labels/"]
    paths = {
        f"{flag} {name}": Path(data.root_dir) / "labels" / name
        for flag, name in lists.items()
        if name
    }
    noises = {f"--noise-file {name}": Path(name) for name in data.noise_file or ()}
    paths |= {what: path for what, path in noises.items() if not path.is_dir()}
    return [
        f"{what} does not exist: looked for {path}"
        for what, path in paths.items()
        if not path.is_file()
    ]


def _adaptation_source_problems(options: Options) -> list[str]:
    """Adapters on weights that are random and stay so would learn next to nothing."""
    run, training, adaptation = options.run, options.training, options.model.adaptation
    if not adaptation.enabled:
        return []
    last = Path(run.exp_dir) / str(run.exp_name) / "last.ckpt"
    if run.ckpt_path and (run.ckpt_path != "last" or last.is_file()):
        return []  # What is resumed has them.
    path, only_encoder = training.pretrained_model_path, training.transfer_encoder
    if path and (training.transfer_all or not (training.transfer_frontend or only_encoder)):
        return []
    random = {"encoder"} if options.model.decoder.choice.pretrained else {"encoder", "decoder"}
    if path and only_encoder:
        random.remove("encoder")
    return [
        f"--qlora-parts {part} freezes weights that are random: give the checkpoint that they come "
        "from, --pretrained-model-path"
        for part in adaptation.qlora_parts or ()
        if part in random
    ]
