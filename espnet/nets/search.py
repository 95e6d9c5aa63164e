"""The search of a recogniser, from its options."""

from espnet.nets.batch_beam_search import BatchBeamSearch
from espnet.nets.pytorch_backend.e2e_asr_conformer import E2E
from espnet.nets.scorers.ctc import CTCPrefixScorer
from espnet.nets.scorers.length_bonus import LengthBonus
from espnet.nets.search_options import SearchOptions

# Most tokens of a hypothesis that is searched without CTC, if the decoder can write more: Telugu
# and Burmese may have 2 to 3 tokens a character, which is about 2 a frame. Few frames are no reason
# to stop earlier than Whisper does.
TOKENS_PER_FRAME = 4
TOKENS_ANYWAY = 448


def build_beam_search(model: E2E, options: SearchOptions, token_list: list[str]) -> BatchBeamSearch:
    """Joint CTC/attention search over a model's vocabulary.

    Args:
        model: Recogniser.
        options: What they leave open follows from the model.
        token_list: Its vocabulary, blank and eos included.

    Returns:
        The search.

    Raises:
        ValueError: If CTC is to have a share, and the model has no CTC layer.
    """
    options = options.resolved(model.options)
    ctc_weight, most = options.ctc_decode_weight, options.max_dec_tokens

    def limit(frames: int) -> int:
        usual = most or max(TOKENS_ANYWAY, TOKENS_PER_FRAME * frames)
        if ctc_weight:  # It aligns a token to a frame at least.
            usual = min(usual, frames)
        return min(usual, model.decoder.max_tokens(frames))

    # Pretrained decoders that are searched without CTC end as transformers' `generate` does.
    as_generate = model.options.decoder.choice.pretrained and not ctc_weight
    return BatchBeamSearch(
        beam_size=options.beam_size,
        vocab_size=len(token_list),
        weights={
            "decoder": 1.0 - ctc_weight,
            "ctc": ctc_weight,
            "length_bonus": options.length_bonus,
        },
        scorers={
            "decoder": model.decoder,
            "ctc": None if model.ctc is None else CTCPrefixScorer(model.ctc, model.eos),
            "length_bonus": LengthBonus(len(token_list)),
        },
        sos=model.sos,
        eos=model.eos,
        token_list=token_list,
        pre_beam_score_key=None if ctc_weight == 1.0 else "decoder",
        max_tokens=limit,
        end_when_beaten=as_generate or options.length_normalization,
        length_normalization=options.length_normalization,
        stop_repeats=options.stop_repeats,
    )
