import pytest
import torch

from espnet.nets.pytorch_backend.e2e_asr_conformer import E2E
from espnet.option_tree import from_flat
from espnet.utils.building import build_model, build_text_transform, most_tokens
from espnet.utils.options import Options
from espnet.utils.run_config import completed


@pytest.mark.parametrize(
    ("decoder", "more"),
    [
        ("whisper", {"audio_encoder": "whisper"}),
        ("llama", {"audio_encoder": "resnet1d"}),
        ("llama", {"audio_encoder": "resnet1d", "llama_conditioning": "prefix"}),
        ("llama", {"audio_encoder": "wavlm", "llama_conditioning": "prefix", "frame_rate": 50}),
    ],
)
def test_most_tokens_are_those_that_the_decoder_takes(tiny_checkpoints, decoder, more):
    names = {"decoder_name": str(tiny_checkpoints / decoder)}
    if more["audio_encoder"] != "resnet1d":
        names["audio_encoder_name"] = str(tiny_checkpoints / more["audio_encoder"])
    given = {"modality": "audio", "decoder": decoder, "adim": 8, "aheads": 2, "eunits": 8}
    given |= {"elayers": 0 if decoder == "whisper" else 1, **names, **more}
    options = completed(from_flat(Options, given))
    transform = build_text_transform(options.model.decoder, options.data)
    model: E2E = build_model(options.model, transform)
    found = most_tokens(options.model, transform)
    for frames in (1, 7, 50):
        memory = int(model.output_lengths({"audio": torch.tensor([640 * frames])}))
        margin = model.margin
        assert found(frames) == model.decoder.max_tokens(memory - margin)


def test_a_transformer_takes_texts_of_any_length():
    options = from_flat(Options, {"modality": "audio"})
    assert most_tokens(options.model, None) is None
