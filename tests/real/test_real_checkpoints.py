"""Real checkpoints on real speech, where two environment variables name folders that hold them.

AVASR_REAL_CHECKPOINTS: folders of save_pretrained, `whisper-base` (or another multilingual
Whisper), `smollm2-135m` (a LLaMA) and `vit-small`. AVASR_REAL_CLIPS: recordings of English, and
`transcripts.csv` with the columns file and transcript.

    AVASR_REAL_CHECKPOINTS=real AVASR_REAL_CLIPS=clips pytest -m real
"""

import csv
import os
from pathlib import Path

import jiwer
import pytest
import torch
from transformers import LlamaForCausalLM, ViTModel

import eval as evaluation
from benchmarks.whisper_margin import generator_of, searcher_of
from datamodule.media import read_audio
from datamodule.pretrained_text_transform import llama_text_transform, whisper_text_transform
from espnet.formats import VIDEO_RATE
from espnet.nets.pytorch_backend.decoder.llama_decoder import LLaMADecoder
from espnet.nets.pytorch_backend.frontend.vit_encoder import ViTEncoder
from espnet.utils.text_normalization import normalizer

CHECKPOINTS = Path(os.environ.get("AVASR_REAL_CHECKPOINTS", "nowhere"))
CLIPS = Path(os.environ.get("AVASR_REAL_CLIPS", "nowhere"))
WHISPER, LLAMA, VIT = (str(CHECKPOINTS / n) for n in ("whisper-base", "smollm2-135m", "vit-small"))
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not CHECKPOINTS.is_dir(), reason="AVASR_REAL_CHECKPOINTS names no folder"),
]
needs_clips = pytest.mark.skipif(not CLIPS.is_dir(), reason="AVASR_REAL_CLIPS names no folder")
BEAMS = (1, 5)


@pytest.fixture(scope="module")
def clips():
    """Samples and transcript of each clip, by its file's name."""
    rows = csv.DictReader((CLIPS / "transcripts.csv").open())
    return {row["file"]: (read_audio(CLIPS / row["file"]), row["transcript"]) for row in rows}


@pytest.fixture(scope="module")
def generated(clips):
    """What transformers' generate writes, by beam size and clip."""
    generate = generator_of(WHISPER)
    return {b: {name: generate(x, b) for name, (x, _) in clips.items()} for b in BEAMS}


@pytest.fixture(scope="module")
def vocabulary():
    return whisper_text_transform(WHISPER, language="en", task="transcribe", text_case="keep")


@torch.no_grad()
def transcribe(vocabulary, clips, beam_size, margin=None, **options):
    """Texts of a Whisper as encoder and decoder, by the clips' names; one clip at a time."""
    search = searcher_of(WHISPER, vocabulary, margin, **options)
    return {name: search(samples, beam_size) for name, (samples, _) in clips.items()}


def word_errors(texts, clips):
    """Word error rate after Whisper's normaliser for English."""
    normalize = normalizer("whisper")
    references = [normalize(transcript) for _, transcript in clips.values()]
    return jiwer.wer(references, [normalize(texts[name]) for name in clips])


@needs_clips
@pytest.mark.parametrize("beam", BEAMS)
def test_texts_equal_those_of_generate(clips, generated, vocabulary, beam):
    found = transcribe(vocabulary, clips, beam, margin=30.0, normalize=True)
    assert found == generated[beam]


@needs_clips
@pytest.mark.parametrize("beam", BEAMS)
def test_the_default_margin_does_not_cost_words(clips, generated, vocabulary, beam):
    """Two words of a hundred may differ: a few seconds of silence are not quite 30."""
    found = word_errors(transcribe(vocabulary, clips, beam), clips)
    assert found <= word_errors(generated[beam], clips) + 0.02


@needs_clips
def test_without_silence_repetitions_are_stopped(clips, vocabulary):
    looping = transcribe(vocabulary, clips, 1, margin=0.0, stop_repeats=False)
    stopped = transcribe(vocabulary, clips, 1, margin=0.0)
    assert word_errors(looping, clips) > 2
    assert word_errors(stopped, clips) < 0.3


@needs_clips
def test_eval_scores_a_published_whisper(clips, tmp_path, capsys, monkeypatch):
    (tmp_path / "labels").mkdir()
    (tmp_path / "clips").symlink_to(CLIPS.resolve())
    lines = [
        f"clips,{name},{len(samples) * VIDEO_RATE // 16000},{transcript}\n"
        for name, (samples, transcript) in clips.items()
    ]
    (tmp_path / "labels/test.csv").write_text("".join(lines))
    monkeypatch.chdir(tmp_path)
    evaluation.main(
        [
            *["--audio-encoder", "whisper", "--decoder", "whisper", "--decoder-name", WHISPER],
            *["--root-dir", ".", "--test-file", "test.csv", "--normalize", "whisper"],
            *["--num-workers", "0", "--accelerator", "cpu"],
        ]
    )
    rate = float(capsys.readouterr().out.split("WER ")[1].split(" %")[0])
    assert rate < 10


@pytest.mark.parametrize("text", ["bin blue at f two now", "The quick, brown fox: isn't it?"])
def test_text_comes_back_as_it_was(vocabulary, text):
    llama = llama_text_transform(LLAMA, prompt="Transcribe speech to text.", text_case="keep")
    for transform in (vocabulary, llama):
        assert transform.post_process(transform.tokenize(text)) == text


@torch.no_grad()
def test_llama_equals_transformers():
    """Gated blocks are closed at the start."""
    transform = llama_text_transform(LLAMA, prompt=None, text_case="keep")
    decoder = LLaMADecoder(
        LLAMA,
        memory_dim=8,
        prompt=transform.prompt,
        eos=transform.eos,
        suppress=transform.special_tokens,
        cross_every=10,
    ).eval()
    text = transform.tokenize("It was a bright cold day in April, and the clocks were striking")
    tokens = torch.cat([torch.tensor([transform.sos]), text])[None]
    theirs = LlamaForCausalLM.from_pretrained(LLAMA, dtype=torch.float32).eval()
    found = decoder(tokens, torch.randn(1, 5, 8), torch.tensor([5]))
    expected = theirs(tokens - 1).logits
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_vit_equals_transformers():
    encoder = ViTEncoder(VIT, image_size=112).eval()
    x = torch.rand(1, 3, 1, 88, 88, generator=torch.Generator().manual_seed(0))
    features, _ = encoder(x, torch.tensor([3]))
    theirs = ViTModel.from_pretrained(VIT, dtype=torch.float32).eval()
    expected = theirs(encoder.images(x[0]), interpolate_pos_encoding=True).last_hidden_state[:, 0]
    torch.testing.assert_close(features[0], expected, atol=1e-4, rtol=1e-4)
