"""Lightning module: loss, optimiser, schedule, validation and decoding of a recogniser."""

import logging
import math
import time
from typing import Any

import jiwer
import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from datamodule.text_transform import TextTransform
from espnet.nets.batch_beam_search import BatchBeamSearch
from espnet.nets.pytorch_backend.ctc import ctc_frames_needed
from espnet.nets.pytorch_backend.e2e_asr_conformer import E2E
from espnet.nets.scorers.ctc import CTCPrefixScorer
from espnet.nets.scorers.length_bonus import LengthBonus
from espnet.utils.evaluation import Decoded

logger = logging.getLogger(__name__)

VALIDATION_SUMS = ("loss_val", "loss_ctc_val", "loss_att_val", "decoder_acc_val")


def build_beam_search(
    model: E2E,
    token_list: list[str],
    *,
    beam_size: int,
    ctc_weight: float,
    length_bonus: float,
    max_tokens: int | None = None,
) -> BatchBeamSearch:
    """Joint CTC/attention search over a model's vocabulary.

    Args:
        model: Recogniser.
        token_list: Its vocabulary, blank and eos included.
        beam_size: Hypotheses that are kept.
        ctc_weight: Weight of the CTC prefix score; the decoder has the rest.
        length_bonus: Score of every token.
        max_tokens: Most tokens of a hypothesis; None for what frames and decoder allow.

    Returns:
        The search.

    Raises:
        ValueError: If CTC is to have a share, and the model has no CTC layer.
    """
    if ctc_weight and model.ctc is None:
        raise ValueError(
            f"CTC weight {ctc_weight} in the search, but the model has no CTC layer: set it to 0"
        )

    def limit(frames: int) -> int:
        of_decoder = model.decoder.max_tokens(frames)
        return of_decoder if max_tokens is None else min(of_decoder, max_tokens)

    return BatchBeamSearch(
        beam_size=beam_size,
        vocab_size=len(token_list),
        weights={"decoder": 1.0 - ctc_weight, "ctc": ctc_weight, "length_bonus": length_bonus},
        scorers={
            "decoder": model.decoder,
            "ctc": None if model.ctc is None else CTCPrefixScorer(model.ctc, model.eos),
            "length_bonus": LengthBonus(len(token_list)),
        },
        sos=model.sos,
        eos=model.eos,
        token_list=token_list,
        pre_beam_score_key=None if ctc_weight == 1.0 else "decoder",
        max_tokens=limit,
    )


