"""Makes the parts of a run from its options, for train.py and eval.py alike."""

from argparse import Namespace
from pathlib import Path

from transformers import AutoConfig

from datamodule.data_module import DataModule
from datamodule.media import VIDEO_RATE
from datamodule.pretrained_text_transform import (
    PretrainedTextTransform,
    llama_text_transform,
    whisper_text_transform,
)
from datamodule.text_transform import TextTransform
from espnet.nets.decoders import DECODERS
from espnet.nets.encoders import AUDIO_ENCODERS, STREAMS, EncoderChoice
from espnet.nets.pytorch_backend.e2e_asr_conformer import E2E
from espnet.utils.model_options import model_options
from espnet.utils.recipes import CLEAN_SNR
from lightning import ModelModule

AnyTextTransform = TextTransform | PretrainedTextTransform


def build_text_transform(args: Namespace) -> TextTransform:
    """Loads the vocabulary.

    Args:
        args: Options of the data and decoder groups, the vocabulary's paths filled in.

    Returns:
        The decoder's vocabulary.

    Raises:
        ValueError: If a file cannot be read, or the decoder's tokenizer cannot be loaded.
    """
    if args.decoder == "llama":
        has_prefix = args.llama_conditioning == "prefix"
        prompt = args.llama_prompt if has_prefix else None
        return llama_text_transform(args.decoder_name, prompt=prompt, text_case=args.text_case)
    elif args.decoder == "whisper":
        return whisper_text_transform(
            args.decoder_name,
            language=args.whisper_language,
            task=args.whisper_task,
            text_case=args.text_case,
        )
    return build_sentencepiece(args)


def build_sentencepiece(args: Namespace) -> TextTransform:
    """Loads the SentencePiece vocabulary, that of the Transformer decoder and of lists of ids."""
    return TextTransform(sp_model_path=args.sp_model_path, dict_path=args.dict_path)


def build_model(args: Namespace, modality: str, text_transform: AnyTextTransform) -> E2E:
    """Builds the recogniser; what is not pretrained has random weights.

    Args:
        args: Options of the model group.
        modality: Streams that the model takes.
        text_transform: Its vocabulary.

    Returns:
        The model.
    """
    return E2E(
        text_transform.odim,
        modality,
        sos=text_transform.sos,
        eos=text_transform.eos,
        prompt=text_transform.prompt,
        special_tokens=text_transform.special_tokens,
        **model_options(args),
    )


def build_data(
    args: Namespace,
    modality: str,
    text_transform: AnyTextTransform,
) -> DataModule:
    """Makes the data module; reads nothing yet.

    Args:
        args: Options of the data and decoding groups.
        modality: Streams to read.
        text_transform: The model's vocabulary.

    Returns:
        The data module.
    """
    train_file = args.train_file
    if train_file and not (Path(args.root_dir) / "labels" / train_file).is_file():
        train_file = None  # The test data are elsewhere: their babble comes from the test list.
    hears = "audio" in STREAMS[modality]
    of_ids = DECODERS[args.decoder].pretrained and args.sp_model_path
    audio = AUDIO_ENCODERS[args.audio_encoder] if hears else EncoderChoice()
    return DataModule(
        root_dir=args.root_dir,
        streams=STREAMS[modality],
        text_transform=text_transform,
        id_text_transform=build_sentencepiece(args) if of_ids else None,
        takes_ids=not DECODERS[args.decoder].pretrained,
        train_file=train_file,
        val_file=args.val_file,
        test_file=args.test_file,
        max_frames=args.max_frames,
        decode_max_frames=args.decode_max_frames,
        train_num_buckets=args.train_num_buckets,
        num_workers=args.num_workers,
        seed=args.seed,
        crop_size=args.crop_size,
        audio_normalize=audio.normalized_audio,
        max_seconds=audio.max_seconds,
        noise_files=args.noise_file or (),
        snr_targets=args.decode_snr_target if hears else (CLEAN_SNR,),
        skip_bad_clips=args.skip_bad_clips,
    )


def check_positions(args: Namespace, data: DataModule, text_transform: AnyTextTransform) -> None:
    """Makes sure, before the weights are loaded, that a prefix of memory fits into LLaMA.

    Args:
        args: Options of the encoders and decoder groups.
        data: Its lists have been read.
        text_transform: The decoder's vocabulary.

    Raises:
        ValueError: If the longest utterance and the prompt leave no position for a text.
    """
    if args.decoder != "llama" or args.llama_conditioning != "prefix":
        return
    positions = AutoConfig.from_pretrained(args.decoder_name).max_position_embeddings
    frames = data.longest_utterance * args.frame_rate // VIDEO_RATE
    memory, prompt = -(-frames // args.llama_downsample), len(text_transform.prompt)
    if memory + prompt >= positions:
        raise ValueError(
            f"an utterance of {data.longest_utterance} frames gives {memory} embeddings beside "
            f"{prompt} of the prompt, but --decoder-name {args.decoder_name} has {positions} "
            "positions: raise --llama-downsample, shorten --llama-prompt, or leave it out"
        )


def build_module(args: Namespace, model: E2E, text_transform: AnyTextTransform) -> ModelModule:
    """Wraps the model for training and decoding.

    Args:
        args: Options of the training and decoding groups.
        model: Recogniser.
        text_transform: Its vocabulary.

    Returns:
        The Lightning module.
    """
    return ModelModule(
        model,
        text_transform,
        lr=args.lr,
        lr_pretrained=args.lr_pretrained,
        weight_decay=args.weight_decay,
        optimizer=args.optimizer,
        warmup_epochs=args.warmup_epochs,
        seed=args.seed,
        beam_size=args.beam_size,
        ctc_decode_weight=args.ctc_decode_weight,
        length_bonus=args.length_bonus,
        max_dec_tokens=args.max_dec_tokens,
        end_when_beaten=DECODERS[args.decoder].pretrained and not args.ctc_decode_weight,
        length_normalization=args.length_normalization,
        stop_repeats=args.stop_repeats,
    )
