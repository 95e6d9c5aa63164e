"""Scoring of a recogniser under several conditions: decoding, error rates, files and report."""

import dataclasses
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jiwer
import pytorch_lightning as pl
import torch.distributed
from torch.utils.data import DataLoader

from datamodule.av_dataset import AVDataset
from datamodule.data_module import DataModule
from espnet.formats import CLEAN_SNR, VIDEO_RATE
from espnet.utils.text_normalization import normalizer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Decoded:
    """The transcript that the search found for one utterance."""

    index: int  # row of the utterance in its label list
    hypothesis: str  # text; empty if the search found nothing
    score: float | None  # log-score of the hypothesis, None if the search found nothing
    seconds: float  # time that decoding took, shared out over the utterances of the batch
    is_cut: bool = False  # whether the hypothesis has as many tokens as it may, and no end


@dataclass(frozen=True)
class Condition:
    """What the model is given."""

    modality: str  # `audio`, `video` or `audiovisual`
    snr: float = CLEAN_SNR  # signal-to-noise ratio of the audio in dB; `CLEAN_SNR` is clean

    @property
    def name(self) -> str:
        """A name that can be part of a file's."""
        noise = "clean" if self.snr >= CLEAN_SNR else f"{self.snr:g}dB"
        return self.modality if self.modality == "video" else f"{self.modality}_{noise}"


@dataclass(frozen=True)
class ErrorCounts:
    """Errors of a set of hypotheses, in words or in characters."""

    substitutions: int  # tokens replaced
    deletions: int  # tokens left out
    insertions: int  # tokens too many
    reference: int  # tokens of the references

    @property
    def rate(self) -> float:
        """Errors over reference tokens."""
        return (self.substitutions + self.deletions + self.insertions) / max(self.reference, 1)


def count_errors(references: list[str], hypotheses: list[str]) -> tuple[ErrorCounts, ErrorCounts]:
    """Counts errors in words and in characters, ignoring case as auto_avsr does."""
    references = [text.lower() for text in references]
    hypotheses = [text.lower() for text in hypotheses]
    words = jiwer.process_words(references, hypotheses)
    characters = jiwer.process_characters(references, hypotheses)
    return _error_counts(words), _error_counts(characters)


def _error_counts(found: jiwer.WordOutput | jiwer.CharacterOutput) -> ErrorCounts:
    substitutions, deletions = found.substitutions, found.deletions
    reference = substitutions + deletions + found.hits
    return ErrorCounts(substitutions, deletions, found.insertions, reference)


class ConditionLoaders(pl.LightningDataModule):
    """One loader of the test list for each condition, made once the processes are running.

    Each modality of the conditions has a data module that reads it.
    """

    def __init__(self, conditions: Sequence[Condition], data: Mapping[str, DataModule]) -> None:
        super().__init__()
        self.conditions = conditions
        self.data = data

    def test_dataloader(self) -> list[DataLoader]:
        """Makes the loaders, in the order of the conditions."""
        loaders = []
        for condition in self.conditions:
            data = self.data[condition.modality]
            data.trainer = self.trainer  # It knows this process's share of the utterances.
            loaders.append(data.test_dataloader(condition.snr))
        return loaders


def conditions_of(modality: str, snrs: Sequence[float]) -> list[Condition]:
    """One modality at every noise level in dB; video, which has no noise, once."""
    if modality == "video":
        return [Condition(modality)]
    return [Condition(modality, snr) for snr in snrs]


def all_conditions(snrs: Sequence[float]) -> list[Condition]:
    """Every modality at every noise level in dB."""
    modalities = ("audio", "video", "audiovisual")
    return [condition for m in modalities for condition in conditions_of(m, snrs)]


def evaluate(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    data: Mapping[str, DataModule],
    conditions: Sequence[Condition],
    output_dir: Path,
    normalize: str = "none",
) -> list[dict]:
    """Decodes the test list under each condition and writes what was found.

    `output_dir` gets, for each condition, `hypotheses_<condition>.jsonl` with a line an utterance
    (id, reference, hypothesis, score) and, once all are done, `summary.json`.

    Args:
        trainer: Runs the model, on one process or several, which share out the utterances.
        module: Model and search; decodes into its `decoded`, by condition.
        data: For each modality of the conditions the data module that reads it.
        conditions: What to give the model.
        output_dir: Folder, made if it does not exist.
        normalize: What text goes through before errors are counted, a name of `NORMALIZERS`.

    Returns:
        The summary of each condition; on processes but the first, an empty list.
    """
    module.decoded = {}
    trainer.test(module, datamodule=ConditionLoaders(conditions, data), verbose=False)
    summaries = []
    for number, condition in enumerate(conditions):
        decoded = gather(module.decoded.get(number, []))
        if trainer.is_global_zero:
            output_dir.mkdir(parents=True, exist_ok=True)
            dataset = data[condition.modality].test_datasets[condition.snr]
            if number == 0 and dataset.labels.has_labels:
                warn_of_changes(dataset, [result.index for result in decoded])
            summaries.append(write_condition(decoded, dataset, condition, output_dir, normalize))
    if trainer.is_global_zero:
        text = json.dumps(summaries, indent=2) + "\n"
        (output_dir / "summary.json").write_text(text, encoding="utf-8")
    return summaries