class ModelModule(pl.LightningModule):
    """Trains, validates and decodes with an `E2E` model.

    Args:
        model: Recogniser.
        text_transform: Its vocabulary.
        lr: Highest learning rate.
        weight_decay: Of AdamW.
        warmup_epochs: Epochs in which the rate rises; it then falls to zero along a cosine.
        seed: Of dropout; each step draws from a generator that depends on the seed, the epoch,
            the batch and the process only, so that a resumed run draws what it would have drawn.
        beam_size: Hypotheses that the search keeps.
        ctc_decode_weight: CTC's share of the search's score.
        length_bonus: Score of every token in the search.
        max_dec_tokens: Most tokens of a hypothesis; None for what frames and decoder allow.
    """

    def __init__(
        self,
        model: E2E,
        text_transform: TextTransform,
        *,
        lr: float = 1e-3,
        weight_decay: float = 0.03,
        warmup_epochs: float = 5,
        seed: int = 42,
        beam_size: int = 40,
        ctc_decode_weight: float = 0.1,
        length_bonus: float = 0.0,
        max_dec_tokens: int | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.text_transform = text_transform
        self.lr = lr
        self.weight_decay = weight_decay
        self.warmup_epochs = warmup_epochs
        self.seed = seed
        self.beam_search = build_beam_search(
            model,
            text_transform.token_list,
            beam_size=beam_size,
            ctc_weight=ctc_decode_weight,
            length_bonus=length_bonus,
            max_tokens=max_dec_tokens,
        )
        self.decoded: dict[int, list[Decoded]] = {}
        self._validation_sums: Tensor | None = None
        self._statistics: list[Tensor] = []
        self._utterances = 0.0  # of the current step, in all processes

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW, with a rate that rises linearly and then falls along a cosine, by step."""
        optimizer = torch.optim.AdamW(
            self._trained_parameters(),
            lr=self.lr,
            weight_decay=self.weight_decay,
            betas=(0.9, 0.98),
            # Lightning refuses to clip for a fused step in any mixed precision, bfloat16 too.
            fused=None if "mixed" in self.trainer.precision else True,
        )
        steps = self.trainer.estimated_stepping_batches
        warmup_steps = steps * self.warmup_epochs / self.trainer.max_epochs
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: warmup_cosine(step, warmup_steps, steps)
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def _trained_parameters(self) -> list[torch.nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def on_train_batch_start(self, batch: dict[str, Any] | None, batch_idx: int) -> None:  # noqa: ARG002
        """Seeds the step and keeps the batch statistics, in case the step must be undone."""
        entropy = [self.seed, self.current_epoch, batch_idx, self.global_rank]
        torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]))
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self._utterances = 0.0
            self._statistics = [buffer.clone() for buffer in self.model.buffers()]

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:  # noqa: ARG002
        """Loss of a batch, summed over its utterances; the step's gradient is that of the mean."""
        size = len(batch["indices"])
        self._count("bad_clips", batch["num_bad_clips"])
        sizes = torch.tensor([float(size), float(size == 0)], device=self.device)
        everywhere, empty = self.trainer.strategy.reduce(sizes, reduce_op="sum").tolist()
        self._count("skipped_utterances", size if empty else 0)
        if empty:  # Some process has bad clips only: none can compute batch statistics with it.
            return sum(parameter.sum() * 0.0 for parameter in self._trained_parameters())
        memory, memory_lengths = self.model.encode(*model_inputs(batch))
        loss, loss_ctc, loss_att, accuracy = self.model.losses(
            memory, memory_lengths, batch["targets"]
        )
        if self.model.ctc is not None:
            too_short = memory_lengths < ctc_frames_needed(batch["targets"])
            self._count("short_utterances", too_short.sum())
        self.log("loss_step", loss, prog_bar=True, batch_size=size)
        if loss.isfinite():
            values = {"loss": loss, "loss_ctc": loss_ctc, "loss_att": loss_att}
            values["decoder_acc"] = accuracy
            self.log_dict(values, on_step=False, on_epoch=True, batch_size=size, sync_dist=True)
        self.log("monitoring_step", float(self.global_step), batch_size=size)
        self._utterances += everywhere
        # Processes and accumulated batches are averaged after this; `configure_gradient_clipping`
        # divides by the utterances of the whole step, once they are known.
        return loss * (size * self.trainer.world_size * self.trainer.accumulate_grad_batches)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Averages and clips gradients; a step that is not finite is undone and counted."""
        if not self._utterances:
            optimizer.zero_grad(set_to_none=True)  # AdamW then leaves weights and moments alone.
            return
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        for gradient in gradients:
            gradient.div_(self._utterances)
        finite = torch.nn.utils.get_total_norm(gradients).isfinite().float().to(self.device)
        finite = self.trainer.strategy.reduce(finite, reduce_op="min")
        self._count("nonfinite_steps", 1 - finite)
        if finite:
            self.clip_gradients(
                optimizer,
                gradient_clip_val=gradient_clip_val,
                gradient_clip_algorithm=gradient_clip_algorithm,
            )
            return
        optimizer.zero_grad(set_to_none=True)
        for buffer, before in zip(self.model.buffers(), self._statistics, strict=True):
            buffer.copy_(before)

    def _count(self, name: str, value: Tensor | int) -> None:
        """Adds to a count that is logged at the end of the epoch, over all processes."""
        value = torch.as_tensor(value, dtype=torch.float32, device=self.device)
        self.log(name, value, on_step=False, on_epoch=True, reduce_fx="sum", sync_dist=True)

    def on_validation_epoch_start(self) -> None:
        """Begins new sums."""
        self._validation_sums = torch.zeros(len(VALIDATION_SUMS) + 3, device=self.device)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:  # noqa: ARG002
        """Adds a batch to losses, accuracy and the word errors of greedy CTC."""
        targets = batch["targets"]
        memory, memory_lengths = self.model.encode(*model_inputs(batch))
        values = self.model.losses(memory, memory_lengths, targets)
        if not values[0].isfinite():
            logger.warning("the loss of a validation batch is not finite: it is left out")
            return
        errors, spoken = self._greedy_errors(memory, memory_lengths, targets)
        sums = [*(value * len(targets) for value in values), len(targets), errors, spoken]
        self._validation_sums += torch.tensor(sums, device=self.device)

    def _greedy_errors(
        self, memory: Tensor, memory_lengths: Tensor, targets: Tensor
    ) -> tuple[int, int]:
        """Word errors of greedy CTC, and words; none without a CTC layer."""
        if self.model.ctc is None:
            return 0, 0
        texts = [self.text_transform.post_process(row) for row in targets]
        found = self.model.ctc.greedy(memory, memory_lengths)
        words = jiwer.process_words(texts, list(map(self.text_transform.post_process, found)))
        errors = words.substitutions + words.deletions + words.insertions
        return errors, words.substitutions + words.deletions + words.hits

    def on_validation_epoch_end(self) -> None:
        """Logs means over all utterances of all processes."""
        sums = self.trainer.strategy.reduce(self._validation_sums, reduce_op="sum")
        *means, utterances, errors, words = sums.tolist()
        for name, value in zip(VALIDATION_SUMS, means, strict=True):
            self.log(name, value / max(utterances, 1.0))
        if self.model.ctc is not None:
            self.log("wer_val", errors / max(words, 1.0), prog_bar=True)

    def test_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:  # noqa: ARG002
        """Decodes a batch into `decoded[dataloader_idx]`."""
        self.decoded.setdefault(dataloader_idx, []).extend(self.decode(batch))

    @torch.inference_mode()
    def decode(self, batch: dict[str, Any]) -> list[Decoded]:
        """Searches for the transcripts of a batch.

        Args:
            batch: As `collate_pad` makes it.

        Returns:
            One result an utterance.
        """
        start = time.perf_counter()
        memory, memory_lengths = self.model.encode(*model_inputs(batch))
        nbest = self.beam_search(memory, memory_lengths)
        seconds = (time.perf_counter() - start) / len(nbest)
        results = []
        for index, hypotheses in zip(batch["indices"].tolist(), nbest, strict=True):
            text, score = "", None
            if hypotheses:
                tokens = hypotheses[0].yseq[1:]
                text = self.text_transform.post_process(tokens[tokens != self.model.eos])
                score = float(hypotheses[0].score)
            results.append(Decoded(index, text, score, seconds))
        return results


def model_inputs(batch: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The streams of a batch and their lengths, in the form that `E2E` takes.

    Args:
        batch: As `collate_pad` makes it.

    Returns:
        Features and lengths by stream.
    """
    streams = [stream for stream in ("video", "audio") if f"{stream}s" in batch]
    features = {stream: batch[f"{stream}s"] for stream in streams}
    return features, {stream: batch[f"{stream}_lengths"] for stream in streams}


def warmup_cosine(step: int, warmup_steps: float, total_steps: float) -> float:
    """Share of the highest learning rate at a step.

    Args:
        step: Steps already made.
        warmup_steps: Steps in which the rate rises linearly.
        total_steps: Steps after which the rate is zero.

    Returns:
        Factor in [0, 1].
    """
    if step < warmup_steps:
        return min(1.0, (step + 1) / warmup_steps)
    progress = (step - warmup_steps) / max(1.0, total_steps - warmup_steps)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
