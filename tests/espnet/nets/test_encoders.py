import json

import pytest

from espnet.nets.encoders import (
    AUDIO_ENCODERS,
    VISION_ENCODERS,
    EncoderOptions,
    encoder_problems,
    folder_problem,
    resolve_encoders,
)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((None, "clip", None), ("video", "clip", None)),
        ((None, None, "whisper"), ("audio", None, "whisper")),
        ((None, "vit", "wavlm"), ("audiovisual", "vit", "wavlm")),
        (("audio", None, None), ("audio", None, "resnet1d")),
        (("video", None, None), ("video", "resnet", None)),
        (("audiovisual", None, None), ("audiovisual", "resnet", "resnet1d")),
        (("audiovisual", None, "fbank"), ("audiovisual", "resnet", "fbank")),
        (("audiovisual", "clip", None), ("audiovisual", "clip", "resnet1d")),
        ((None, None, None), (None, None, None)),
    ],
)
def test_modality_and_encoders_follow_from_each_other(given, expected):
    assert resolve_encoders(*given) == expected


def test_resolved_options_name_checkpoints_and_freezing():
    options = EncoderOptions(vision_encoder="clip", audio_encoder="fbank").resolved()
    assert options.vision_encoder_name == "openai/clip-vit-base-patch16"
    assert options.audio_encoder_name is None
    assert options.freeze_vision_encoder is True
    assert options.freeze_audio_encoder is False
    assert options.resolved() == options
    trained = EncoderOptions(audio_encoder="wavlm", freeze_audio_encoder=False).resolved()
    assert trained.freeze_audio_encoder is False
    assert trained.freeze_vision_encoder is None


@pytest.mark.parametrize(
    ("modality", "options", "messages"),
    [
        ("video", {"audio_encoder": "whisper"}, ["--audio-encoder whisper contradicts --modality"]),
        (
            "audio",
            {"vision_encoder": "vit", "vision_encoder_name": "x/y", "freeze_vision_encoder": False},
            [
                "--vision-encoder vit contradicts --modality audio: leave one out",
                "--vision-encoder-name x/y contradicts",
                "--no-freeze-vision-encoder contradicts",
            ],
        ),
        ("video", {"vision_encoder_name": "x/y"}, ["but resnet loads no checkpoint: choose --vis"]),
        ("video", {"encoder_layer": 3}, ["--encoder-layer 3 needs a pretrained encoder"]),
        ("audio", {"encoder_layer": "weighted"}, ["--encoder-layer weighted needs a pretrained"]),
        ("audio", {"unfreeze_last_layers": 2}, ["--unfreeze-last-layers 2 needs a pretrained"]),
        (
            "audio",
            {"audio_encoder": "wavlm", "freeze_audio_encoder": False, "unfreeze_last_layers": 2},
            ["needs a pretrained encoder that is frozen"],
        ),
        ("video", {"vision_image_size": 224}, ["--vision-image-size 224 needs --vision-encoder"]),
        (
            "video",
            {"vision_pooling": "max"},
            ["--vision-pooling max is unknown: choose one"],
        ),
        ("video", {"vision_pooling": "mean"}, ["--vision-pooling mean needs --vision-encoder vit"]),
        (
            "audio",
            {"whisper_pad_30s": True, "whisper_margin": 2.0},
            [
                "--whisper-margin 2.0 needs --audio-encoder whisper",
                "--whisper-pad-30s needs --audio-encoder whisper",
                "--whisper-pad-30s contradicts --whisper-margin 2",
            ],
        ),
        ("audio", {"frame_rate": 30}, ["--frame-rate 30 is unknown: choose one of 25, 50"]),
        ("audio", {"audio_encoder": "mfcc"}, ["--audio-encoder mfcc is unknown: choose one of"]),
    ],
)
def test_contradictions(modality, options, messages):
    problems = encoder_problems(EncoderOptions(modality=modality, **options))
    assert len(problems) == len(messages)
    for problem, message in zip(problems, messages, strict=True):
        assert message in problem


@pytest.mark.parametrize("vision", VISION_ENCODERS)
@pytest.mark.parametrize("audio", AUDIO_ENCODERS)
def test_any_vision_encoder_goes_with_any_audio_encoder(vision, audio):
    options = EncoderOptions(vision_encoder=vision, audio_encoder=audio)
    assert encoder_problems(options) == []


def test_folders_are_looked_into(tmp_path):
    assert folder_problem("--x", "some/hub-id", ("vit",)) is None
    for missing in ("./gone", str(tmp_path / "gone"), "~/gone", "a/b/c"):
        assert "is no folder: give a folder with config.json" in folder_problem("--x", missing, ())
    assert "holds no readable config.json" in folder_problem("--x", str(tmp_path), ("vit",))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    problem = folder_problem("--x", str(tmp_path), ("vit",))
    remedy = "give the folder or hub id of such a checkpoint"
    assert problem == f"--x {tmp_path} is a checkpoint of clip, one of vit is expected: {remedy}"
    problem = folder_problem("--x", str(tmp_path), ("vit", "deit", "beit"))
    assert "one of vit, deit or beit is expected" in problem
    assert folder_problem("--x", str(tmp_path), ("clip", "clip_vision_model")) is None
    (tmp_path / "config.json").write_text("[]")
    assert "holds no readable config.json" in folder_problem("--x", str(tmp_path), ("vit",))
