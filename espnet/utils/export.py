"""Makes a stand-alone model of a run: adapters merged, full precision, with all that it loads.

python -m espnet.utils.export exp/qlora OUT
python eval.py --pretrained-model-path OUT/model.pth --root-dir DATA --test-file test.csv
"""

import shutil
from argparse import ArgumentParser
from pathlib import Path
from typing import TYPE_CHECKING

from espnet.errors import one_line
from espnet.option_tree import changed
from espnet.utils.option_checks import checkpoint_problems
from espnet.utils.options import OneLineParser, eval_parser
from espnet.utils.run_config import (
    completed,
    find_vocabulary,
    load_config,
    parse_eval_args,
    save_config,
)

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from espnet.nets.pytorch_backend.e2e_asr_conformer import E2E

FOLDERS = {
    "video_frontend.backbone": "vision_encoder",
    "audio_frontend.backbone": "audio_encoder",
    "decoder.backbone": "decoder",
}
WHISPER = {"audio_frontend.backbone", "decoder.backbone"}  # both of one checkpoint, perhaps
WHISPER_FOLDER = "whisper"
SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja")  # tokenizers, image processors
# What an exported model need not know of its training.
FORGOTTEN = {
    "use_qlora": False,
    "use_lora": False,
    "qlora_parts": None,
    "lora_targets": None,
    "freeze_vision_encoder": None,
    "freeze_audio_encoder": None,
    "freeze_decoder": None,
    "decoder_dtype": "auto",
    "unfreeze_last_layers": 0,
}
# Of the machine that it was trained on.
PLACES = (
    "exp_dir",
    "exp_name",
    "root_dir",
    "ckpt_path",
    "pretrained_model_path",
    "noise_file",
    "slurm_job_id",
)


def export(run: Path, out: Path, parser: ArgumentParser) -> list[Path]:
    """Exports the model of a run, or of one of its checkpoints, and returns what was written.

    `out` gets `config.yaml`, `model.pth`, the SentencePiece model if there is one, and a folder
    that transformers can load for each pretrained part; one for both where encoder and decoder are
    of one Whisper. The parser ends with an error for options that contradict each other.

    Raises:
        ValueError: If `out` is not empty, or there is no checkpoint, or it cannot be loaded.
    """
    checkpoint = find_checkpoint(run)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists: give a new or an empty folder to write to")
    words = ["--pretrained-model-path", str(checkpoint), "--root-dir", str(checkpoint.parent)]
    options, modality = parse_eval_args(eval_parser(), words)
    if problems := checkpoint_problems(options, modality):
        parser.error("; ".join(problems))
    options = find_vocabulary(completed(changed(options, decoder_dtype="float32")), parser)

    from espnet.nets.pytorch_backend.qlora_utils import merge_lora
    from espnet.utils.building import build_model, build_text_transform
    from espnet.utils.checkpoint import load_model, load_weights, trained_content
    from espnet.utils.recovery.checkpoint_io import save_whole
    from espnet.utils.trainer import set_up_logging

    set_up_logging(debug=False)
    # Merged weights are in full precision: a GPU may have held them in 4 bits only.
    transform = build_text_transform(options.model.decoder, options.data)
    model = build_model(options.model, transform).cpu()
    load_model(model, checkpoint)
    merge_lora(model)
    out.mkdir(parents=True, exist_ok=True)
    config = {**load_config(str(checkpoint)), **FORGOTTEN}
    config = {name: value for name, value in config.items() if name not in PLACES}
    versions = config.pop("versions", {})
    folders = export_bases(model, out)
    own = model.state_dict()
    for part, folder in folders.items():
        config[f"{FOLDERS[part]}_name"] = folder
        own = {name: value for name, value in own.items() if not name.startswith(f"{part}.")}
    for name in ("sp_model_path", "dict_path"):
        if path := getattr(options.data, name):
            config[name] = Path(shutil.copy(path, out)).name
    save_config(config, out / "config.yaml", versions)

    weights = out / "model.pth"
    words[1] = str(weights)
    options = completed(parse_eval_args(eval_parser(), words)[0])
    del model  # Large ones need not be in memory twice.
    exported = build_model(options.model, transform)
    load_weights(exported, own, checkpoint)
    save_whole(trained_content(exported), weights)
    return sorted(out.iterdir())


def find_checkpoint(run: Path) -> Path:
    """The averaged weights of a run, or the checkpoint itself."""
    if not run.is_dir():
        if not run.is_file():
            raise ValueError(f"{run} does not exist: give the folder of a run, or a checkpoint")
        return run
    averages = sorted(run.glob("model_avg_*.pth"), key=lambda path: path.stat().st_mtime)
    if not averages:
        raise ValueError(
            f"{run} holds no model_avg_N.pth: name one of its checkpoints, {run}/last.ckpt say"
        )
    return averages[-1]


