import json
from types import SimpleNamespace

import pytest

from datamodule.av_dataset import AVDataset
from datamodule.label_list import LabelList
from datamodule.text_transform import TextTransform
from datamodule.train_tokenizer import train_tokenizer
from datamodule.transforms import AudioTransform
from espnet.formats import CLEAN_SNR
from espnet.utils.evaluation import (
    Condition,
    Decoded,
    Scoring,
    all_conditions,
    count_errors,
    format_summaries,
    summary_of,
    warn_of_changes,
)
from espnet.utils.hypotheses import HypothesisFiles
from espnet.utils.report import plot_learning_curve, plot_wer, wer_table


def edits(reference, hypothesis):
    """Levenshtein distance by the textbook's table."""
    row = list(range(len(hypothesis) + 1))
    for i, expected in enumerate(reference, 1):
        previous, row[0] = row[0], i
        for j, found in enumerate(hypothesis, 1):
            previous, row[j] = (
                row[j],
                min(row[j] + 1, row[j - 1] + 1, previous + (expected != found)),
            )
    return row[-1]


def test_errors_are_summed_over_utterances_not_averaged():
    references = ["bin blue at f two now", "lay red", "set"]
    hypotheses = ["BIN blue at s now", "lay red with", ""]
    words, characters = count_errors(references, hypotheses)
    assert (words.substitutions, words.deletions, words.insertions) == (1, 2, 1)
    assert words.reference == 9
    assert words.rate == pytest.approx(4 / 9)
    expected = sum(edits(r, h.lower()) for r, h in zip(references, hypotheses, strict=True))
    assert characters.reference == sum(map(len, references))
    assert characters.rate == pytest.approx(expected / characters.reference)


@pytest.fixture
def scored(tmp_path):
    """What is made of a list of texts, if the model writes what its vocabulary gives for them."""

    def score(texts, hypotheses=None, cut=None, **kwargs):
        sentences = ["bin blue at f two now", "lay red with p nine soon", "çé"] * 5
        train_tokenizer(sentences, tmp_path / "unigram", vocab_size=27)
        vocabulary = TextTransform(sp_model_path=f"{tmp_path}/unigram.model")
        (tmp_path / "labels").mkdir(exist_ok=True)
        rows = [f"set,{number}.mp4,25,{text}\n" for number, text in enumerate(texts or [])]
        rows = rows or [f"set,{number}.mp4,25\n" for number in range(len(hypotheses))]
        (tmp_path / "labels" / "test.csv").write_text("".join(rows), encoding="utf-8")
        labels = LabelList(str(tmp_path), "test.csv")
        transform = AudioTransform(subset="test", normalize=False)
        dataset = AVDataset(labels=labels, text_transform=vocabulary, audio_transform=transform)
        if hypotheses is None:
            hypotheses = [vocabulary.post_process(vocabulary.tokenize(text)) for text in texts]
        decoded = [
            Decoded(row, text, -1.0, 0.1, is_cut=row == cut) for row, text in enumerate(hypotheses)
        ]
        if texts:
            warn_of_changes(dataset, list(range(len(texts))))
        condition = Condition("audio")
        data = SimpleNamespace(test_datasets={condition.snr: dataset})
        scoring = Scoring([condition], {"audio": data}, HypothesisFiles(tmp_path))
        scoring.files.finish(condition.name, scoring.lines(decoded, condition))
        return summary_of(decoded, scoring, condition, **kwargs)

    return score


def test_a_perfect_model_has_no_errors_whatever_the_form_of_the_references(scored, caplog):
    texts = ["ｂｉｎ　ｂｌｕｅ　ａｔ", "lay red", "c\u0327e\u0301"]
    summary = scored(texts)
    assert (summary["wer"], summary["cer"]) == (0.0, 0.0)
    (record,) = caplog.records
    assert record.message == (
        "2 of 3 references are scored as the vocabulary writes them, the first as 'bin blue at', "
        "not 'ｂｉｎ\\u3000ｂｌｕｅ\\u3000ａｔ'"
    )


def test_what_the_vocabulary_cannot_write_counts_as_errors(scored, caplog):
    summary = scored(["bin ж", "lay red"], ["bin", "lay red"])
    assert (summary["words"]["deletions"], summary["words"]["reference"]) == (1, 4)
    assert not caplog.records


def test_what_is_found_in_silence_are_insertions(scored):
    summary = scored(["", "lay red", ""], ["bin blue", "lay", ""])
    words = {"substitutions": 0, "deletions": 1, "insertions": 2, "reference": 2}
    assert summary["words"] == words
    assert summary["characters"]["insertions"] == len("bin blue")
    assert summary["wer"] == 1.5
    # So are words where a normaliser leaves nothing of the reference.
    words = {"substitutions": 0, "deletions": 0, "insertions": 1, "reference": 1}
    assert scored(["(p)", "red"], ["bin", "red"], normalize="basic")["words"] == words


def test_hypotheses_that_were_cut_are_counted(scored):
    summary = scored(["bin", "lay red"], ["bin", "lay"], cut=1)
    assert summary["cut_hypotheses"] == 1
    assert "audio_clean: 1 hypotheses were cut at the most" in format_summaries([summary])
    assert "cut" not in format_summaries([scored(["bin"])])


def test_clips_without_transcripts_are_decoded(scored, tmp_path):
    summary = scored(None, ["bin", ""])
    assert summary["wer"] is summary["characters"] is None
    assert "no transcripts to score, real-time factor" in format_summaries([summary])
    lines = (tmp_path / "hypotheses_audio_clean.jsonl").read_text().splitlines()
    assert [json.loads(line)["hypothesis"] for line in lines] == ["bin", ""]
    assert [json.loads(line)["reference"] for line in lines] == [None, None]


def test_conditions_have_names_for_files():
    assert Condition("audio", CLEAN_SNR).name == "audio_clean"
    assert Condition("audiovisual", -5.0).name == "audiovisual_-5dB"
    assert Condition("audio", 2.5).name == "audio_2.5dB"
    assert Condition("video").name == "video"


def test_video_is_scored_once():
    conditions = all_conditions([CLEAN_SNR, 0.0])
    assert [condition.name for condition in conditions] == [
        "audio_clean",
        "audio_0dB",
        "video",
        "audiovisual_clean",
        "audiovisual_0dB",
    ]


SUMMARIES = [
    {"modality": "audio", "snr": CLEAN_SNR, "wer": 0.1},
    {"modality": "audio", "snr": 0.0, "wer": 0.5},
    {"modality": "video", "snr": CLEAN_SNR, "wer": 0.3333},
    {"modality": "audiovisual", "snr": CLEAN_SNR, "wer": 0.05},
    {"modality": "audiovisual", "snr": 0.0, "wer": 1.25},
]


def test_table_repeats_the_figure_of_video():
    assert wer_table(SUMMARIES, [CLEAN_SNR, 0.0]).splitlines() == [
        "| WER [%] | clean | 0 dB |",
        "| --- | ---: | ---: |",
        "| audio | 10.0 | 50.0 |",
        "| video | 33.3 | 33.3 |",
        "| audio-visual | 5.0 | 125.0 |",
    ]


def test_plots_are_pictures(tmp_path):
    plot_wer(SUMMARIES, [CLEAN_SNR, 0.0], tmp_path / "wer.png")
    metrics = tmp_path / "metrics.csv"
    metrics.write_text("epoch,loss,loss_val,wer_val\n0,5.0,4.5,0.9\n1,3.0,,\n")
    plot_learning_curve(metrics, tmp_path / "curve.png")
    for name in ("wer.png", "curve.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
