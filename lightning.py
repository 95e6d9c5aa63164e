"""Lightning module: loss, optimiser, schedule, validation and decoding of a recogniser."""

import logging
import math
import time
from collections.abc import Callable
from typing import Any

import jiwer
import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from datamodule.bad_clip import BadClip, by_cause
from datamodule.loaders import model_inputs
from datamodule.text_transform import TextTransform
from espnet.nets.pytorch_backend.ctc import ctc_frames_needed
from espnet.nets.pytorch_backend.e2e_asr_conformer import E2E
from espnet.nets.pytorch_backend.encoded import Encoded, join_video
from espnet.nets.pytorch_backend.nets_utils import send
from espnet.nets.pytorch_backend.pretrained import bases
from espnet.nets.pytorch_backend.qlora_utils import trainable_parameters
from espnet.nets.search import build_beam_search
from espnet.nets.search_options import SearchOptions
from espnet.utils.checkpoint import VOCABULARY, check_bases, check_vocabulary, without_bases
from espnet.utils.evaluation import Decoded, gather
from espnet.utils.optimizer import build_optimizer, parameter_groups
from espnet.utils.options import TrainingOptions

logger = logging.getLogger(__name__)

TRAINING_SUMS = ("loss", "loss_ctc", "loss_att", "decoder_acc")
COUNTS = ("bad_clips", "skipped_utterances", "short_utterances", "nonfinite_steps")
VALIDATION_SUMS = ("loss_val", "loss_ctc_val", "loss_att_val", "decoder_acc_val")


