import pytest
import yaml

from espnet.option_tree import from_flat
from espnet.utils.options import Options, eval_parser, train_parser
from espnet.utils.run_config import find_vocabulary, load_config, parse_eval_args, save_config


def test_config_is_read_back_and_flags_override_it(tmp_path):
    given = ["--modality", "audiovisual", "--adim", "32", "--aheads", "4", "--beam-size", "7"]
    given += ["--gpus", "8", "--accelerator", "gpu", "--decode-snr-target", "5"]
    save_config(vars(train_parser().parse_args(given)), tmp_path / "config.yaml", {"torch": "2"})
    checkpoint = str(tmp_path / "model_avg_10.pth")
    assert load_config(checkpoint)["adim"] == 32
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["versions"] == {"torch": "2"}
    argv = ["--pretrained-model-path", checkpoint, "--beam-size", "9", "--modality", "audio"]
    options, modality = parse_eval_args(eval_parser(), argv)
    model = options.model
    assert (model.adim, model.aheads, options.search.beam_size) == (32, 4, 9)
    assert (modality, model.encoders.modality) == ("audio", "audiovisual")
    # Hardware and noise levels of the training run are not this run's.
    assert (options.hardware.gpus, options.hardware.accelerator) == (None, "auto")
    assert options.scoring.decode_snr_target == (999999,)


def test_vocabulary_is_found_or_asked_for(tmp_path, capsys):
    parser = train_parser()
    options = from_flat(Options, {"root_dir": str(tmp_path)})
    with pytest.raises(SystemExit):
        find_vocabulary(options, parser)
    assert "give --sp-model-path, or train one with" in capsys.readouterr().err
    model = tmp_path / "spm" / "unigram.model"
    model.parent.mkdir()
    model.touch()
    data = find_vocabulary(options, parser).data
    assert (data.sp_model_path, data.dict_path) == (str(model), None)
    (tmp_path / "spm" / "unigram_units.txt").touch()
    data = find_vocabulary(options, parser).data
    assert data.dict_path == str(tmp_path / "spm" / "unigram_units.txt")


@pytest.mark.parametrize(
    ("run", "given", "expected"),
    [
        ({"whisper_margin": 2.0}, [], (2.0, False)),
        ({"whisper_margin": 2.0}, ["--whisper-margin", "5"], (5.0, False)),
        ({"whisper_margin": 2.0, "whisper_pad_30s": False}, ["--whisper-pad-30s"], (None, True)),
        ({"whisper_margin": 30.0, "whisper_pad_30s": True}, ["--whisper-margin", "1"], (1, False)),
        ({"whisper_pad_30s": False}, [], (0.0, False)),  # Older runs had no silence.
        ({}, [], (0.0, False)),
        ({"whisper_pad_30s": True}, [], (None, True)),
    ],
)
def test_silence_after_utterances_is_the_runs_unless_told_otherwise(tmp_path, run, given, expected):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"modality": "audio", **run}))
    argv = ["--pretrained-model-path", str(tmp_path / "model.pth"), *given]
    options, _ = parse_eval_args(eval_parser(), argv)
    encoders = options.model.encoders
    assert (encoders.whisper_margin, encoders.whisper_pad_30s) == expected
