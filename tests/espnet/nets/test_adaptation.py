"""Which parts adapters can train: defaults, and what does not fit together."""

import subprocess
import sys
from pathlib import Path

import pytest

from espnet.nets import adaptation
from espnet.nets.adaptation import AdaptationOptions, adaptation_problems, install_command
from espnet.nets.decoders import DecoderOptions
from espnet.nets.encoders import EncoderOptions

CLIP_WHISPER = {"vision_encoder": "clip", "audio_encoder": "whisper"}
RESNETS = {"vision_encoder": "resnet", "audio_encoder": "resnet1d"}
LLAMA = {"decoder": "llama"}


def resolve(modality, encoders, decoder):
    encoders = EncoderOptions(modality=modality, **encoders).resolved()
    return encoders, DecoderOptions(**decoder).resolved()


def problems_of(options, modality="audiovisual", encoders=RESNETS, decoder=None, elayers=12):
    parts = resolve(modality, encoders, decoder or {})
    options = AdaptationOptions(**options)
    problems = adaptation_problems(options, *parts, elayers)
    # What a user gave and what follows from it have the same problems.
    assert adaptation_problems(options.resolved(*parts), *parts, elayers) == problems
    return problems


@pytest.mark.parametrize("how", ["use_qlora", "use_lora"])
@pytest.mark.parametrize(
    ("modality", "encoders", "decoder", "expected"),
    [
        ("audiovisual", CLIP_WHISPER, LLAMA, ("vision", "audio", "decoder")),
        ("audiovisual", CLIP_WHISPER, {}, ("vision", "audio")),
        ("audiovisual", {"audio_encoder": "wavlm"}, {"decoder": "whisper"}, ("audio", "decoder")),
        ("video", {"vision_encoder": "vit"}, {}, ("vision",)),
        ("audio", {}, LLAMA, ("decoder",)),
    ],
)
def test_every_pretrained_part_is_adapted_by_default(how, modality, encoders, decoder, expected):
    assert problems_of({how: True}, modality, encoders, decoder) == []
    parts = resolve(modality, encoders, decoder)
    assert AdaptationOptions(**{how: True}).resolved(*parts).qlora_parts == expected
    named = AdaptationOptions(**{how: True}, qlora_parts=("encoder",))
    assert named.resolved(*parts).qlora_parts == ("encoder",)
    assert AdaptationOptions().resolved(*parts) == AdaptationOptions()


@pytest.mark.parametrize(
    ("options", "others"),
    [
        ({}, {}),
        ({"use_qlora": True, "qlora_parts": ("encoder", "decoder")}, {}),
        (
            {"use_lora": True, "qlora_parts": ("vision",)},
            {"encoders": {**CLIP_WHISPER, "freeze_audio_encoder": False}, "elayers": 0},
        ),
        (
            {"use_lora": True, "qlora_parts": ("decoder",)},
            {"encoders": {**CLIP_WHISPER, "unfreeze_last_layers": 1}, "decoder": LLAMA},
        ),
        (
            {"use_qlora": True},
            {"encoders": {**CLIP_WHISPER, "freeze_audio_encoder": True}, "decoder": LLAMA},
        ),
    ],
)
def test_what_fits_together(options, others):
    assert problems_of(options, **others) == []


PRETRAINED = {"encoders": CLIP_WHISPER, "decoder": LLAMA}
FREEZES = "contradicts --use-qlora, which freezes the weights that it adapts: leave one out, or "


@pytest.mark.parametrize(
    ("options", "others", "expected"),
    [
        (
            {"qlora_parts": ("vision", "audio"), "lora_targets": ("q_proj",)},
            PRETRAINED,
            [
                "--qlora-parts vision audio needs --use-qlora or --use-lora",
                "--lora-targets q_proj needs --use-qlora or --use-lora",
            ],
        ),
        (
            {"use_qlora": True, "use_lora": True},
            PRETRAINED,
            ["--use-qlora and --use-lora contradict each other: leave one out"],
        ),
        (
            {"use_lora": True},
            {},
            [
                "--use-lora adapts pretrained parts, but there is none: leave it out, or name "
                "parts that start from --pretrained-model-path (--qlora-parts encoder decoder)"
            ],
        ),
        (
            {"use_qlora": True, "qlora_parts": ("vision", "text")},
            PRETRAINED,
            ["--qlora-parts text is unknown: choose one of vision, audio, encoder, decoder"],
        ),
        (
            {"use_qlora": True, "qlora_parts": ("vision", "audio")},
            {},
            [
                "--qlora-parts vision needs a pretrained --vision-encoder, got resnet",
                "--qlora-parts audio needs a pretrained --audio-encoder, got resnet1d",
            ],
        ),
        (
            {"use_qlora": True, "qlora_parts": ("vision", "audio")},
            {"modality": "audio", "encoders": {"audio_encoder": "whisper"}},
            ["--qlora-parts vision needs a pretrained --vision-encoder, got none"],
        ),
        (
            {"use_qlora": True, "qlora_parts": ("audio", "encoder")},
            {**PRETRAINED, "elayers": 0},
            ["--qlora-parts encoder, but --elayers 0 leaves the encoder out"],
        ),
        *(
            (
                {"use_qlora": True},
                {"encoders": {**CLIP_WHISPER, f"freeze_{word}_encoder": False}},
                [f"--no-freeze-{word}-encoder {FREEZES}name other --qlora-parts"],
            )
            for word in ("vision", "audio")
        ),
        (
            {"use_qlora": True},
            {"decoder": {**LLAMA, "freeze_decoder": False}},
            [f"--no-freeze-decoder {FREEZES}name other --qlora-parts"],
        ),
        (
            {"use_lora": True},
            {"encoders": {**CLIP_WHISPER, "unfreeze_last_layers": 2}},
            [
                "--unfreeze-last-layers 2 contradicts --use-lora on encoders: leave one out, or "
                "name other --qlora-parts"
            ],
        ),
    ],
)
def test_what_does_not_fit_together(options, others, expected):
    assert problems_of(options, **others) == expected


@pytest.mark.parametrize(
    ("how", "missing", "expected"),
    [
        ("qlora", {"peft", "bitsandbytes"}, ["peft", "bitsandbytes"]),
        ("qlora", {"bitsandbytes"}, ["bitsandbytes"]),
        ("lora", {"bitsandbytes"}, []),
        ("lora", {"peft"}, ["peft"]),
    ],
)
def test_missing_packages_are_named_with_the_command(monkeypatch, how, missing, expected):
    monkeypatch.setattr(adaptation, "INSTALLED", {"peft", "bitsandbytes"} - missing)
    assert problems_of({}, **PRETRAINED) == []
    assert problems_of({f"use_{how}": True}, **PRETRAINED) == [
        f"--use-{how} needs {package}, but it is not installed: {install_command(package)}"
        for package in expected
    ]
    assert install_command("peft").startswith('pip install -U "peft>=')


def test_nothing_heavy_is_imported():
    code = "import sys, espnet.nets.adaptation; sys.exit('torch' in sys.modules)"
    root = Path(__file__).parents[3]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
