"""Makes tiny checkpoints with random weights, to try out every pretrained part offline.

`python -m espnet.utils.tiny_checkpoints FOLDER` leaves FOLDER/vit, FOLDER/clip, FOLDER/whisper,
FOLDER/wavlm and FOLDER/llama, with the files that the published ones have. They have learned
nothing but how to split the demo corpus's sentences into tokens.
"""

import json
from argparse import ArgumentParser
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPConfig,
    CLIPModel,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTModel,
    WavLMConfig,
    WavLMModel,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
)
from transformers.utils import logging as transformers_logging

from datamodule.demo_plan import draw_speakers

WIDTH = 64
TRANSFORMER = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 2 * WIDTH,
}
IMAGES = {"image_size": 64, "patch_size": 16}  # pixels
NORMALISATION = {  # of the published checkpoints
    "vit": {"image_mean": [0.5] * 3, "image_std": [0.5] * 3},
    "clip": {
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    },
}
LLAMA3_ROPE = {  # of the published Llama 3.2
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

NUM_SENTENCES = 400  # that the tokenizers are trained on
NUM_PIECES = 400  # at most: bytes and pieces of words; each word of the demo corpus becomes one
ROWS = 64  # a multiple of this is the size of Whisper's output layer: more than it has tokens
LLAMA_BEGIN, LLAMA_END = "<|begin_of_text|>", "<|end_of_text|>"
LLAMA_OTHERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
WHISPER_END, WHISPER_START = "<|endoftext|>", "<|startoftranscript|>"
WHISPER_LANGUAGES = ("en", "zh", "de", "es", "ru", "ko", "fr")  # the first of the published ones
WHISPER_TASKS = ("translate", "transcribe")
WHISPER_OTHERS = ("<|startoflm|>", "<|startofprev|>", "<|nospeech|>")
NO_TIMESTAMPS = "<|notimestamps|>"
SPACE = "\u0120"  # as byte-level tokenizers write it
NO_SPEECH_SYMBOLS = '"#()*+/:;<=>@[\\]^_`{|}~'


def tiny_tokenizers() -> dict[str, PreTrainedTokenizerFast | WhisperTokenizer]:
    """Trains tokenizers on the demo corpus's sentences; returns them by the checkpoint's name."""
    plan = draw_speakers({"train": NUM_SENTENCES, "val": 1, "test": 1}, seed=0)
    sentences = [sentence for speaker in plan for sentence in speaker.sentences]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_PIECES,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [*sentences, *(f" {sentence}" for sentence in sentences)]
    tokenizer.train_from_iterator(texts, trainer)
    pieces = json.loads(tokenizer.to_str())["model"]
    return {
        "whisper": _whisper_tokenizer(pieces["vocab"], pieces["merges"]),
        "llama": _llama_tokenizer(tokenizer),
    }


def _llama_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Adds the special tokens of Llama 3 to a tokenizer, after its pieces."""
    tokenizer.add_special_tokens([LLAMA_BEGIN, LLAMA_END, *LLAMA_OTHERS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{LLAMA_BEGIN} $A",
        special_tokens=[(LLAMA_BEGIN, tokenizer.token_to_id(LLAMA_BEGIN))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=LLAMA_BEGIN, eos_token=LLAMA_END
    )


def _whisper_tokenizer(vocabulary: dict[str, int], merges: list) -> WhisperTokenizer:
    """Adds the special tokens of Whisper to pieces, in the order of the published checkpoints."""
    codes = [f"<|{code}|>" for code in (*WHISPER_LANGUAGES, *WHISPER_TASKS)]
    return WhisperTokenizer(
        vocab=vocabulary,
        merges=[tuple(merge) for merge in merges],
        extra_special_tokens=[WHISPER_START, *codes, *WHISPER_OTHERS, NO_TIMESTAMPS],
    )


def tiny_models(
    tokenizers: dict[str, PreTrainedTokenizerFast | WhisperTokenizer],
) -> dict[str, PreTrainedModel]:
    """Builds the models, by the name of the encoder or decoder that loads them.

    The tokenizers tell the sizes of the output layers.
    """
    clip = CLIPConfig(
        vision_config={**TRANSFORMER, **IMAGES},
        text_config={**TRANSFORMER, "vocab_size": 64, "bos_token_id": 0, "eos_token_id": 1},
    )
    wavlm = WavLMConfig(
        **TRANSFORMER,
        conv_dim=(WIDTH // 2,) * 7,
        num_conv_pos_embedding_groups=4,
    )
    return {
        "vit": ViTModel(ViTConfig(**TRANSFORMER, **IMAGES)),
        "clip": CLIPModel(clip),
        "whisper": _whisper(tokenizers["whisper"]),
        "wavlm": WavLMModel(wavlm),
        "llama": _llama(tokenizers["llama"]),
    }


def _llama(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Builds a Llama with what distinguishes version 3.2: shared keys, scaled rope, tied layers."""
    config = LlamaConfig(
        **{**TRANSFORMER, "num_hidden_layers": 4},
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        max_position_embeddings=131072,
        rope_parameters=LLAMA3_ROPE,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def _whisper(tokenizer: WhisperTokenizer) -> WhisperForConditionalGeneration:
    """Builds a Whisper with the generation config of the published ones."""
    ids = tokenizer.get_vocab()
    special = {
        "bos_token_id": ids[WHISPER_END],
        "eos_token_id": ids[WHISPER_END],
        "pad_token_id": ids[WHISPER_END],
        "decoder_start_token_id": ids[WHISPER_START],
        "begin_suppress_tokens": [ids[SPACE], ids[WHISPER_END]],
    }
    config = WhisperConfig(
        d_model=WIDTH,
        encoder_layers=2,
        encoder_attention_heads=4,
        encoder_ffn_dim=2 * WIDTH,
        decoder_layers=2,
        decoder_attention_heads=4,
        decoder_ffn_dim=2 * WIDTH,
        vocab_size=-(-(len(tokenizer) + 1) // ROWS) * ROWS,
        **special,
    )
    tasks = {task: ids[f"<|{task}|>"] for task in WHISPER_TASKS}
    control = [ids[WHISPER_START], *tasks.values(), *(ids[token] for token in WHISPER_OTHERS)]
    model = WhisperForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        **special,
        max_length=config.max_target_positions,
        is_multilingual=True,
        lang_to_id={f"<|{code}|>": ids[f"<|{code}|>"] for code in WHISPER_LANGUAGES},
        task_to_id=tasks,
        no_timestamps_token_id=ids[NO_TIMESTAMPS],
        prev_sot_token_id=ids["<|startofprev|>"],
        return_timestamps=False,
        suppress_tokens=[*(ids[symbol] for symbol in NO_SPEECH_SYMBOLS), *control],
    )
    return model


def make_tiny_checkpoints(folder: str | Path, seed: int = 0) -> list[str]:
    """Writes a checkpoint for each pretrained part into a folder of its name; returns the names."""
    transformers_logging.disable_progress_bar()
    tokenizers = tiny_tokenizers()
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        tiny = tiny_models(tokenizers)
        for name, model in tiny.items():
            path = Path(folder) / name
            model.save_pretrained(path)
            if name in NORMALISATION:
                text = json.dumps(NORMALISATION[name], indent=2)
                (path / "preprocessor_config.json").write_text(text)
            if name in tokenizers:
                tokenizers[name].save_pretrained(path)
            if name == "whisper":
                WhisperFeatureExtractor(model.config.num_mel_bins).save_pretrained(path)
    return list(tiny)


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = ArgumentParser(description="Make tiny checkpoints with random weights.")
    parser.add_argument("folder", help="where to make them")
    folder = parser.parse_args(argv).folder
    names = make_tiny_checkpoints(folder)
    print(f"Made {', '.join(f'{folder}/{name}' for name in names)}: random weights")


if __name__ == "__main__":
    main()
