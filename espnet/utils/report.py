"""What a run shows a reader: the table of word error rates and two plots."""

from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from espnet.formats import CLEAN_SNR
from espnet.utils.recovery.callbacks import read_metrics

mpl.use("Agg")


def snr_title(snr: float) -> str:
    """`clean`, or the ratio with its unit."""
    return "clean" if snr >= CLEAN_SNR else f"{snr:g} dB"


def wer_table(summaries: list[dict], snrs: list[float]) -> str:
    """Word error rates as a Markdown table, a row a modality, a column a noise level in dB.

    Video has no noise: its one figure stands in every column.
    """
    lines = [
        "| WER [%] | " + " | ".join(map(snr_title, snrs)) + " |",
        "| --- |" + " ---: |" * len(snrs),
    ]
    for title, rates in _rates(summaries, snrs).items():
        lines.append(f"| {title} | " + " | ".join(f"{rate:.1f}" for rate in rates) + " |")
    return "\n".join(lines)


def _rates(summaries: list[dict], snrs: list[float]) -> dict[str, list[float]]:
    """Word error rates in percent at each noise level, by modality."""
    rates = {(s["modality"], s["snr"]): 100 * s["wer"] for s in summaries}
    return {
        "audio-visual" if modality == "audiovisual" else modality: [
            rates.get((modality, snr), rates.get((modality, CLEAN_SNR))) for snr in snrs
        ]
        for modality in dict.fromkeys(s["modality"] for s in summaries)
    }


def plot_wer(summaries: list[dict], snrs: list[float], path: Path) -> None:
    """Draws word error rates over the noise level in dB, a line a modality, to a PNG file."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    order = sorted(snrs)
    for title, values in _rates(summaries, order).items():
        axes.plot(range(len(order)), values, marker="o", label=title)
    axes.set_xticks(range(len(order)), [snr_title(snr) for snr in order])
    axes.set_xlabel("signal-to-noise ratio")
    axes.set_ylabel("word error rate [%]")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def plot_learning_curve(metrics: Path, path: Path) -> None:
    """Draws losses and validation error of a `MetricsTable` over the epochs, to a PNG file."""
    rows = read_metrics(metrics)
    figure = Figure(figsize=(6, 4), layout="constrained")
    left = figure.subplots()
    right = left.twinx()
    curves = (
        (left, "loss", "training loss", "C0-"),
        (left, "loss_val", "validation loss", "C1-"),
        (right, "wer_val", "validation WER, greedy CTC (right)", "C2--"),
    )
    for axes, column, label, style in curves:
        points = [(int(row["epoch"]) + 1, float(row[column])) for row in rows if row[column]]
        scale = 100 if column == "wer_val" else 1
        epochs, values = [epoch for epoch, _ in points], [scale * value for _, value in points]
        axes.plot(epochs, values, style, marker=".", label=label)
    left.set_xlabel("epoch")
    left.set_ylabel("loss per utterance")
    right.set_ylabel("word error rate [%]")
    left.set_ylim(bottom=0)
    right.set_ylim(bottom=0)
    left.grid(alpha=0.3)
    handles = left.get_lines() + right.get_lines()
    left.legend(handles, [line.get_label() for line in handles])
    figure.savefig(path, dpi=120)
