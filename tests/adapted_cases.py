"""Recognisers with adapters on tiny checkpoints, and what they take."""

import shutil
from functools import cache

import torch
from safetensors.torch import load_file, save_file

from datamodule.pretrained_text_transform import llama_text_transform, whisper_text_transform
from espnet.nets.pytorch_backend.e2e_asr_conformer import E2E
from espnet.nets.search import build_beam_search
from espnet.nets.search_options import SearchOptions

SIZES = {  # multiples of 64, so that the project's own layers can be quantised
    "adim": 64,
    "aheads": 2,
    "eunits": 64,
    "elayers": 1,
    "dunits": 64,
    "dlayers": 1,
    "cnn_module_kernel": 7,
    "video_width": 2,
    "audio_width": 2,
    "dropout_rate": 0.0,
    "ctc_weight": 0.3,
    "lora_rank": 4,
    "lora_dropout": 0.0,
}
CLIP_WHISPER = {"vision_encoder": "clip", "audio_encoder": "whisper"}
CASES = {
    "clip_whisper_llama": {**CLIP_WHISPER, "decoder": "llama", "llama_cross_every": 2},
    "vit_wavlm_whisper": {
        "vision_encoder": "vit",
        "audio_encoder": "wavlm",
        "decoder": "whisper",
        "whisper_gated_video": True,
    },
    "whisper_llama_prefix": {
        "modality": "audio",
        "audio_encoder": "whisper",
        "decoder": "llama",
        "llama_conditioning": "prefix",
    },
    "one_of_three": {**CLIP_WHISPER, "decoder": "whisper", "qlora_parts": ("vision",)},
    "own_parts": {"modality": "video", "qlora_parts": ("encoder", "decoder")},
    "own_encoder": {**CLIP_WHISPER, "qlora_parts": ("audio", "encoder")},
}
CLIP, WHISPER = "video_frontend.backbone.", "audio_frontend.backbone."
ADAPTED = {  # beginnings of the names of what is frozen but for its adapters
    "clip_whisper_llama": (CLIP, WHISPER, "decoder.backbone."),
    "vit_wavlm_whisper": (CLIP, WHISPER, "decoder.backbone."),
    "whisper_llama_prefix": (WHISPER, "decoder.backbone."),
    "one_of_three": (CLIP,),
    "own_parts": ("encoder.", "decoder."),
    "own_encoder": (WHISPER, "encoder."),
}
FROZEN = {  # of what is frozen and has no adapters either
    "one_of_three": (WHISPER, "decoder.backbone."),
    "own_encoder": (CLIP,),
}
FRAMES = [7, 5]
ODIM = 30  # of the project's own decoder


@cache
def transform_of(folder, decoder):
    if decoder == "llama":
        return llama_text_transform(str(folder / "llama"), prompt="write:", text_case="lower")
    whisper = str(folder / "whisper")
    return whisper_text_transform(whisper, language=None, task="transcribe", text_case="lower")


def make(folder, case, **options):
    """A model of a case, alike each time; its parts are adapted if an option says so."""
    options = {"modality": "audiovisual", **SIZES, **CASES[case], **options}
    if not (options.get("use_qlora") or options.get("use_lora")):
        options = {k: v for k, v in options.items() if "lora" not in k}
    odim = ODIM
    if (decoder := options.get("decoder")) is not None:
        transform = transform_of(folder, decoder)
        odim = transform.odim
        options |= {name: getattr(transform, name) for name in ("sos", "eos", "prompt")}
        options["special_tokens"] = transform.special_tokens
    for word in ("vision_encoder", "audio_encoder", "decoder"):
        if word in options:
            options.setdefault(f"{word}_name", str(folder / options[word]))
    torch.manual_seed(0)
    return E2E.from_keywords(odim, **options)


def batch(model, seed=1):
    """Two utterances of different length, with targets."""
    generator = torch.Generator().manual_seed(seed)
    x = {
        "video": torch.randn(2, max(FRAMES), 1, 24, 24, generator=generator),
        "audio": torch.randn(2, 640 * max(FRAMES), 1, generator=generator),
    }
    lengths = {"video": torch.tensor(FRAMES), "audio": 640 * torch.tensor(FRAMES)}
    targets = torch.tensor([[5, 9, 7, 5], [8, 6, -1, -1]])
    return {s: x[s] for s in model.streams}, {s: lengths[s] for s in model.streams}, targets


@torch.no_grad()
def outputs(model):
    """What a model in eval mode gives: memory, losses, scores and tokens of its search."""
    model.eval()
    x, lengths, targets = batch(model)
    encoded = model.encode(x, lengths)
    options = SearchOptions(beam_size=3, ctc_decode_weight=0.3, max_dec_tokens=4)
    search = build_beam_search(model, options, [str(i) for i in range(model.odim)])
    found = [hypothesis for hypotheses in search(*encoded) for hypothesis in hypotheses]
    return [
        *(encoded.memory, *model.losses(encoded, targets)),
        *(torch.tensor([hypothesis.score]) for hypothesis in found),
        *(hypothesis.yseq for hypothesis in found),
    ]


def assert_same(one, two):
    for first, second in zip(one, two, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=0)


def adapters(model):
    return {name: p for name, p in model.named_parameters() if ".lora_" in name}


def disturb(model, seed=2, std=0.1):
    """Gives adapters updates, which are zero at first, and the other trained weights noise."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += noise * (std if "lora_B" in name else 0.01)
    return model


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(before, after):
    """Names of the entries of a state dict that differ, bit for bit."""
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def other_values(source, target):
    """The same checkpoint with other matrices; norms and biases stay, as at the start."""
    shutil.copytree(source, target)
    weights = load_file(source / "model.safetensors")
    for weight in weights.values():
        weight += 0.01 * torch.randn_like(weight) * (weight.dim() > 1)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
