from dataclasses import replace

import pytest
import pytorch_lightning as pl
import torch

from datamodule.data_module import DataModule
from datamodule.options import DataOptions
from datamodule.text_transform import TextTransform
from espnet.nets.pytorch_backend.e2e_asr_conformer import E2E
from espnet.nets.search_options import SearchOptions
from espnet.utils.options import TrainingOptions
from lightning import ModelModule, warmup_cosine
from tests.device_waits import DEVICE, OnDevice, Waits, to_device


@pytest.fixture
def text_transform(corpus):
    spm = corpus / "spm"
    return TextTransform(
        sp_model_path=str(spm / "unigram.model"), dict_path=str(spm / "unigram_units.txt")
    )


@pytest.fixture
def data(corpus, text_transform):
    options = DataOptions(
        root_dir=str(corpus),
        train_file="train.csv",
        val_file="val.csv",
        test_file="test.csv",
        max_frames=300,
        train_num_buckets=1,
        num_workers=0,
    )
    data = DataModule(options, streams=("audio",), text_transform=text_transform)
    data.setup("fit")
    data.setup("test")
    return data


@pytest.fixture
def model(text_transform):
    torch.manual_seed(0)
    return E2E.from_keywords(
        text_transform.odim,
        "audio",
        adim=16,
        aheads=2,
        eunits=16,
        elayers=1,
        dunits=16,
        dlayers=1,
        cnn_module_kernel=7,
        audio_width=2,
    )


@pytest.fixture
def module(model, text_transform):
    return ModelModule(
        model,
        text_transform,
        TrainingOptions(warmup_epochs=0),
        SearchOptions(beam_size=3),
    )


def fit(module, data, **options):
    trainer = pl.Trainer(
        **{"max_epochs": 1, **options},
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=10.0,
    )
    trainer.fit(module, datamodule=data)
    return trainer


def weights(module):
    return {name: value.clone() for name, value in module.model.state_dict().items()}


class Spoil(pl.Callback):
    """Makes the audio of one batch infinite, which no check of the data has seen."""

    def __init__(self, step):
        self.step = step
        self.before = self.after = None

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == self.step:
            self.before = weights(module)
            batch["audios"][0] = float("inf")

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch_idx == self.step:
            self.after = weights(module)


def test_a_step_that_is_not_finite_is_undone_and_counted(module, data):
    spoil = Spoil(step=0)
    trainer = fit(module, data, callbacks=[spoil])
    for name, value in spoil.before.items():
        torch.testing.assert_close(spoil.after[name], value, msg=name)
    assert trainer.callback_metrics["nonfinite_steps"] == 1
    assert all(value.isfinite().all() for value in module.model.state_dict().values())
    assert any(not torch.equal(v, spoil.after[n]) for n, v in weights(module).items())


class DropClips(pl.Callback):
    """Stands for a batch whose clips are all unreadable."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == 1:
            self.before = weights(module)
            batch.clear()
            batch.update(indices=torch.empty(0, dtype=torch.int64), num_bad_clips=3)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch_idx == 1:
            self.after = weights(module)


def test_a_batch_without_a_good_clip_changes_nothing(module, data):
    drop = DropClips()
    trainer = fit(module, data, callbacks=[drop])
    for name, value in drop.before.items():
        torch.testing.assert_close(drop.after[name], value, msg=name)
    assert trainer.callback_metrics["bad_clips"] == 3
    assert trainer.callback_metrics["nonfinite_steps"] == 0


class Shorten(pl.Callback):
    """Leaves the first utterance of each batch too short for its target."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        batch["audio_lengths"][0] = 1280


def test_utterances_that_are_too_short_for_ctc_are_counted(module, data):
    trainer = fit(module, data, callbacks=[Shorten()])
    assert trainer.callback_metrics["short_utterances"] == trainer.num_training_batches
    assert trainer.callback_metrics["nonfinite_steps"] == 0


def test_training_logs_what_it_says(module, data):
    metrics = fit(module, data).callback_metrics
    names = ["loss", "loss_ctc", "loss_att", "decoder_acc", "monitoring_step", "bad_clips"]
    names += ["loss_val", "loss_ctc_val", "loss_att_val", "decoder_acc_val", "wer_val"]
    assert {name for name in names if name not in metrics} == set()
    mixed = 0.1 * metrics["loss_ctc_val"] + 0.9 * metrics["loss_att_val"]
    torch.testing.assert_close(metrics["loss_val"], mixed, rtol=1e-5, atol=1e-5)