def warn_of_changes(dataset: AVDataset, indices: Sequence[int]) -> None:
    """Logs how many references the vocabulary writes otherwise, in more than case and spaces."""
    pairs = [(dataset.text(index), dataset.reference(index)) for index in indices]
    changed = [(a, b) for a, b in pairs if a.lower().split() != b.lower().split()]
    if changed:
        before, after = (text if len(text) <= 80 else f"{text[:80]}..." for text in changed[0])
        log.warning(
            "%d of %d references are scored as the vocabulary writes them, the first as %r, not %r",
            *(len(changed), len(pairs), after, before),
        )


def gather(decoded: list[Decoded]) -> list[Decoded]:
    """The results of all processes, in the order of the test list, each utterance once."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        shares: list = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(shares, decoded)
        decoded = [result for share in shares for result in share]
    return sorted({result.index: result for result in decoded}.values(), key=lambda r: r.index)


def write_condition(
    decoded: list[Decoded],
    dataset: AVDataset,
    condition: Condition,
    output_dir: Path,
    normalize: str = "none",
) -> dict:
    """Writes the hypotheses of all utterances under a condition and sums up their errors.

    Texts are normalised before errors are counted; the file has them as they were. Without
    transcripts, the references in the file are null, and nothing is counted.

    Returns:
        Summary: condition, normaliser, error rates and counts (null without transcripts),
        real-time factor.
    """
    has_labels = dataset.labels.has_labels
    references = [dataset.reference(r.index) if has_labels else None for r in decoded]
    path = output_dir / f"hypotheses_{condition.name}.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for result, reference in zip(decoded, references, strict=True):
            line = {
                "id": dataset.utterance_id(result.index),
                "reference": reference,
                "hypothesis": result.hypothesis,
                "score": result.score,
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    errors = dict.fromkeys(("wer", "cer", "words", "characters"))
    if has_labels:
        clean = normalizer(normalize)
        words, characters = count_errors(
            [clean(reference) for reference in references],
            [clean(result.hypothesis) for result in decoded],
        )
        errors = {
            "wer": words.rate,
            "cer": characters.rate,
            "words": dataclasses.asdict(words),
            "characters": dataclasses.asdict(characters),
        }
    duration = sum(int(dataset.labels.num_frames[result.index]) for result in decoded) / VIDEO_RATE
    return {
        **dataclasses.asdict(condition),
        "normalize": normalize,
        "utterances": len(decoded),
        "cut_hypotheses": sum(result.is_cut for result in decoded),
        **errors,
        "real_time_factor": sum(result.seconds for result in decoded) / duration,
        "hypotheses": path.name,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def format_summaries(summaries: list[dict]) -> str:
    """A line a condition: WER and CER in percent, their counts and the real-time factor."""
    lines = []
    for summary in summaries:
        name = Condition(summary["modality"], summary["snr"]).name
        parts = []
        for title, kind in (("WER", "words"), ("CER", "characters")):
            if (counts := summary[kind]) is None:
                parts = ["no transcripts to score"]
                continue
            parts.append(
                f"{title} {100 * summary[title.lower()]:.2f} % ({counts['substitutions']} sub, "
                f"{counts['deletions']} del, {counts['insertions']} ins of {counts['reference']})"
            )
        lines.append(
            f"{name}: {', '.join(parts)}, real-time factor {summary['real_time_factor']:.3f}, "
            f"{summary['utterances']} utterances, normaliser {summary['normalize']}"
        )
        if cut := summary["cut_hypotheses"]:
            lines.append(
                f"{name}: {cut} hypotheses were cut at the most tokens that they may have: raise "
                "--max-dec-tokens, or, if CTC has a share, which takes a frame for each token, "
                "search without it (--ctc-decode-weight 0)"
            )
    return "\n".join(lines)
