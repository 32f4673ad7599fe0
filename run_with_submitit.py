"""Run main.py as a Slurm job: the same options, plus what the job needs."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit

import main as program
from util.errors import OptionError
from util.signals import STATUS_BASE

# Slurm sends its signal so long before the job's end; step, checkpoint and requeue have to fit in.
SIGNAL_DELAY_S = 120


def get_args_parser() -> argparse.ArgumentParser:
    """Build the parser of the job's resources; every other argument goes to main.py."""
    parser = argparse.ArgumentParser("run_with_submitit.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("--ngpus", default=8, type=int, help="GPUs, and so processes, per node")
    parser.add_argument("--nodes", default=4, type=int)
    parser.add_argument("--timeout", default=60, type=int, help="job length in minutes")
    parser.add_argument("--job_dir", default="", help="folder of the job; %%j becomes its number")
    parser.add_argument("--job_name", default=None)
    parser.add_argument("--qos", default=None, help="quality of service class")
    parser.add_argument("--requeue", action="store_true", help="ask Slurm to requeue after preemption")
    parser.add_argument("--mail_type", default="ALL", help="events to mail about; used with --mail_user")
    parser.add_argument("--mail_user", default="", help="whom to mail; empty: nobody")
    parser.add_argument("--partition", default=None)
    parser.add_argument("--account", default=None)
    parser.add_argument("--constraint", default=None, help="node features")
    parser.add_argument("--cpus_per_task", default=10, type=int)
    parser.add_argument("--mem_gb", default=0, type=int, help="memory per node; 0: all of it")
    return parser


@dataclass
class Trainer:
    """What a job's process does; pickled by submitit.

    Attributes:
        argv: command line of main.py.
        folder: job folder, "%j" not yet filled in; output folder when the command line names none.
    """

    argv: list[str]
    folder: str

    def __call__(self) -> None:
        """Join the other processes of the job and run main.py.

        Raises:
            RuntimeError: main.py failed and has said why, or was stopped and the job not ended.
        """
        job = submitit.JobEnvironment()
        # RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, fresh at every start of the job. Every process
        # sees all GPUs of its node and takes the one of its local rank.
        submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        # After a node failure Slurm starts the submission as it was, without `checkpoint`.
        argv = self.resuming() if int(os.environ.get("SLURM_RESTART_COUNT") or 0) else self.with_output_dir()
        status = program.run_command_line(argv)
        if status > STATUS_BASE:
            wait_for_restart(status - STATUS_BASE)
        if status:
            raise RuntimeError(
                f"main.py ended with status {status} on process {job.global_rank}, see its message above"
            )

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Say how to start again after preemption or time-out: the same, from the newest checkpoint."""
        return submitit.helpers.DelayedSubmission(Trainer(self.resuming(), self.folder))

    def with_output_dir(self) -> list[str]:
        """Return the command line with the job folder as output folder, unless it names another."""
        if program.parse_args(self.argv).output_dir:
            return self.argv
        return [*self.argv, "--output_dir", self.folder.replace("%j", str(submitit.JobEnvironment().job_id))]

    def resuming(self) -> list[str]:
        """Return the command line of a further start: from the newest checkpoint of the first ones, if they left any.

        An evaluation stays as it is.
        """
        argv = self.with_output_dir()
        args = program.parse_args(argv)
        has_checkpoint = any(Path(args.output_dir).expanduser().glob("checkpoint*.pth"))
        if args.eval or args.resume == "auto" or not has_checkpoint:
            return argv
        # Of two --resume the last one counts.
        return [*argv, "--resume", "auto"]


def wait_for_restart(number: int) -> None:
    """Let submitit requeue the job after main.py has saved and stopped; returns only when nobody ended the process.

    main.py gave the signals back to submitit, which requeues on its own one and lets SIGTERM pass: that is what
    Slurm sends before it kills, and when it does so to requeue the job, a process that had ended would count as a
    finished job.

    Args:
        number: the signal that stopped main.py.
    """
    if number != signal.SIGTERM:
        signal.raise_signal(getattr(signal, f"SIG{submitit.JobEnvironment.USR_SIG}"))
    time.sleep(SIGNAL_DELAY_S)


def slurm_parameters(resources: argparse.Namespace) -> dict[str, Any]:
    """Turn the options into submitit's parameters; what was not given is left to the cluster."""
    mail = {"mail-type": resources.mail_type, "mail-user": resources.mail_user} if resources.mail_user else {}
    extra: dict[str, Any] = {**mail, **({"requeue": True} if resources.requeue else {})}
    parameters: dict[str, Any] = {
        "name": resources.job_name or "detr",
        "nodes": resources.nodes,
        "tasks_per_node": max(resources.ngpus, 1),
        "timeout_min": resources.timeout,
        "cpus_per_task": resources.cpus_per_task,
        "slurm_signal_delay_s": SIGNAL_DELAY_S,
        # A process that fails ends the others, which would wait for it until --dist_timeout.
        "slurm_srun_args": ["--kill-on-bad-exit=1"],
    }
    if resources.ngpus:
        parameters["gpus_per_node"] = resources.ngpus
    optional = {
        "slurm_partition": resources.partition,
        "slurm_account": resources.account,
        "slurm_constraint": resources.constraint,
        "slurm_qos": resources.qos,
        "slurm_additional_parameters": extra or None,
    }
    parameters["slurm_mem"] = f"{resources.mem_gb}GB" if resources.mem_gb else "0"
    return parameters | {name: value for name, value in optional.items() if value}


def submit(argv: Sequence[str] | None = None) -> submitit.Job[None]:
    """Submit the job and return it.

    Raises:
        OptionError: there is no job folder.
    """
    resources, rest = get_args_parser().parse_known_args(argv)
    if not resources.job_dir:
        raise OptionError("a job needs a folder on a file system that all nodes see: pass --job_dir FOLDER/%j")
    # Refuses wrong options here and now instead of in the queue.
    program.parse_args(rest)
    folder = str(Path(resources.job_dir).expanduser().resolve())
    executor = submitit.AutoExecutor(folder=folder, slurm_max_num_timeout=30)
    executor.update_parameters(**slurm_parameters(resources))
    return executor.submit(Trainer(list(rest), folder))


def run_command_line(argv: Sequence[str] | None = None) -> int:
    """Submit and tell the job's number; return the exit status."""
    try:
        job = submit(argv)
    except OptionError as error:
        sys.stderr.write(f"run_with_submitit.py: error: {error}\n")
        return 2
    sys.stdout.write(f"submitted job {job.job_id}\n")
    return 0


if __name__ == "__main__":
    sys.exit(run_command_line())
