#!/usr/bin/env python3
"""Word error rates of a published Whisper by the silence after an utterance, beside `generate`'s.

`python benchmarks/whisper_margin.py CHECKPOINT CLIPS`, in the repository's root, where CHECKPOINT
is a multilingual Whisper (hub id or folder) and CLIPS a folder with recordings of English and a
`transcripts.csv` with the columns file and transcript. Nothing is trained. Noise is babble mixed of
the other recordings. A row has the word errors after Whisper's normaliser in percent for each
margin, `generate`'s after 30 s, and the time of encoding and search by that of a margin of 30 s.
"""

import csv
import sys
import time
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import jiwer
import torch
from torch import Tensor
from transformers import AutoTokenizer, WhisperFeatureExtractor, WhisperForConditionalGeneration

from benchmarks.common import markdown_line
from datamodule.media import read_audio
from datamodule.noise import FileNoise, add_noise
from datamodule.pretrained_text_transform import PretrainedTextTransform, whisper_text_transform
from espnet.formats import CLEAN_SNR
from espnet.nets.pytorch_backend.e2e_asr_conformer import E2E
from espnet.nets.search import build_beam_search
from espnet.nets.search_options import SearchOptions
from espnet.utils.text_normalization import normalizer

MARGINS = (0.0, 1.0, 2.0, 3.0, 5.0, 30.0)
BEAMS = (1, 5)
SNRS = (CLEAN_SNR, 5.0, 0.0)
VOICES = 6  # of the babble

Clips = dict[str, Tensor]
"""Samples (S,) of each recording, by its file's name."""


def noisy(clips: Clips, folder: Path, snr: float) -> Clips:
    """Mixes each recording of a folder with babble of others at a ratio in dB, always the same."""
    mixed = {}
    for seed, (name, samples) in enumerate(clips.items()):
        generator = torch.Generator().manual_seed(seed)
        others = [other for other in clips if other != name]
        babble = torch.zeros_like(samples)
        for index in torch.randperm(len(others), generator=generator)[:VOICES].tolist():
            voice = FileNoise([folder / others[index]]).sample(len(samples), generator=generator)
            babble += voice / torch.linalg.vector_norm(voice).clamp(min=1e-6)
        mixed[name] = samples if snr >= CLEAN_SNR else add_noise(samples, babble, snr)
    return mixed


def generator_of(name: str) -> Callable[[Tensor, int], str]:
    """What transformers' `generate` writes for samples (S,), padded to 30 s, by beam size."""
    model = WhisperForConditionalGeneration.from_pretrained(name, dtype=torch.float32).eval()
    extractor = WhisperFeatureExtractor.from_pretrained(name)
    tokenizer = AutoTokenizer.from_pretrained(name)

    def transcribe(samples: Tensor, beam_size: int) -> str:
        mel = extractor(samples.numpy(), sampling_rate=16000, return_tensors="pt").input_features
        found = model.generate(mel, num_beams=beam_size, language="en", task="transcribe")
        return tokenizer.decode(found[0], skip_special_tokens=True).strip()

    return transcribe


def searcher_of(
    name: str,
    vocabulary: PretrainedTextTransform,
    margin: float | None,
    *,
    normalize: bool = False,
    stop_repeats: bool = True,
) -> Callable[[Tensor, int], str]:
    """What the toolkit writes for samples (S,), by beam size.

    The margin is in seconds of silence after the samples; None: the default. With `normalize`,
    hypotheses are compared by their score per token; those that repeat themselves are stopped.
    """
    model = E2E.from_keywords(
        vocabulary.odim,
        "audio",
        sos=vocabulary.sos,
        eos=vocabulary.eos,
        prompt=vocabulary.prompt,
        special_tokens=vocabulary.special_tokens,
        audio_encoder="whisper",
        decoder="whisper",
        decoder_name=name,
        whisper_margin=margin,
    ).eval()

    def transcribe(samples: Tensor, beam_size: int) -> str:
        options = SearchOptions(
            beam_size=beam_size, length_normalization=normalize, stop_repeats=stop_repeats
        )
        search = build_beam_search(model, options, vocabulary.token_list)
        (nbest,) = search(*model.encode(samples[None, :, None], torch.tensor([len(samples)])))
        return vocabulary.post_process(nbest[0].yseq)

    return transcribe


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    """Prints the table."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="multilingual Whisper: hub id or folder")
    parser.add_argument("clips", type=Path, help="folder with recordings and transcripts.csv")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = list(csv.DictReader((options.clips / "transcripts.csv").open()))
    normalize_text = normalizer("whisper")
    references = [normalize_text(row["transcript"]) for row in rows]
    clips = {row["file"]: read_audio(options.clips / row["file"]) for row in rows}
    vocabulary = whisper_text_transform(
        options.checkpoint, language="en", task="transcribe", text_case="keep"
    )
    systems = {"`generate`, 30 s": generator_of(options.checkpoint)}
    for margin in reversed(MARGINS):
        label = f"{margin:g} s of silence" if margin < 30 else "30 s"
        systems[label] = searcher_of(options.checkpoint, vocabulary, margin)
    systems["30 s, --length-normalization"] = searcher_of(
        options.checkpoint, vocabulary, 30.0, normalize=True
    )
    conditions = [(snr, beam) for snr in SNRS for beam in BEAMS]
    titles = [f"{'clean' if s >= CLEAN_SNR else f'{s:g} dB'}, beam {b}" for s, b in conditions]
    words = sum(len(text.split()) for text in references)
    print(markdown_line([f"WER [%] of {words} words", *titles, "texts of `generate`", "time"]))
    print(markdown_line(["---", *["---:"] * (len(titles) + 2)]), flush=True)
    theirs, seconds_30s = {}, None
    for label, transcribe in systems.items():
        rates, same, start = [], 0, time.perf_counter()
        for snr, beam in conditions:
            heard = noisy(clips, options.clips, snr)
            texts = [transcribe(samples, beam) for samples in heard.values()]
            same += sum(
                a == b for a, b in zip(theirs.setdefault((snr, beam), texts), texts, strict=True)
            )
            rates.append(100 * jiwer.wer(references, list(map(normalize_text, texts))))
        seconds = time.perf_counter() - start
        if label == "30 s":
            seconds_30s = seconds
        ratio = f"{seconds / seconds_30s:.2f}" if seconds_30s else ""
        texts_alike = f"{same} of {len(clips) * len(conditions)}"
        cells = [label, *(f"{rate:.1f}" for rate in rates), texts_alike, ratio]
        print(markdown_line(cells), flush=True)


if __name__ == "__main__":
    main()
