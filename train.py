#!/usr/bin/env python3
"""Trains a recogniser, averages its last epochs and scores the average on the test list."""

import filecmp
import shutil
import sys
from argparse import ArgumentParser
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datamodule.options import DEFAULT_LIST
from espnet.errors import one_line
from espnet.option_tree import changed, flag, from_flat, to_flat
from espnet.utils.option_checks import training_problems
from espnet.utils.options import BAD_CLIPS_CODE, Options, hide_gpus, train_parser
from espnet.utils.recipes import demo_options, recipe_options
from espnet.utils.run_config import completed, find_vocabulary, resumed_from, save_config
from espnet.utils.stopwatch import Stopwatch

if TYPE_CHECKING:  # torch takes seconds to import: not before the options are checked.
    import pytorch_lightning as pl

    from datamodule.data_module import DataModule
    from espnet.nets.pytorch_backend.e2e_asr_conformer import E2E

GRADIENT_CLIP = 10.0


def parse_args(argv: list[str] | None = None) -> tuple[Options, ArgumentParser]:
    """Parses, checks and resolves the options; ends with an error that names every problem."""
    parser = train_parser()

    def parse(**defaults: Any) -> Options:
        parser.set_defaults(**defaults)
        return from_flat(Options, vars(parser.parse_args(argv)))

    options = parse()
    name, demo = options.run.recipe, options.run.demo
    recipe = recipe_options(name, demo=demo, qlora=options.model.adaptation.use_qlora)
    options = parse(**recipe)
    if demo:
        options = parse(**{**demo_options(options.model), **recipe})
        make_corpus(options.data.root_dir, parser)
    options = changed(options, modality=options.model.encoders.resolved().modality)
    if problems := training_problems(options):
        parser.error("; ".join(problems))
    options = completed(options)
    data = options.data
    if not data.test_file and (Path(data.root_dir) / "labels" / DEFAULT_LIST).is_file():
        options = replace(options, data=replace(data, test_file=DEFAULT_LIST))
    return find_vocabulary(options, parser), parser


def make_corpus(root_dir: str, parser: ArgumentParser) -> None:
    """Makes the demo corpus in a folder, unless it is there."""
    from datamodule.demo_corpus import make_demo_corpus_of_job

    try:
        make_demo_corpus_of_job(root_dir)
    except (ValueError, RuntimeError, OSError) as error:
        parser.error(one_line(error))


def run(options: Options, watch: Stopwatch) -> str | None:
    """Trains, averages and scores; the watch takes the time of each part.

    Returns:
        What the error rates suffer from, a line; None if nothing is wrong.

    Raises:
        ValueError: If the data, a checkpoint or the hardware does not fit the options.
    """
    hide_gpus(options.hardware)
    import pytorch_lightning as pl

    from espnet.utils.building import (
        build_data,
        build_model,
        build_text_transform,
        check_positions,
    )
    from espnet.utils.checkpoint import load_model, transfer_weights
    from espnet.utils.recovery.checkpoint_io import remove_unfinished, whole_file
    from espnet.utils.recovery.interruption import ending_together
    from espnet.utils.trainer import package_versions, parameter_count, set_up_logging
    from lightning import ModelModule

    modality = options.model.encoders.modality
    set_up_logging(debug=options.hardware.debug)
    pl.seed_everything(options.data.seed, workers=True, verbose=False)
    text_transform = build_text_transform(options.model.decoder, options.data)
    data = build_data(options, modality, text_transform)
    data.setup("fit")
    if options.data.test_file:
        data.setup("test")
    check_positions(options.model, data, text_transform)
    model = build_model(options.model, text_transform)
    transferred = ""
    if options.training.pretrained_model_path:
        transferred = transfer_weights(
            model,
            options.training.pretrained_model_path,
            frontend=options.training.transfer_frontend,
            encoder=options.training.transfer_encoder,
            everything=options.training.transfer_all,
        )
    run_dir = Path(options.run.exp_dir) / options.run.exp_name
    resume = resume_path(options.run.ckpt_path, run_dir)
    read = {resume: read_resumable(resume, model)} if resume else {}
    resumed = resumed_from(options, resume, read[resume]) if resume else []
    module = ModelModule(model, text_transform, options.training, options.search, options.data.seed)
    trainer = make_trainer(options, model, run_dir, read)
    if trainer.is_global_zero and transferred:
        print(transferred)
    if trainer.is_global_zero and not options.run.fast_dev_run:
        run_dir.mkdir(parents=True, exist_ok=True)
        remove_unfinished(run_dir)
        with whole_file(run_dir / "config.yaml") as unfinished:
            config = {**to_flat(options), "resumed": resumed, "label_lists": data.contents}
            save_config(config, unfinished, package_versions())
        keep_vocabulary(options, run_dir)
        for name, (before, now) in (resumed[-1]["changed"] if resumed else {}).items():
            print(f"Resuming with {flag(name)} {now}, {before} before")
        print(f"Training {parameter_count(model)} ({modality}) in {run_dir}")
    watch.lap("preparing")
    with ending_together(trainer):
        fit(options, trainer, module, data, resume)
        watch.lap("training")
        if options.run.fast_dev_run or trainer.interrupted:
            return None
        problem = None
        average = run_dir / f"model_avg_{options.training.average_epochs}.pth"
        files = [average, *average_and_plot(trainer, run_dir, average)]
        watch.lap("averaging")
        if options.data.test_file:
            load_model(module.model, average)
            scores, problem = score(options, trainer, module, data, run_dir / "test")
            files += scores
            watch.lap("scoring")
    if trainer.is_global_zero:
        print("Files of the run:", *files, sep="\n  ")
        print(watch)
    return problem


