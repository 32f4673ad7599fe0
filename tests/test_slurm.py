"""Runs on a real Slurm of two pretend nodes on this host: launch, signals, preemption, a node that goes down.

They run where Slurm is installed, or may be (DN_DETR_SLURM_TESTS=1 on Debian as root), see docs/cluster.md.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.runs import REPOSITORY, assert_same_weights, command, steps_saved, wait_until, write_pictures
from util.checkpoint import load_checkpoint

CAN_START = os.name == "posix" and os.geteuid() == 0 and Path("/etc/debian_version").exists()
MAY_START = shutil.which("slurmctld") is not None or os.environ.get("DN_DETR_SLURM_TESTS") == "1"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CAN_START and MAY_START), reason="needs root on Debian and Slurm or DN_DETR_SLURM_TESTS=1"),
]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """Start the cluster, or use the one that runs; the python of this test comes first in the path of every job."""
    script = str(REPOSITORY / "tests" / "start-local-slurm")
    was_up = subprocess.run([script, "status"], capture_output=True, check=False).returncode == 0
    subprocess.run([script, "start"], check=True, capture_output=True)
    before = dict(os.environ)
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["PYTHONPATH"] = str(REPOSITORY)
    yield
    os.environ.clear()
    os.environ.update(before)
    if not was_up:
        subprocess.run([script, "stop"], check=True, capture_output=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures") / "data", num_train=12)


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train on two nodes through the launch script without any disturbance; return the output folder."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    script = ["tools/run_dist_slurm.sh", "main", "undisturbed", "2", "python", "-u", "main.py"]
    slurm(*script, *command(data, folder, "--epochs", 2), CPU_ONLY="1", GPUS_PER_NODE="1", CPUS_PER_TASK="1")
    return folder


def slurm(*arguments: str, timeout: float = 240, **environment: str) -> str:
    """Run a command to its end and return what it said.

    Raises:
        AssertionError: it failed.
    """
    done = subprocess.run(
        arguments,
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr


def submit(data: Path, folder: Path, *more: Any) -> str:
    """Submit a run of two nodes with submitit; return the job's number."""
    resources = ["--job_dir", str(folder / "jobs" / "%j"), "--ngpus", "0", "--nodes", "2", "--timeout", "30"]
    resources += ["--partition", "main", "--cpus_per_task", "1", "--mem_gb", "1", "--requeue"]
    options = command(data, folder / "run", "--epochs", 2, "--checkpoint_steps", 1, *more)
    said = slurm(sys.executable, "run_with_submitit.py", *resources, *options)
    return said.split("submitted job ")[1].split()[0]


def field(job: str, name: str) -> str:
    """Return one field of what Slurm says about a job."""
    said = slurm("scontrol", "show", "job", job)
    return said.split(f"{name}=")[1].split()[0]


def wait_for_end(job: str) -> str:
    """Return the state in which a job ended."""
    ended = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED"}
    return wait_until(lambda: field(job, "JobState") in ended and field(job, "JobState"), timeout=300, interval=0.5)


def wait_for_step(folder: Path, job: str, step: int) -> None:
    """Wait until a run has saved so many steps."""
    wait_until(lambda: steps_saved(folder) >= step or field(job, "JobState") in ("FAILED", "COMPLETED"), interval=0.1)
    assert field(job, "JobState") == "RUNNING"


def said_by(folder: Path, job: str) -> str:
    """Return the ends of a submitit job's logs."""
    paths = sorted((folder / "jobs" / job).glob("*.err")) + sorted((folder / "jobs" / job).glob("*.out"))
    return "\n".join(f"{path.name}:\n{path.read_text()[-3000:]}" for path in paths)


def assert_went_on(folder: Path, undisturbed: Path, job: str, restarts: int = 1) -> None:
    """Check that a job was started again, resumed and came to the same weights."""
    state = wait_for_end(job)
    assert state == "COMPLETED", f"{state}\n{said_by(folder, job)}"
    assert int(field(job, "Restarts")) == restarts
    assert "resumed" in (folder / "run" / "info.txt").read_text()
    assert_same_weights(undisturbed, folder / "run")