def test_training_figures_are_means_over_the_utterances_of_the_epoch(module, data):
    """Of all its batches, whatever their sizes, and of no other epoch."""
    data.options = replace(data.options, max_frames=250)
    sums = []

    class Collect(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            size = len(batch["indices"])
            sums.append((trainer.current_epoch, size, size * trainer.callback_metrics["loss_step"]))

    metrics = fit(module, data, callbacks=[Collect()], max_epochs=2).callback_metrics
    last = [(size, total) for epoch, size, total in sums if epoch == 1]
    assert len({size for size, _ in last}) > 1
    expected = sum(total for _, total in last) / sum(size for size, _ in last)
    torch.testing.assert_close(metrics["loss"], expected)


def test_processes_tell_each_other_what_they_want(module, data):
    found = []

    class Ask(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            module.wishes = [0.0, float(batch_idx == 1)]

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            found.append(module.agreed)

    fit(module, data, callbacks=[Ask()])
    assert found[:2] == [[0.0, 0.0], [0.0, 1.0]]


def test_validation_is_the_mean_over_utterances_however_they_are_batched(module, data):
    results = []
    for max_frames in (300, 80):
        data.options = replace(data.options, max_frames=max_frames)
        trainer = pl.Trainer(
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
        )
        results.append(
            trainer.validate(module, dataloaders=data.val_dataloader(), verbose=False)[0]
        )
    assert results[0] == pytest.approx(results[1], rel=1e-4)


def test_validation_leaves_out_what_is_not_finite(module, data, caplog):
    class SpoilValidation(pl.Callback):
        def on_validation_batch_start(self, trainer, module, batch, batch_idx):
            batch["audios"][0] *= float("inf") if batch_idx == 0 else 1

    data.options = replace(data.options, max_frames=80)
    metrics = fit(module, data, callbacks=[SpoilValidation()]).callback_metrics
    assert metrics["loss_val"].isfinite()
    assert metrics["loss_val"] > 0
    assert "1 validation batches have no finite loss" in caplog.text


class OnPretendedDevice(ModelModule):
    """Works on the pretended device, of which Lightning does not know."""

    def configure_optimizers(self):
        to_device(self.model)
        self._device = DEVICE
        self._groups = [(1e-3, 0.0)]
        return torch.optim.AdamW(self.parameters(), lr=1e-3, foreach=False)

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        return super().transfer_batch_to_device(batch, DEVICE, dataloader_idx)


class CountWaits(pl.Callback):
    """Notes the waits of each training and validation batch."""

    def __init__(self, waits):
        self.waits = waits
        self.training, self.validation = [], []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        assert isinstance(batch["audios"], OnDevice)
        self.waits.places.clear()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if not trainer.is_last_batch:  # after which the epoch's figures are read
            self.training.append(dict(self.waits.places))

    def on_validation_batch_start(self, trainer, module, batch, batch_idx):
        self.waits.places.clear()

    def on_validation_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.validation.append(dict(self.waits.places))


def test_a_step_waits_once_for_the_device(model, text_transform, data):
    """To see whether its gradient is finite; a validation batch for its tokens."""
    data.options = replace(data.options, max_frames=80)
    module = OnPretendedDevice(model, text_transform)
    with Waits() as waits:
        count = CountWaits(waits)
        metrics = fit(module, data, callbacks=[count], num_sanity_val_steps=0).callback_metrics
    assert len(count.training) > 1
    assert {sum(places.values()) for places in count.training} == {1}
    assert {sum(places.values()) for places in count.validation} == {1}
    assert metrics["nonfinite_steps"] == 0
    assert metrics["loss"] > 0


def test_decoding_finds_the_text_or_nothing(module, data):
    module.eval()
    batch = next(iter(data.test_dataloader()))
    decoded = module.decode(batch)
    assert [result.index for result in decoded] == batch["indices"].tolist()
    assert all("<eos>" not in result.hypothesis for result in decoded)
    assert all(result.seconds > 0 for result in decoded)
    module.beam_search = lambda memory, lengths, video: [[] for _ in lengths]  # noqa: ARG005
    nothing = module.decode(batch)
    assert [(result.hypothesis, result.score) for result in nothing] == [("", None)] * len(
        batch["indices"]
    )


def test_rate_rises_linearly_and_falls_along_a_cosine():
    rates = [warmup_cosine(step, 4, 12) for step in range(14)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[8] == pytest.approx(0.5)
    assert rates[12:] == pytest.approx([0, 0], abs=1e-12)
    assert all(one >= two for one, two in zip(rates[4:], rates[5:], strict=False))
    assert warmup_cosine(0, 0, 10) == 1.0
    assert warmup_cosine(0, 0.5, 10) == 1.0


def test_overfits_four_utterances_to_the_exact_text(corpus, text_transform):
    torch.manual_seed(0)
    options = DataOptions(
        root_dir=str(corpus),
        train_file="test.csv",
        val_file=None,
        test_file="test.csv",
        max_frames=300,
        num_workers=0,
        noise_file=(str(corpus / "noise" / "babble.wav"),),
    )
    data = DataModule(options, streams=("audio",), text_transform=text_transform)
    data.setup("fit")
    data.setup("test")
    model = E2E.from_keywords(
        text_transform.odim,
        "audio",
        0.3,
        adim=48,
        aheads=2,
        eunits=96,
        elayers=1,
        dunits=96,
        dlayers=1,
        cnn_module_kernel=7,
        audio_width=4,
        dropout_rate=0.0,
    )
    module = ModelModule(
        model,
        text_transform,
        TrainingOptions(lr=3e-3, warmup_epochs=10),
        SearchOptions(beam_size=4),
    )
    data.train_dataset.audio_transform = data.test_datasets[999999].audio_transform
    fit(module, data, max_epochs=120, limit_val_batches=0)
    module.eval()
    batch = next(iter(data.test_dataloader()))
    found = {result.index: result.hypothesis for result in module.decode(batch)}
    assert found == {i: data.test_datasets[999999].text(i) for i in found}
    assert len(found) == 4
