import pytest

from espnet.nets.decoders import DecoderOptions, decoder_problems


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"llama_downsample": 2}, "--llama-downsample 2 needs --decoder llama --llama-cond"),
        (
            {"decoder": "llama", "llama_downsample": 2},
            "--llama-downsample 2 needs --decoder llama --llama-conditioning prefix",
        ),
        (
            {"decoder": "llama", "llama_conditioning": "prefix", "llama_cross_every": 2},
            "--llama-cross-every 2 needs --decoder llama --llama-conditioning cross-attention",
        ),
        ({"decoder": "whisper", "llama_cross_every": 2}, "--llama-cross-every 2 needs --decoder"),
    ],
)
def test_options_of_another_decoder_are_refused(options, message):
    (problem,) = decoder_problems("audio", DecoderOptions(**options))
    assert problem.startswith(message)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"decoder": "llama", "llama_cross_every": 2},
        {"decoder": "llama", "llama_conditioning": "prefix", "llama_downsample": 2},
    ],
)
def test_options_of_the_decoder_are_taken(options):
    assert decoder_problems("audio", DecoderOptions(**options)) == []