def test_launch_script_trains_on_two_nodes(undisturbed: Path) -> None:
    content = load_checkpoint(undisturbed / "checkpoint.pth")
    assert content["step"] == 12 and len(content["rng"]) == 2


def test_launch_script_runs_a_config(tmp_path: Path) -> None:
    script = tmp_path / "config.sh"
    script.write_text('#!/bin/sh\necho "$SLURM_PROCID of $SLURM_STEP_NUM_TASKS on $SLURMD_NODENAME: $1"\n')
    script.chmod(0o755)
    said = slurm("tools/run_dist_slurm.sh", "main", "job", "8", str(script), "hello", GPUS_PER_NODE="4")
    assert sorted(line for line in said.splitlines() if "hello" in line) == [
        f"{i} of 8 on n{1 + i // 4}: hello" for i in range(8)
    ]


def test_a_single_task_in_a_batch_script_is_no_group(data: Path, tmp_path: Path) -> None:
    script = tmp_path / "job.sh"
    options = " ".join(command(data, tmp_path / "run", "--epochs", 1))
    script.write_text(f"#!/bin/bash\n#SBATCH --ntasks=4\n#SBATCH --output={tmp_path}/log\npython main.py {options}\n")
    job = slurm("sbatch", "--parsable", str(script)).strip()
    assert wait_for_end(job) == "COMPLETED", (tmp_path / "log").read_text()
    assert len(load_checkpoint(tmp_path / "run" / "checkpoint.pth")["rng"]) == 1


def test_signal_to_a_submitit_job_requeues_it(data: Path, undisturbed: Path, tmp_path: Path) -> None:
    job = submit(data, tmp_path)
    wait_for_step(tmp_path / "run", job, 2)
    slurm("scancel", "--signal=USR2", job)
    assert_went_on(tmp_path, undisturbed, job)


def test_preemption_by_a_higher_partition(data: Path, undisturbed: Path, tmp_path: Path) -> None:
    job = submit(data, tmp_path)
    wait_for_step(tmp_path / "run", job, 2)
    higher = slurm(
        *("sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive", f"--output={tmp_path}/higher"),
        "--wrap=sleep 2",
    ).strip()
    assert wait_for_end(higher) == "COMPLETED"
    assert_went_on(tmp_path, undisturbed, job)


def test_a_node_that_goes_down(data: Path, undisturbed: Path, tmp_path: Path) -> None:
    job = submit(data, tmp_path)
    wait_for_step(tmp_path / "run", job, 2)
    slurm("scontrol", "update", "nodename=n2", "state=down", "reason=drill")
    try:
        wait_until(lambda: field(job, "JobState") != "RUNNING", timeout=60)
    finally:
        slurm("scontrol", "update", "nodename=n2", "state=resume")
    assert_went_on(tmp_path, undisturbed, job)


def test_cancelled_job_saves_and_stays_cancelled(data: Path, tmp_path: Path) -> None:
    job = submit(data, tmp_path, "--epochs", 1000)
    wait_for_step(tmp_path / "run", job, 1)
    slurm("scancel", job)
    assert wait_for_end(job) == "CANCELLED"
    wait_until(lambda: "stopped by SIGTERM" in (tmp_path / "run" / "info.txt").read_text(), timeout=60)
    time.sleep(2)
    assert field(job, "JobState") == "CANCELLED"


def test_example_of_torchrun_requeues_itself_at_the_time_limit(data: Path, undisturbed: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    example = REPOSITORY / "tools" / "examples" / "torchrun.sbatch"
    resources = ["--partition=main", "--gpus-per-node=0", "--cpus-per-task=1", f"--output={log}", "--time=10"]
    options = command(data, tmp_path / "run", "--epochs", 2, "--checkpoint_steps", 1)
    job = slurm("sbatch", "--parsable", *resources, str(example), *options, PROCESSES_PER_NODE="1").strip()
    wait_for_step(tmp_path / "run", job, 2)
    # What Slurm does itself with --signal=B:USR1@120 two minutes before the limit.
    slurm("scancel", "--batch", "--signal=USR1", job)
    state = wait_for_end(job)
    text = log.read_text()
    assert state == "COMPLETED" and "stopping after step" in text and "resumed" in text, text[-4000:]
    assert_same_weights(undisturbed, tmp_path / "run")