class ModelModule(pl.LightningModule):
    """Trains, validates and decodes with an `E2E` model.

    Args:
        model: Recogniser.
        text_transform: Its vocabulary.
        training: The rates rise in the warm-up, and then fall to zero along a cosine.
        search: How it decodes; what is open follows from the model.
        seed: Of dropout; each step draws from a generator that depends on the seed, the epoch,
            the batch and the process only, so that a resumed run draws what it would have drawn.

    Attributes:
        wishes: What this process asks of all of them, 0 or 1 each; callbacks fill it in before a
            step. It goes with a reduction that every step makes anyway.
        agreed: In the same order, how many processes asked for it.
        on_decoded: Takes the number of a test loader, and the results of each of its batches.
    """

    def __init__(
        self,
        model: E2E,
        text_transform: TextTransform,
        training: TrainingOptions | None = None,
        search: SearchOptions | None = None,
        seed: int = 42,
    ) -> None:
        super().__init__()
        self.model = model
        self.text_transform = text_transform
        self.training_options = training or TrainingOptions()
        self.seed = seed
        self.beam_search = build_beam_search(
            model, search or SearchOptions(), text_transform.token_list
        )
        self._groups: list[tuple[float, float]] = []  # highest rate and weight decay of each
        self.on_decoded: Callable[[int, list[Decoded]], None] | None = None
        self.strict_loading = not bases(model)  # What they bring back is not in checkpoints.
        self.wishes: list[float] = []
        self.agreed: list[float] = []
        self._training_sums: Tensor | None = None  # of the current epoch, until they are logged
        self._validation_sums: Tensor | None = None
        self._bad_clips: list[BadClip] = []  # of the current epoch, in this process
        self._statistics: list[Tensor] = []
        self._everywhere = 0.0  # utterances of the current batch, in all processes
        self._empty = 0.0  # processes whose batch has no utterance
        self._utterances = 0.0  # of the current step, in all processes

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW; `on_train_batch_start` sets the rates."""
        options = self.training_options
        groups = parameter_groups(
            self.model,
            lr=options.lr,
            lr_pretrained=options.lr_pretrained,
            weight_decay=options.weight_decay,
        )
        # Lightning refuses to clip for a fused step in any mixed precision, bfloat16 too.
        fused = "mixed" not in self.trainer.precision
        self._groups = [(group["lr"], group["weight_decay"]) for group in groups]
        return build_optimizer(options.optimizer, groups, fused=fused)

    def _set_rates(self, batch_idx: int) -> None:
        """Sets rates that rise linearly and then fall along a cosine, and the weight decay.

        They follow from the options and the place in the training, not from what a checkpoint has:
        a resumed run may have other options, and another number of steps in an epoch.
        """
        trainer, options = self.trainer, self.training_options
        every = trainer.accumulate_grad_batches
        steps = -(-trainer.num_training_batches // every)  # in an epoch
        step = trainer.current_epoch * steps + batch_idx // every
        factor = warmup_cosine(step, steps * options.warmup_epochs, steps * trainer.max_epochs)
        for group, (rate, decay) in zip(
            self.optimizers(use_pl_optimizer=False).param_groups, self._groups, strict=True
        ):
            group.update(lr=factor * rate, weight_decay=decay)

    def transfer_batch_to_device(
        self, batch: dict[str, Any], device: torch.device, dataloader_idx: int
    ) -> dict[str, Any]:
        """Moves the streams; shapes depend on the rest, which is read on the host."""
        streams = {name: batch[name] for name in ("videos", "audios") if name in batch}
        return batch | super().transfer_batch_to_device(streams, device, dataloader_idx)

    def on_train_start(self) -> None:
        """Takes up the sums of an epoch that was cut short."""
        if self._training_sums is not None:
            self._training_sums = self._training_sums.to(self.device)
            if self.trainer.is_last_batch:  # It was cut short before its validation.
                self._log_training_sums()

    def on_train_batch_start(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Seeds the step and keeps the batch statistics, in case the step must be undone."""
        if batch_idx == 0:
            sums = len(TRAINING_SUMS) + 1 + len(COUNTS)
            self._training_sums = torch.zeros(sums, dtype=torch.float64, device=self.device)
        self.model.ctc_alone = self.current_epoch < self.training_options.ctc_first_epochs
        entropy = [self.seed, self.current_epoch, batch_idx, self.global_rank]
        torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]))
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self._utterances = 0.0
            self._set_rates(batch_idx)
            self._statistics = [buffer.clone() for buffer in self.model.buffers()]
        self._tell_the_others(len(batch["indices"]))

    def _tell_the_others(self, size: int) -> None:
        """Tells the other processes this one's batch size and wishes, and hears theirs."""
        sizes = [float(size), float(size == 0), *self.wishes]
        if self.trainer.world_size > 1:
            sizes = send(torch.tensor(sizes), self.device)
            sizes = self.trainer.strategy.reduce(sizes, reduce_op="sum").tolist()
        self._everywhere, self._empty, *self.agreed = sizes

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:  # noqa: ARG002
        """Loss of a batch, summed over its utterances; the step's gradient is that of the mean."""
        size = len(batch["indices"])
        self._count("bad_clips", batch["num_bad_clips"])
        self._bad_clips += batch.get("bad_clips", [])
        self._count("skipped_utterances", size if self._empty else 0)
        if self._empty:  # Where one process has bad clips only, none can compute statistics.
            return sum(parameter.sum() * 0.0 for parameter in trainable_parameters(self.model))
        streams, lengths = model_inputs(batch)
        loss, loss_ctc, loss_att, accuracy = self.model(streams, lengths, batch["targets"])
        if self.model.ctc_weight:
            frames = self.model.ctc_lengths(lengths)
            too_short = frames < ctc_frames_needed(batch["targets"])
            self._count("short_utterances", int(too_short.sum()))
        self.log("loss_step", loss, prog_bar=True, batch_size=size)
        values = torch.stack([loss, loss_ctc, loss_att, accuracy, torch.ones_like(loss)]).detach()
        self._training_sums[: len(values)] += (values * size).where(loss.isfinite(), 0.0)
        self._utterances += self._everywhere
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
        self._training_sums[len(TRAINING_SUMS) + 1 + COUNTS.index(name)] += value

    def on_train_batch_end(self, outputs: Any, batch: dict[str, Any], batch_idx: int) -> None:  # noqa: ARG002
        """Logs what the epoch has summed up; later, callbacks would not see it at its end."""
        if self.trainer.is_last_batch:
            self._log_training_sums()

    def _log_training_sums(self) -> None:
        """Logs means over the utterances, and counts, of all processes."""
        sums = self.trainer.strategy.reduce(self._training_sums, reduce_op="sum").tolist()
        self._training_sums = None
        *means, utterances = sums[: len(TRAINING_SUMS) + 1]
        values = dict(zip(COUNTS, sums[len(TRAINING_SUMS) + 1 :], strict=True))
        if utterances:
            values |= {n: v / utterances for n, v in zip(TRAINING_SUMS, means, strict=True)}
        self._tell_bad_clips(values["bad_clips"], "the training")
        if not self.model.ctc_weight:
            del values["short_utterances"]
        values["monitoring_step"] = float(self.global_step)
        self.log_dict(values, on_step=False, on_epoch=True, batch_size=1)

    def _tell_bad_clips(self, number: float, where: str) -> None:
        """Logs what stood in the way of an epoch's bad clips, so many in all processes."""
        found, self._bad_clips = self._bad_clips, []
        if not number or self.trainer.sanity_checking:
            return
        found = gather(found)
        if found and self.trainer.is_global_zero:
            epoch = self.current_epoch + 1
            logger.warning("%s of epoch %d left out %s", where, epoch, by_cause(found))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leaves out what loading the model's bases brings back; names them and the vocabulary."""
        if self.model.vocabulary:
            checkpoint[VOCABULARY] = self.model.vocabulary
        if self._training_sums is not None:  # in the middle of an epoch
            sums = self._training_sums.clone()  # The reduction may be in place.
            checkpoint["training_sums"] = self.trainer.strategy.reduce(sums, reduce_op="sum").cpu()
        if bases(self.model):
            state, found = without_bases(self.model, checkpoint["state_dict"], "model.")
            checkpoint.update(state_dict=state, bases=found)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint of a model on other bases, or with another vocabulary."""
        check_bases(self.model, checkpoint, "to resume from")
        check_vocabulary(self.model, checkpoint, "to resume from")
        self._training_sums = checkpoint.get("training_sums")
        if self._training_sums is not None and self.global_rank > 0:
            self._training_sums.zero_()  # They are those of all processes.

    def on_validation_epoch_start(self) -> None:
        """Begins new sums."""
        self._validation_sums = torch.zeros(len(VALIDATION_SUMS) + 5, device=self.device)
        self._bad_clips = []

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:  # noqa: ARG002
        """Adds a batch to losses, accuracy and the word errors of greedy CTC."""
        self._bad_clips += batch.get("bad_clips", [])
        self._validation_sums[-1] += batch["num_bad_clips"]
        if not len(batch["indices"]):
            return
        targets = batch["targets"]
        encoded = self.model.encode(*model_inputs(batch))
        values = torch.stack(self.model.losses(encoded, targets))
        words = self._greedy_errors(encoded, targets)
        sizes = send(torch.tensor([float(len(targets)), *words]), self.device)
        finite = values[0].isfinite()
        self._validation_sums[:-2] += torch.cat([values * len(targets), sizes]).where(finite, 0.0)
        self._validation_sums[-2] += ~finite

    def _greedy_errors(self, encoded: Encoded, targets: Tensor) -> tuple[int, int]:
        """Word errors of greedy CTC, and words; none without a CTC layer."""
        if self.model.ctc is None:
            return 0, 0
        texts = [self.text_transform.post_process(row) for row in targets]
        memory = join_video(encoded.memory, encoded.video)
        found = self.model.ctc.greedy(memory, encoded.lengths)
        words = jiwer.process_words(texts, list(map(self.text_transform.post_process, found)))
        errors = words.substitutions + words.deletions + words.insertions
        return errors, words.substitutions + words.deletions + words.hits

    def on_validation_epoch_end(self) -> None:
        """Logs means over all utterances of all processes."""
        sums = self.trainer.strategy.reduce(self._validation_sums, reduce_op="sum")
        *means, utterances, errors, words, left_out, bad_clips = sums.tolist()
        self._tell_bad_clips(bad_clips, "the validation")
        if left_out:
            logger.warning("%d validation batches have no finite loss: they are left out", left_out)
        for name, value in zip(VALIDATION_SUMS, means, strict=True):
            self.log(name, value / max(utterances, 1.0))
        if self.model.ctc is not None:
            self.log("wer_val", errors / max(words, 1.0), prog_bar=True)

    def test_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:  # noqa: ARG002
        """Decodes a batch, and tells `on_decoded` what was found."""
        found = self.decode(batch) if len(batch["indices"]) else []
        for clip in batch.get("bad_clips", []):
            found.append(Decoded(clip.index, "", None, None, error=str(clip)))
        if self.on_decoded is not None:
            self.on_decoded(dataloader_idx, found)

    @torch.inference_mode()
    def decode(self, batch: dict[str, Any]) -> list[Decoded]:
        """Searches for the transcripts of a batch.

        Args:
            batch: As `collate_pad` makes it.

        Returns:
            One result an utterance.
        """
        start = time.perf_counter()
        encoded = self.model.encode(*model_inputs(batch))
        nbest = self.beam_search(*encoded)
        seconds = (time.perf_counter() - start) / len(nbest)
        results = []
        rows = zip(batch["indices"].tolist(), encoded.lengths.tolist(), nbest, strict=True)
        for index, frames, hypotheses in rows:
            text, score, is_cut = "", None, False
            if hypotheses:
                tokens = hypotheses[0].yseq[1:]
                text = self.text_transform.post_process(tokens[tokens != self.model.eos])
                score = float(hypotheses[0].score)
                is_cut = self.beam_search.is_cut(hypotheses[0], frames)
            results.append(Decoded(index, text, score, seconds, is_cut=is_cut))
        return results


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
