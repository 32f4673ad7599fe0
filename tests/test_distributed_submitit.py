"""The Slurm front end and the launch script."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import submitit

import main as program
import run_with_submitit as front
from util.errors import OptionError

REPOSITORY = Path(__file__).resolve().parents[1]


def parse(*argv: str) -> Any:
    """Parse the job's own options."""
    return front.get_args_parser().parse_known_args(argv)[0]


def test_job_options_have_official_defaults() -> None:
    golden = json.loads((REPOSITORY / "tests" / "golden" / "cli_defaults.json").read_text())["run_with_submitit"]
    values = vars(parse())
    for dest, default in golden.values():
        assert values[dest] == default, dest
    assert values["mail_user"] == ""


def test_parameters_name_only_what_was_given() -> None:
    parameters = front.slurm_parameters(parse("--ngpus", "2", "--nodes", "3", "--timeout", "90"))
    assert parameters == {
        "name": "detr",
        "nodes": 3,
        "tasks_per_node": 2,
        "gpus_per_node": 2,
        "timeout_min": 90,
        "cpus_per_task": 10,
        "slurm_signal_delay_s": 120,
        "slurm_srun_args": ["--kill-on-bad-exit=1"],
        "slurm_mem": "0",
    }


def test_parameters_carry_every_option() -> None:
    flags = (
        "--ngpus 0 --job_name n --qos q --requeue --mail_user a@b --partition p --account a --constraint c --mem_gb 7"
    )
    parameters = front.slurm_parameters(parse(*flags.split()))
    assert "gpus_per_node" not in parameters and parameters["tasks_per_node"] == 1
    assert (parameters["name"], parameters["slurm_qos"], parameters["slurm_partition"]) == ("n", "q", "p")
    assert (parameters["slurm_account"], parameters["slurm_constraint"], parameters["slurm_mem"]) == ("a", "c", "7GB")
    extra = {"mail-type": "ALL", "mail-user": "a@b", "requeue": True}
    assert parameters["slurm_additional_parameters"] == extra


def test_job_without_a_folder_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(OptionError, match="--job_dir"):
        front.submit(["-m", "dn_dab_detr"])
    assert front.run_command_line(["-m", "dn_dab_detr"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_wrong_options_are_refused_before_the_queue(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        front.submit(["--job_dir", str(tmp_path), "-m", "dn_dab_detr", "--two_stage"])


def test_restart_resumes_from_the_newest_checkpoint(tmp_path: Path) -> None:
    argv = ["-m", "dab_detr", "--output_dir", str(tmp_path), "--resume", "old.pth"]
    # Nothing saved yet: a path given by hand still counts.
    assert front.Trainer(argv, "/jobs/%j").resuming() == argv
    (tmp_path / "checkpoint.pth").touch()
    again = front.Trainer(argv, "/jobs/%j").checkpoint()
    assert isinstance(again, submitit.helpers.DelayedSubmission)
    # Of two --resume the last one counts.
    assert program.parse_args(again.function.argv).resume == "auto"
    # A second restart does not add it twice.
    assert again.function.checkpoint().function.argv == again.function.argv
    evaluation = [*argv, "--eval"]
    assert front.Trainer(evaluation, "/jobs/%j").resuming() == evaluation


def test_job_folder_is_the_output_folder_where_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front.submitit, "JobEnvironment", lambda: argparse.Namespace(job_id="7"))
    assert front.Trainer(["-m", "dab_detr"], "/jobs/%j").resuming()[-2:] == ["--output_dir", "/jobs/7"]


def test_stopped_job_waits_for_slurm_and_hands_submitit_its_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    raised: list[int] = []
    monkeypatch.setattr(front.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(front.signal, "raise_signal", raised.append)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        front.wait_for_restart(number)
    # submitit requeues on SIGUSR2; SIGTERM alone asks for nothing but the end.
    assert raised == [signal.SIGUSR2, signal.SIGUSR2]


def test_job_runs_main_and_reports_its_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = submitit.AutoExecutor
    monkeypatch.setattr(front.submitit, "AutoExecutor", lambda folder, **options: real(folder=folder, cluster="local"))
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    argv = ["--job_dir", str(tmp_path / "%j"), "--ngpus", "0", "--nodes", "1", "--timeout", "5"]
    job = front.submit([*argv, "-m", "dn_dab_detr", "--device", "cpu", "--coco_path", "/nowhere"])
    with pytest.raises(submitit.core.utils.FailedJobError, match="ended with status 1"):
        job.result()
    assert "main.py: error" in (job.stderr() or "") and "/nowhere" in (job.stderr() or "")
    # The output folder is the job's own, its number filled in.
    assert (tmp_path / str(job.job_id) / "config.py").exists()


def launch(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the launch script with this python first in the path."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["tools/run_dist_launch.sh", *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_launch_script_starts_one_process_per_gpu(tmp_path: Path) -> None:
    script = tmp_path / "show.sh"
    script.write_text(f'#!/bin/sh\necho "$RANK/$WORLD_SIZE $LOCAL_RANK $1" > {tmp_path}/out$RANK\n')
    script.chmod(0o755)
    done = launch("2", str(script), "hello", MASTER_PORT="29617")
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / f"out{rank}").read_text() for rank in range(2)] == ["0/2 0 hello\n", "1/2 1 hello\n"]


def test_launch_script_refuses_what_cannot_be_divided() -> None:
    assert launch("3", "x.sh", GPUS_PER_NODE="2").returncode == 2
    assert "usage" in launch("3").stderr


def test_slurm_script_refuses_what_cannot_be_divided() -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["tools/run_dist_slurm.sh", *arguments],
            cwd=REPOSITORY,
            env={**os.environ, "GPUS_PER_NODE": "2"},
            capture_output=True,
            text=True,
            check=False,
        )

    assert run("gpu", "job", "3", "x.sh").returncode == 2
    assert "usage" in run("gpu", "job", "3").stderr


def test_slurm_script_asks_for_whole_nodes(tmp_path: Path) -> None:
    srun = tmp_path / "srun"
    srun.write_text('#!/bin/sh\necho "$@"\n')
    srun.chmod(0o755)
    done = subprocess.run(
        ["tools/run_dist_slurm.sh", "gpu", "job", "16", "configs/x.sh", "--lr", "1"],
        cwd=REPOSITORY,
        env={**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "SRUN_ARGS": "--time 5"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [
        *("--partition=gpu", "--job-name=job", "--nodes=2", "--ntasks=16", "--ntasks-per-node=8"),
        *("--cpus-per-task=5", "--kill-on-bad-exit=1", "--gres=gpu:8", "--time", "5", "configs/x.sh", "--lr", "1"),
    ]
