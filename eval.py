#!/usr/bin/env python3
"""Scores a checkpoint or a published Whisper on a test list: hypotheses and error rates."""

from argparse import ArgumentParser
from pathlib import Path

from espnet.errors import one_line
from espnet.utils.option_checks import evaluation_problems
from espnet.utils.options import BAD_CLIPS_CODE, Options, eval_parser, hide_gpus
from espnet.utils.run_config import (
    completed,
    decoding_settings,
    find_vocabulary,
    parse_eval_args,
)


def parse_args(argv: list[str] | None = None) -> tuple[Options, str, ArgumentParser]:
    """Parses, checks and resolves the options; ends with an error that names every problem.

    Returns:
        Options of the model and the scoring, the modality to score, which may be a part of the
        model's, and the parser.
    """
    parser = eval_parser()
    options, modality = parse_eval_args(parser, argv)
    if problems := evaluation_problems(options, modality):
        parser.error("; ".join(problems))
    return find_vocabulary(completed(options), parser), modality, parser


def run(options: Options, modality: str) -> str | None:
    """Decodes, scores one modality and prints.

    Returns:
        What the error rates suffer from, a line; None if nothing is wrong.

    Raises:
        ValueError: If the data, the checkpoint or the hardware does not fit the options.
    """
    hide_gpus(options.hardware)
    import pytorch_lightning as pl

    from espnet.utils.building import (
        build_data,
        build_model,
        build_text_transform,
        check_positions,
    )
    from espnet.utils.checkpoint import load_model
    from espnet.utils.evaluation import (
        bad_clips_problem,
        conditions_of,
        evaluate,
        format_summaries,
    )
    from espnet.utils.trainer import build_trainer, set_up_logging
    from lightning import ModelModule

    set_up_logging(debug=options.hardware.debug)
    pl.seed_everything(options.data.seed, verbose=False)
    text_transform = build_text_transform(options.model.decoder, options.data)
    data = build_data(options, modality, text_transform)
    data.setup("test")
    check_positions(options.model, data, text_transform)
    model = build_model(options.model, text_transform)
    if options.training.pretrained_model_path:
        load_model(model, options.training.pretrained_model_path)
    scoring = options.scoring
    output_dir = Path(scoring.output_dir or default_output_dir(options, modality))
    summaries = evaluate(
        build_trainer(options.hardware, model, logger=False, enable_checkpointing=False),
        ModelModule(model, text_transform, search=options.search),
        {modality: data},
        conditions_of(modality, scoring.decode_snr_target),
        output_dir,
        scoring.normalize,
        skip_bad_clips=options.data.skip_bad_clips,
        settings=decoding_settings(options),
        resume=scoring.resume,
    )
    print(format_summaries(summaries))
    return bad_clips_problem(summaries, output_dir)


def default_output_dir(options: Options, modality: str) -> Path:
    """A folder for each test list and modality: beside the checkpoint, or here without one."""
    decoder = Path(options.model.decoder.decoder_name or "").name
    checkpoint = Path(options.training.pretrained_model_path or decoder)
    test_list = Path(options.data.test_file).stem
    return checkpoint.with_name(f"{checkpoint.stem}_{test_list}_{modality}")


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    options, modality, parser = parse_args(argv)
    try:
        problem = run(options, modality)
    except (ValueError, OSError) as error:
        if options.hardware.debug:
            raise
        parser.error(one_line(error))
    except (RuntimeError, MemoryError) as error:
        from espnet.utils.recovery.failed_batch import memory_problem

        if options.hardware.debug or (problem := memory_problem(error, options)) is None:
            raise
        parser.error(problem)
    if problem:
        parser.exit(BAD_CLIPS_CODE, f"{parser.prog}: {problem}\n")


if __name__ == "__main__":
    main()
