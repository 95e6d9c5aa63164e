#!/usr/bin/env python3
"""Scores a checkpoint or a published Whisper on a test list: hypotheses and error rates."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from espnet.utils.model_options import complete_model
from espnet.utils.option_checks import evaluation_problems
from espnet.utils.options import eval_parser, one_line
from espnet.utils.run_config import find_vocabulary, parse_eval_args


def parse_args(argv: list[str] | None = None) -> tuple[Namespace, str, ArgumentParser]:
    """Parses and checks the command line; ends with an error that names every problem.

    Args:
        argv: Command line; None for that of the process.

    Returns:
        Options, the modality that the model was trained for, and the parser.
    """
    parser = eval_parser()
    args, model_modality = parse_eval_args(parser, argv)
    if problems := evaluation_problems(args, model_modality):
        parser.error("; ".join(problems))
    complete_model(args, model_modality)
    find_vocabulary(args, parser)
    return args, model_modality, parser


def run(args: Namespace, model_modality: str) -> None:
    """Decodes, scores and prints.

    Args:
        args: Options.
        model_modality: What the model was trained for; `args.modality` may be a part of it.

    Raises:
        ValueError: If the data, the checkpoint or the hardware does not fit the options.
    """
    import pytorch_lightning as pl

    from espnet.utils.building import (
        build_data,
        build_model,
        build_module,
        build_text_transform,
        check_positions,
    )
    from espnet.utils.checkpoint import load_model
    from espnet.utils.evaluation import conditions_of, evaluate, format_summaries
    from espnet.utils.trainer import build_trainer, set_up_logging

    set_up_logging(debug=args.debug)
    pl.seed_everything(args.seed, verbose=False)
    text_transform = build_text_transform(args)
    data = build_data(args, args.modality, text_transform)
    data.setup("test")
    check_positions(args, data, text_transform)
    model = build_model(args, model_modality, text_transform)
    if args.pretrained_model_path:
        load_model(model, args.pretrained_model_path)
    summaries = evaluate(
        build_trainer(args, model, logger=False, enable_checkpointing=False),
        build_module(args, model, text_transform),
        {args.modality: data},
        conditions_of(args.modality, args.decode_snr_target),
        Path(args.output_dir or default_output_dir(args)),
        args.normalize,
    )
    print(format_summaries(summaries))


def default_output_dir(args: Namespace) -> Path:
    """A folder for each test list and modality: beside the checkpoint, or here without one."""
    checkpoint = Path(args.pretrained_model_path or Path(args.decoder_name).name)
    return checkpoint.with_name(f"{checkpoint.stem}_{Path(args.test_file).stem}_{args.modality}")


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    args, model_modality, parser = parse_args(argv)
    try:
        run(args, model_modality)
    except (ValueError, OSError) as error:
        if args.debug:
            raise
        parser.error(one_line(error))


if __name__ == "__main__":
    main()