def export_bases(model: "E2E", out: Path) -> dict[str, str]:
    """Writes each pretrained part as transformers would: whole, with the weights that it has now.

    The model is merged; layers that are not used may have been cut off.

    Returns:
        The folder in `out` of each part, by its name in the model.
    """
    from transformers import WhisperForConditionalGeneration

    from espnet.nets.pytorch_backend.pretrained import bases

    parts = bases(model)
    names = {parts[part].name for part in WHISPER if part in parts}
    is_whisper = parts.keys() >= WHISPER and len(names) == 1
    folders = {
        part: WHISPER_FOLDER if is_whisper and part in WHISPER else FOLDERS[part] for part in parts
    }
    if is_whisper:
        fold_projection(model)
        (name,) = names
        whole = WhisperForConditionalGeneration.from_pretrained(name, dtype="float32")
        weights = model.decoder.backbone.state_dict()
        for key, value in model.audio_frontend.backbone.state_dict().items():
            weights[f"model.encoder.{key}"] = value
        write_folder(whole, weights, name, out / WHISPER_FOLDER)
    for part, folder in folders.items():
        if folder != WHISPER_FOLDER:
            backbone = model.get_submodule(part)
            weights = backbone.state_dict()
            write_folder(backbone.load_plain(), weights, backbone.base.name, out / folder)
    return folders


def fold_projection(model: "E2E") -> None:
    """Makes the projection between Whisper's encoder and decoder the identity, where it can be.

    It can if nothing but the decoder sees the memory. With a projection P, b of the memory, keys
    K (P x + b) are (K P) x and something that is the same for every frame, which attention does not
    see; values V (P x + b) + v are (V P) x and a bias V b + v.
    """
    import torch
    from torch import nn

    projection = model.proj_encoder
    between = [model.encoder, model.ctc]  # They would see another memory.
    is_identity = isinstance(model.decoder.memory_projection, nn.Identity)
    is_linear = isinstance(projection, nn.Linear)  # as that of concatenation
    square = is_linear and projection.in_features == projection.out_features
    if any(part is not None for part in between) or not is_identity or not square:
        return
    with torch.no_grad():
        for layer in model.decoder.backbone.model.decoder.layers:
            attention = layer.encoder_attn
            attention.k_proj.weight.copy_(attention.k_proj.weight @ projection.weight)
            attention.v_proj.bias += attention.v_proj.weight @ projection.bias
            attention.v_proj.weight.copy_(attention.v_proj.weight @ projection.weight)
        nn.init.eye_(projection.weight)
        nn.init.zeros_(projection.bias)


def write_folder(
    whole: "PreTrainedModel", weights: dict[str, "Tensor"], name: str, folder: Path
) -> None:
    """Writes a checkpoint with some of its weights changed.

    Args:
        whole: The checkpoint's model, in full precision.
        weights: Those that take the place of its own.
        name: Hub id or folder of the checkpoint, for its small files.
        folder: To write to.

    Raises:
        ValueError: If the checkpoint has no weight of a name.
    """
    from huggingface_hub import snapshot_download

    source = Path(name)
    if not source.is_dir():
        source = Path(snapshot_download(name, allow_patterns=list(SMALL_FILES)))
    folder.mkdir()
    for pattern in SMALL_FILES:
        for path in source.glob(pattern):
            if not path.name.endswith(".index.json"):
                shutil.copy(path, folder)
    unknown = whole.load_state_dict(weights, strict=False).unexpected_keys
    if unknown:
        raise ValueError(f"{name} has no weights {', '.join(unknown)}: they cannot be exported")
    whole.save_pretrained(folder, save_original_format=False)  # Its way back needs plain names.


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = OneLineParser(
        prog="python -m espnet.utils.export",
        description="Merge the adapters of a run and write a stand-alone model in full precision.",
    )
    parser.add_argument("run", type=Path, help="folder of the run, or one of its checkpoints")
    parser.add_argument("out", type=Path, help="folder to write; eval.py takes its model.pth")
    args = parser.parse_args(argv)
    free = not args.out.exists() or (args.out.is_dir() and not any(args.out.iterdir()))
    try:
        files = export(args.run, args.out, parser)
    except (ValueError, OSError) as error:
        if free:  # What is half written is of no use.
            shutil.rmtree(args.out, ignore_errors=True)
        parser.error(one_line(error))
    print("Exported:", *files, sep="\n  ")


if __name__ == "__main__":
    main()
