"""Scoring of a recogniser under several conditions: decoding, error rates, files and report."""

import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jiwer
import numpy as np
import pytorch_lightning as pl
import torch.distributed
from torch.utils.data import DataLoader

from datamodule.av_dataset import AVDataset
from datamodule.data_module import DataModule
from espnet.formats import CLEAN_SNR, VIDEO_RATE
from espnet.utils.hypotheses import CUT, ERROR, HypothesisFiles
from espnet.utils.text_normalization import normalizer

log = logging.getLogger(__name__)

OfUtterance = TypeVar("OfUtterance")  # has the `index` of an utterance


@dataclass(frozen=True)
class Decoded:
    """The transcript that the search found for one utterance."""

    index: int  # row of the utterance in its label list
    hypothesis: str  # text; empty if the search found nothing
    score: float | None  # log-score of the hypothesis, None if the search found nothing
    # Time that decoding took, shared out over the utterances of the batch; None if none was.
    seconds: float | None
    error: str | None = None  # why the clip could not be read
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


class Scoring(pl.LightningDataModule):
    """A test list under several conditions: its loaders, and what was found.

    The loaders are made once the processes are running. A condition has none if nothing is left to
    be decoded.

    Args:
        conditions: What to give the model.
        data: For each modality of the conditions the data module that reads it.
        files: Where hypotheses go as they are found, and those come from that are there.
        skip_bad_clips: Whether clips that cannot be read are left out of the hypotheses.
    """

    def __init__(
        self,
        conditions: Sequence[Condition],
        data: Mapping[str, DataModule],
        files: HypothesisFiles,
        *,
        skip_bad_clips: bool = False,
    ) -> None:
        super().__init__()
        self.conditions = conditions
        self.data = data
        self.files = files
        self.skip_bad_clips = skip_bad_clips
        self.decoded: list[list[Decoded]] = [[] for _ in conditions]  # in this process, or earlier
        self._loaded: list[int] = []  # numbers of the conditions that have a loader

    def test_dataloader(self) -> list[DataLoader]:
        """Makes the loaders, in the order of the conditions."""
        names = [condition.name for condition in self.conditions]
        lines = self.files.begin(names) if self.trainer.is_global_zero else None
        lines = self.trainer.strategy.broadcast(lines)
        loaders = []
        for number, condition in enumerate(self.conditions):
            dataset = self.dataset(condition)
            earlier = found_in(lines[condition.name], dataset)
            self.decoded[number] = earlier
            left = np.setdiff1d(np.arange(len(dataset)), [result.index for result in earlier])
            if not len(left):
                continue
            self._loaded.append(number)
            data = self.data[condition.modality]
            data.trainer = self.trainer  # It knows this process's share of the utterances.
            whole = len(left) == len(dataset)
            loaders.append(
                data.test_dataloader(condition.snr, indices=None if whole else left, to_decode=True)
            )
        return loaders

    def dataset(self, condition: Condition) -> AVDataset:
        """The test list as it is under a condition."""
        return self.data[condition.modality].test_datasets[condition.snr]

    def add(self, loader: int, results: Sequence[Decoded]) -> None:
        """Takes what was found of a batch of a loader, and writes it."""
        number = self._loaded[loader]
        condition = self.conditions[number]
        self.decoded[number].extend(results)
        lines = self.lines(results, condition)
        self.files.add(condition.name, lines, self.trainer.global_rank)

    def lines(self, results: Sequence[Decoded], condition: Condition) -> list[dict[str, Any]]:
        """What the file of hypotheses has of some results."""
        dataset = self.dataset(condition)
        has_labels = dataset.labels.has_labels
        return [
            {
                "id": dataset.utterance_id(result.index),
                "reference": dataset.reference(result.index) if has_labels else None,
                "hypothesis": result.hypothesis,
                "score": result.score,
                **({CUT: True} if result.is_cut else {}),
                **({} if result.error is None else {ERROR: result.error}),
            }
            for result in results
            if result.error is None or not self.skip_bad_clips
        ]


