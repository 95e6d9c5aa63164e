"""The options of the beam search, and what of them follows from the model."""

from dataclasses import dataclass, replace
from typing import ClassVar

from espnet.nets.decoders import DECODERS
from espnet.nets.model_options import ModelOptions
from espnet.option_tree import COUNT, FINITE, PROBABILITY, option, value_problems


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """How to search for the transcript; each field is a flag of that name."""

    title: ClassVar[str] = "decoding"

    beam_size: int | None = option(
        None,
        "hypotheses that are kept (default: "
        f"{', '.join(f'{name}: {choice.beam_size}' for name, choice in DECODERS.items())})",
        kind=COUNT,
    )
    ctc_decode_weight: float | None = option(
        None, "CTC's share (default: 0.1, but 0 for a model without CTC)", kind=PROBABILITY
    )
    length_bonus: float = option(0.0, "score of every token", kind=FINITE)
    length_normalization: bool = option(
        False,
        "compare hypotheses by their score per token, and end the search as transformers' generate "
        "does",
        negatable=True,
    )
    stop_repeats: bool | None = option(
        None,
        "stop hypotheses that have begun to repeat themselves (default: for pretrained decoders "
        "that are searched without CTC)",
        negatable=True,
    )
    max_dec_tokens: int | None = option(
        None,
        "most tokens of a transcript (default: as many as frames, which is the most with CTC; "
        "without CTC, as many as the decoder has positions for, but at most 448, or 4 a frame if "
        "that is more)",
        kind=COUNT,
        metavar="N",
    )

    def resolved(self, model: ModelOptions) -> "SearchOptions":
        """The same, with what follows from the model.

        Args:
            model: Resolved.

        Raises:
            ValueError: If something does not fit together.
        """
        if problems := search_problems(self, model):
            raise ValueError("; ".join(problems))
        choice, weight, stop = model.decoder.choice, self.ctc_decode_weight, self.stop_repeats
        if weight is None:
            weight = 0.1 if model.has_ctc_layer else 0.0
        return replace(
            self,
            beam_size=self.beam_size or choice.beam_size,
            ctc_decode_weight=weight,
            stop_repeats=choice.pretrained and not weight if stop is None else stop,
        )


def search_problems(options: SearchOptions, model: ModelOptions) -> list[str]:
    """What does not fit together, in terms of flags.

    Args:
        options: As they were given, or resolved.
        model: Of the model that is searched, as they were given, or resolved.

    Returns:
        A sentence a problem; empty if there is none.
    """
    problems = value_problems(options)
    if options.ctc_decode_weight and not model.has_ctc_layer:
        without = "--llama-prefix-ctc" if model.ctc_share else "--ctc-weight 0"
        problems.append(
            f"--ctc-decode-weight {options.ctc_decode_weight:g}, but a model of {without} has no "
            "CTC layer: leave it out, or train with CTC"
        )
    return problems