def keep_vocabulary(options: Options, run_dir: Path) -> None:
    """Copies the SentencePiece model and its units, by their names, into the folder of the run."""
    from espnet.utils.recovery.checkpoint_io import whole_file

    for path in (options.data.sp_model_path, options.data.dict_path):
        kept = run_dir / Path(path or "").name
        if path and not (kept.is_file() and filecmp.cmp(path, kept, shallow=False)):
            with whole_file(kept) as unfinished:
                shutil.copyfile(path, unfinished)


def fit(
    options: Options,
    trainer: "pl.Trainer",
    module: "pl.LightningModule",
    data: "DataModule",
    resume: str | None,
) -> None:
    """Trains, or goes on from a checkpoint; a signal ends the process once its state is saved.

    Raises:
        ValueError: If Lightning refuses the options, or the memory does not suffice.
    """
    from pytorch_lightning.utilities.exceptions import MisconfigurationException

    from espnet.utils.recovery.failed_batch import FailedBatch
    from espnet.utils.recovery.interruption import Interrupted, Interruption, exit_interrupted

    of_type = {type(callback): callback for callback in trainer.callbacks}
    interruption = of_type.get(Interruption)
    try:
        with interruption.listening() if interruption else nullcontext():
            trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    except Interrupted as stop:
        exit_interrupted(stop, is_first=trainer.is_global_zero)
    except MisconfigurationException as error:
        raise ValueError(f"Lightning refuses the options: {one_line(error)}") from None
    except (RuntimeError, MemoryError) as error:
        if (remedy := of_type[FailedBatch].remedy(error, options)) is None:
            raise
        raise ValueError(remedy) from error


def resume_path(given: str | None, run_dir: Path) -> str | None:
    """The checkpoint to resume from; None to start anew, also for `last` before there is one."""
    if given != "last":
        return given
    last = run_dir / "last.ckpt"
    return str(last) if last.is_file() else None


def read_resumable(path: str, model: "E2E") -> dict[str, Any]:
    """Reads a checkpoint and loads it, to know before anything is written that it can be resumed.

    Raises:
        ValueError: If it cannot be read, holds weights only, or does not fit the model.
    """
    from espnet.utils.checkpoint import load_model, read_checkpoint

    content = read_checkpoint(path)
    if "optimizer_states" not in content:
        raise ValueError(
            f"--ckpt-path {path} holds weights only, a checkpoint of a run (.ckpt) is expected: to "
            "start from weights, use --pretrained-model-path"
        )
    load_model(model, path, content)
    return content


def make_trainer(
    options: Options, model: "E2E", run_dir: Path, read: dict[str, dict[str, Any]]
) -> "pl.Trainer":
    """Makes the trainer with its callbacks; `read` has checkpoints by path that need no reading."""
    from pytorch_lightning.callbacks import LearningRateMonitor

    from espnet.utils.recovery.checkpoint_io import WholeFileCheckpointIO
    from espnet.utils.trainer import build_logger, build_trainer

    callbacks = make_callbacks(options, run_dir)
    logger = build_logger(
        "none" if options.run.fast_dev_run else options.run.logger, run_dir, options.run.group_name
    )
    if logger:
        callbacks.append(LearningRateMonitor(logging_interval="step"))
    return build_trainer(
        options.hardware,
        model,
        callbacks=callbacks,
        plugins=[WholeFileCheckpointIO(read)],
        logger=logger,
        enable_checkpointing=not options.run.fast_dev_run,
        max_epochs=options.training.max_epochs,
        accumulate_grad_batches=options.training.accumulate_grad_batches,
        gradient_clip_val=GRADIENT_CLIP,
        fast_dev_run=options.run.fast_dev_run,
        overfit_batches=options.run.overfit_batches,
        default_root_dir=run_dir,
    )


