"""Train or evaluate a detector: options in, exit status out."""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
import os
import sys
from collections.abc import Sequence

import torch

from datasets import DatasetError, naming_dead_workers
from datasets.coco_names import COCO_NAMES
from models import list_models
from models.compiling import bounded_compilation
from tools.training import build_run, evaluate_only, train
from util.config import resolve_options
from util.distributed import destroy_process_group, get_rank, init_distributed_mode, lost_process, pick_device
from util.environment import record_environment
from util.errors import CheckpointError, NonFiniteLossError, OptionError
from util.option_rules import check_options
from util.options import OptionParser, build_parser
from util.reports import prepare_output
from util.resume import restore
from util.rng import seed_everything
from util.signals import STATUS_BASE, StopRequested, StopSignals

_log = logging.getLogger(__name__)


def get_args_parser() -> argparse.ArgumentParser:
    """Build the parser of all options, without ``--help`` so that it can be a parent."""
    return build_parser(list_models())


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Give every option its value.

    The command line wins, then `--options`, then `--config_file`, then the default of the model's own repository.
    A wrong or meaningless option ends the program with status 2 and one sentence.

    Args:
        argv: the command line without the program; None takes ``sys.argv``.
    """
    parser = OptionParser("main.py", description=__doc__, parents=[get_args_parser()], allow_abbrev=False)
    try:
        args, command_line, from_files = resolve_options(parser, argv)
        check_options(args, vars(get_args_parser().parse_args([])), command_line, from_files)
    except OptionError as error:
        parser.error(str(error))
    return args


def main(args: argparse.Namespace) -> None:
    """Train, or evaluate once with `--eval`.

    Raises:
        OptionError, CheckpointError, DatasetError, NonFiniteLossError: with a message for the user.
        StopRequested: a signal came; in training all is saved up to the last step.
    """
    with StopSignals() as stops:
        init_distributed_mode(args)
        start_run(args, stops)
    # Not before the run is forgotten: a wrapped model that outlives the group waits, with python's lock in its hands,
    # for a thread of the group that needs the lock.
    gc.collect()
    destroy_process_group()


def start_run(args: argparse.Namespace, stops: StopSignals) -> None:
    """Build the run, restore what it goes on from, and train or evaluate.

    Raises:
        As `main`.
    """
    folder = prepare_output(args, get_args_parser())
    device = pick_device(args.device, args.local_rank)
    record_environment(folder, device)
    seed_everything(args.seed + get_rank())
    run = build_run(args, device, folder, stops)
    restore(run.state, args, folder, coco_names=COCO_NAMES)
    compiling = bounded_compilation() if args.compile else contextlib.nullcontext()
    with naming_dead_workers(run.train_loader, run.val_loader), compiling:
        if args.eval:
            evaluate_only(run)
        else:
            train(run)


def run_command_line(argv: Sequence[str] | None = None) -> int:
    """Run the program; return its exit status, after one sentence on stderr when something is wrong.

    Returns:
        0, 1 after an error, 128 + N when signal N stopped the run.
    """
    args = parse_args(argv)
    try:
        main(args)
    except StopRequested as stop:
        _log.info("stopped by %s", stop)
        return STATUS_BASE + stop.number
    except Exception as error:
        text = user_message(error)
        process = f" (process {args.rank})" if args.world_size > 1 else ""
        if text is None or os.environ.get("DN_DETR_TRACEBACK") == "1":
            if process:
                sys.stderr.write(f"main.py: failed{process}:\n")
            raise
        sys.stderr.write(f"main.py: error{process}: {text}\n")
        return 1
    return 0


def user_message(error: Exception) -> str | None:
    """Return the sentence to show for an error that needs no traceback, None for one that does."""
    if isinstance(error, (OptionError, CheckpointError, DatasetError, NonFiniteLossError, torch.OutOfMemoryError)):
        # An error of a loading process arrives with its traceback as text; its last line says what happened.
        text = str(error).strip()
        return text.splitlines()[-1].partition(": ")[2] if text.startswith("Caught ") else text
    return lost_process(error)


if __name__ == "__main__":
    sys.exit(run_command_line())
