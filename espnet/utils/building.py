"""Makes the parts of a run from its options, for train.py and eval.py alike."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from transformers import AutoConfig

from datamodule.data_module import DataModule
from datamodule.options import DataOptions
from datamodule.pretrained_text_transform import (
    PretrainedTextTransform,
    llama_text_transform,
    whisper_text_transform,
)
from datamodule.text_transform import TextTransform
from espnet.formats import CLEAN_SNR, MODALITIES, VIDEO_RATE
from espnet.nets.decoders import DecoderOptions, Vocabulary, vocabulary_fingerprint
from espnet.nets.encoders import EncoderChoice
from espnet.nets.model_options import ModelOptions
from espnet.nets.pytorch_backend.e2e_asr_conformer import E2E
from espnet.utils.options import Options

AnyTextTransform = TextTransform | PretrainedTextTransform


def build_text_transform(decoder: DecoderOptions, data: DataOptions) -> AnyTextTransform:
    """Loads the vocabulary of a decoder; the data's options name that of SentencePiece.

    Raises:
        ValueError: If a file cannot be read, or the decoder's tokenizer cannot be loaded.
    """
    name = decoder.decoder
    if name == "llama":
        has_prefix = decoder.llama_conditioning == "prefix"
        prompt = decoder.llama_prompt if has_prefix else None
        return llama_text_transform(
            decoder.decoder_name, prompt=prompt, text_case=decoder.text_case
        )
    elif name == "whisper":
        return whisper_text_transform(
            decoder.decoder_name,
            language=decoder.whisper_language,
            task=decoder.whisper_task,
            text_case=decoder.text_case,
        )
    return build_sentencepiece(data)


def build_sentencepiece(data: DataOptions) -> TextTransform:
    """Loads the SentencePiece vocabulary, that of the Transformer decoder and of lists of ids."""
    return TextTransform(sp_model_path=data.sp_model_path, dict_path=data.dict_path)


def build_model(options: ModelOptions, text_transform: AnyTextTransform) -> E2E:
    """Builds the recogniser from resolved options; what is not pretrained has random weights."""
    vocabulary = Vocabulary(
        odim=text_transform.odim,
        sos=text_transform.sos,
        eos=text_transform.eos,
        prompt=text_transform.prompt,
        special_tokens=text_transform.special_tokens,
        fingerprint=vocabulary_fingerprint(text_transform.token_list),
    )
    return E2E(options, vocabulary)


def build_data(options: Options, modality: str, text_transform: AnyTextTransform) -> DataModule:
    """Makes the data module that reads the streams of a modality; reads nothing yet."""
    data, decoder = options.data, options.model.decoder.choice
    train_file = data.train_file
    if train_file and not (Path(data.root_dir) / "labels" / train_file).is_file():
        # The test data are elsewhere: their babble comes from the test list.
        data = replace(data, train_file=None)
    hears = "audio" in MODALITIES[modality]
    audio = (options.model.encoders.choice("audio") if hears else None) or EncoderChoice()
    of_ids = decoder.pretrained and data.sp_model_path
    return DataModule(
        data,
        streams=MODALITIES[modality],
        text_transform=text_transform,
        id_text_transform=build_sentencepiece(data) if of_ids else None,
        takes_ids=not decoder.pretrained,
        audio_normalize=audio.normalized_audio,
        max_seconds=audio.max_seconds,
        most_tokens=most_tokens(options.model, text_transform),
        snr_targets=options.scoring.decode_snr_target if hears else (CLEAN_SNR,),
    )


def most_tokens(
    options: ModelOptions, text_transform: AnyTextTransform
) -> Callable[[int], int] | None:
    """What tells the most tokens of a text from the frames of its utterance; None: no limit.

    It is what `max_tokens` of the decoder will say, before there is one.
    """
    decoder = options.decoder
    if not decoder.choice.pretrained:
        return None
    config = AutoConfig.from_pretrained(decoder.decoder_name)
    is_whisper = decoder.decoder == "whisper"
    positions = config.max_target_positions if is_whisper else config.max_position_embeddings
    room = positions - len(text_transform.prompt)
    if decoder.decoder != "llama" or decoder.llama_conditioning != "prefix":
        return lambda frames: room  # noqa: ARG005

    def behind_prefix(frames: int) -> int:
        memory = frames * options.encoders.frame_rate // VIDEO_RATE
        return max(0, room - -(-memory // decoder.llama_downsample))

    return behind_prefix


def check_positions(
    options: ModelOptions, data: DataModule, text_transform: AnyTextTransform
) -> None:
    """Makes sure, before the weights are loaded, that a prefix of memory fits into LLaMA.

    Raises:
        ValueError: If the data's longest utterance and the prompt leave no position for a text.
    """
    decoder = options.decoder
    if decoder.llama_conditioning != "prefix":
        return
    positions = AutoConfig.from_pretrained(decoder.decoder_name).max_position_embeddings
    frames = data.longest_utterance * options.encoders.frame_rate // VIDEO_RATE
    memory, prompt = -(-frames // decoder.llama_downsample), len(text_transform.prompt)
    if memory + prompt >= positions:
        raise ValueError(
            f"an utterance of {data.longest_utterance} frames gives {memory} embeddings beside "
            f"{prompt} of the prompt, but --decoder-name {decoder.decoder_name} has {positions} "
            "positions: raise --llama-downsample, shorten --llama-prompt, or leave it out"
        )