def found_in(lines: list[dict[str, Any]], dataset: AVDataset) -> list[Decoded]:
    """The results that a file of hypotheses has of a list, in any order."""
    if not lines:
        return []
    by_id = {line["id"]: line for line in lines}
    found = []
    for index in range(len(dataset)):
        if line := by_id.get(dataset.utterance_id(index)):
            text, score = line["hypothesis"], line["score"]
            found.append(Decoded(index, text, score, None, is_cut=CUT in line))
    return found


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
    *,
    skip_bad_clips: bool = False,
    settings: Mapping[str, Any] | None = None,
    resume: bool = False,
) -> list[dict]:
    """Decodes the test list under each condition and writes what was found, as it is found.

    `output_dir` gets, for each condition, `hypotheses_<condition>.jsonl` with a line an utterance
    (id, reference, hypothesis, score, and `error` for a clip that could not be read) and, once all
    are done, `summary.json`.

    Args:
        trainer: Runs the model, on one process or several, which share out the utterances.
        module: Model and search; tells its `on_decoded` what it finds.
        data: For each modality of the conditions the data module that reads it.
        conditions: What to give the model.
        output_dir: Folder, made if it does not exist.
        normalize: What text goes through before errors are counted, a name of `NORMALIZERS`.
        skip_bad_clips: Whether clips that cannot be read are left out instead of counting as empty
            hypotheses.
        settings: What hypotheses depend on, as `HypothesisFiles` takes it.
        resume: Whether to decode only what the folder has no hypothesis of.

    Returns:
        The summary of each condition; on processes but the first, an empty list.

    Raises:
        ValueError: If what the folder has was decoded with other settings.
    """
    files = HypothesisFiles(output_dir, settings, resume=resume)
    scoring = Scoring(conditions, data, files, skip_bad_clips=skip_bad_clips)
    module.on_decoded = scoring.add
    trainer.test(module, datamodule=scoring, verbose=False)
    module.on_decoded = None
    summaries = []
    for condition, found in zip(conditions, scoring.decoded, strict=True):
        decoded = gather(found)
        if trainer.is_global_zero:
            dataset = scoring.dataset(condition)
            if not summaries and dataset.labels.has_labels:
                warn_of_changes(dataset, [result.index for result in decoded])
            files.finish(condition.name, scoring.lines(decoded, condition))
            summaries.append(summary_of(decoded, scoring, condition, normalize))
    if trainer.is_global_zero:
        files.summarise(summaries)
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


def gather(found: list[OfUtterance]) -> list[OfUtterance]:
    """What all processes have of utterances, in the order of the list, each utterance once."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        shares: list = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(shares, found)
        found = [result for share in shares for result in share]
    return sorted({result.index: result for result in found}.values(), key=lambda r: r.index)


def summary_of(
    decoded: list[Decoded], scoring: Scoring, condition: Condition, normalize: str = "none"
) -> dict:
    """Sums up the errors of all utterances under a condition; texts are normalised before.

    Returns:
        Condition, normaliser, error rates and counts (null without transcripts), clips that could
        not be read, real-time factor (of what was decoded now; None if nothing was).
    """
    dataset = scoring.dataset(condition)
    bad = [
        {"id": dataset.utterance_id(result.index), ERROR: result.error}
        for result in decoded
        if result.error is not None
    ]
    if scoring.skip_bad_clips:
        decoded = [result for result in decoded if result.error is None]
    errors = dict.fromkeys(("wer", "cer", "words", "characters"))
    if dataset.labels.has_labels:
        clean = normalizer(normalize)
        words, characters = count_errors(
            [clean(dataset.reference(result.index)) for result in decoded],
            [clean(result.hypothesis) for result in decoded],
        )
        errors = {
            "wer": words.rate,
            "cer": characters.rate,
            "words": dataclasses.asdict(words),
            "characters": dataclasses.asdict(characters),
        }
    timed = [result for result in decoded if result.seconds is not None]
    duration = sum(int(dataset.labels.num_frames[result.index]) for result in timed) / VIDEO_RATE
    return {
        **dataclasses.asdict(condition),
        "normalize": normalize,
        "utterances": len(decoded),
        "bad_clips": bad,
        "skip_bad_clips": scoring.skip_bad_clips,
        "cut_hypotheses": sum(result.is_cut for result in decoded),
        **errors,
        "real_time_factor": sum(r.seconds for r in timed) / duration if timed else None,
        "hypotheses": scoring.files.path(condition.name).name,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def bad_clips_problem(summaries: list[dict], output_dir: Path) -> str | None:
    """A line that says what error rates suffer from: clips that count as empty hypotheses."""
    counted = [s["bad_clips"] for s in summaries if s["bad_clips"] and not s["skip_bad_clips"]]
    if not counted:
        return None
    names = sorted({clip["id"] for clips in counted for clip in clips})
    number = f"{len(names)} clip{'s' * (len(names) != 1)}"
    return (
        f"{number} could not be read and count as empty hypotheses ({counted[0][0][ERROR]}; see "
        f"bad_clips in {output_dir / 'summary.json'}): mend them and give eval.py --resume, or "
        "leave them out with --skip-bad-clips"
    )


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
        if (factor := summary["real_time_factor"]) is not None:
            parts.append(f"real-time factor {factor:.3f}")
        parts.append(f"{summary['utterances']} utterances")
        if bad := summary["bad_clips"]:
            parts.append(f"{len(bad)} bad clips {_what_became_of_them(summary)}")
        lines.append(f"{name}: {', '.join(parts)}, normaliser {summary['normalize']}")
        if cut := summary["cut_hypotheses"]:
            lines.append(
                f"{name}: {cut} hypotheses were cut at the most tokens that they may have: raise "
                "--max-dec-tokens, or, if CTC has a share, which takes a frame for each token, "
                "search without it (--ctc-decode-weight 0)"
            )
    return "\n".join(lines)


def _what_became_of_them(summary: dict) -> str:
    return "left out" if summary["skip_bad_clips"] else "counted as empty"