def make_callbacks(options: Options, run_dir: Path) -> list["pl.Callback"]:
    """Makes what a run does beside training, in the order that the callbacks need."""
    from pytorch_lightning.callbacks import ModelCheckpoint

    from espnet.utils.recovery.callbacks import MetricsTable, ProgressLines
    from espnet.utils.recovery.failed_batch import FailedBatch
    from espnet.utils.recovery.interruption import Interruption
    from espnet.utils.recovery.probe import ProbeBatch

    failed = FailedBatch(None if options.run.fast_dev_run else run_dir)
    callbacks = [failed]
    if options.training.probe_batch:
        callbacks.append(ProbeBatch(failed))
    if not sys.stderr.isatty():
        callbacks.append(ProgressLines())
    if options.run.fast_dev_run:
        return callbacks
    # At an epoch's end after all others, and last.ckpt as the last of them: a run that is killed in
    # between makes the epoch again, and all that belongs to it.
    always = {"save_on_train_epoch_end": True, "enable_version_counter": False}
    best = ModelCheckpoint(run_dir, monitor="loss_val", filename="best", **always)
    epochs = ModelCheckpoint(
        run_dir,
        monitor="monitoring_step",
        mode="max",
        filename="{epoch}",
        save_top_k=options.training.average_epochs,
        save_last=True,
        **always,
    )
    interruption = Interruption(run_dir / "last.ckpt", options.run.save_minutes)
    return [*callbacks, MetricsTable(run_dir / "metrics.csv"), interruption, best, epochs]


def average_and_plot(trainer: "pl.Trainer", run_dir: Path, average: Path) -> list[Path]:
    """Averages the last epochs, draws the learning curve, and returns the run's other files."""
    from espnet.utils.checkpoint import average_checkpoints
    from espnet.utils.recovery.checkpoint_io import save_whole
    from espnet.utils.report import plot_learning_curve

    curve = run_dir / "learning_curve.png"
    _, of_epochs = trainer.checkpoint_callbacks
    saved = of_epochs.best_k_models  # path -> step
    epochs = sorted(map(Path, saved), key=lambda path: saved[str(path)])
    epochs = epochs or [run_dir / "last.ckpt"]  # A finished run that was moved and resumed.
    if trainer.is_global_zero:
        save_whole(average_checkpoints(epochs), average)
        plot_learning_curve(run_dir / "metrics.csv", curve)
    trainer.strategy.barrier()
    others = ("last.ckpt", "best.ckpt", "config.yaml", "metrics.csv")
    files = [*epochs, *(run_dir / name for name in others), curve]
    return [path for path in files if path.is_file()]


def score(
    options: Options,
    trainer: "pl.Trainer",
    module: "pl.LightningModule",
    data: "DataModule",
    output_dir: Path,
) -> tuple[list[Path], str | None]:
    """Scores the averaged model on the test list, and prints error rates.

    Returns:
        The new files, and what the error rates suffer from.
    """
    from espnet.utils.building import build_data
    from espnet.utils.evaluation import (
        all_conditions,
        bad_clips_problem,
        conditions_of,
        evaluate,
        format_summaries,
    )
    from espnet.utils.report import plot_wer, wer_table

    trained_for, snrs = options.model.encoders.modality, options.scoring.decode_snr_target
    conditions = conditions_of(trained_for, snrs)
    readers = {trained_for: data}
    if options.run.demo and any(options.model.modality_dropout):
        conditions = all_conditions(snrs)
        for modality in ("audio", "video"):
            readers[modality] = build_data(options, modality, data.text_transform)
            readers[modality].setup("test")
    summaries = evaluate(
        trainer,
        module,
        readers,
        conditions,
        output_dir,
        options.scoring.normalize,
        skip_bad_clips=options.data.skip_bad_clips,
    )
    files = [output_dir / f"hypotheses_{condition.name}.jsonl" for condition in conditions]
    files.append(output_dir / "summary.json")
    if trainer.is_global_zero:
        print(format_summaries(summaries))
        if summaries[0]["wer"] is not None:  # The list has transcripts.
            files.append(output_dir / "wer_over_snr.png")
            plot_wer(summaries, snrs, files[-1])
            print("", wer_table(summaries, snrs), sep="\n")
    return files, bad_clips_problem(summaries, output_dir)


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    watch = Stopwatch()
    options, parser = parse_args(argv)
    watch.lap("corpus" if options.run.demo else "options")
    try:
        problem = run(options, watch)
    except (ValueError, OSError) as error:
        if options.hardware.debug:
            raise
        parser.error(one_line(error))
    except (RuntimeError, MemoryError) as error:  # What fails in steps has been dealt with by now.
        from espnet.utils.recovery.failed_batch import memory_problem

        if options.hardware.debug or (problem := memory_problem(error, options)) is None:
            raise
        parser.error(problem)
    if problem:
        parser.exit(BAD_CLIPS_CODE, f"{parser.prog}: {problem}\n")


if __name__ == "__main__":
    main()
