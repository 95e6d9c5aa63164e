import pytest

from espnet.formats import CLEAN_SNR
from espnet.utils.evaluation import Condition, all_conditions, count_errors
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
