"""How a process learns its place, and the collectives on two real processes."""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from util.distributed import (
    all_gather_object,
    barrier,
    destroy_process_group,
    first_host,
    get_rank,
    get_world_size,
    init_distributed_mode,
    is_main_process,
    mean_over_ranks,
    pick_device,
    reduce_dict,
    resolve_launch,
    sum_over_ranks,
)
from util.errors import OptionError

REPOSITORY = Path(__file__).resolve().parents[1]
SLURM_STEP = {
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_JOB_ID": "17",
}


def test_torchrun_environment_comes_first() -> None:
    launch = resolve_launch({**SLURM_STEP, "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"})
    assert (launch.rank, launch.world_size, launch.local_rank, launch.source) == (5, 8, 1, "environment")
    assert launch.init_method == "env://"


def test_one_launcher_per_host_multiplies_the_official_way() -> None:
    environ = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
    launch = resolve_launch(environ, world_size=3, rank=2, dist_url="tcp://a:1")
    assert (launch.rank, launch.world_size, launch.local_rank) == (5, 6, 1)
    with pytest.raises(OptionError, match="--dist_url"):
        resolve_launch(environ, world_size=3, rank=2)
    with pytest.raises(OptionError, match="--rank from 0 to 2"):
        resolve_launch(environ, world_size=3, rank=3, dist_url="tcp://a:1")


def test_local_rank_of_the_old_launcher_is_used() -> None:
    assert resolve_launch({"RANK": "1", "WORLD_SIZE": "2"}, local_rank=0).local_rank == 0
    assert resolve_launch({"RANK": "1", "WORLD_SIZE": "2"}).local_rank == 1


def test_slurm_step_of_several_tasks() -> None:
    launch = resolve_launch(SLURM_STEP)
    assert (launch.rank, launch.world_size, launch.local_rank, launch.source) == (3, 4, 1, "slurm")
    host, port = launch.init_method.removeprefix("tcp://").split(":")
    assert host == "n1" and 20000 <= int(port) < 40000
    other_job = resolve_launch({**SLURM_STEP, "SLURM_JOB_ID": "18"})
    other_step = resolve_launch({**SLURM_STEP, "SLURM_STEP_ID": "1"})
    assert len({launch.init_method, other_job.init_method, other_step.init_method}) == 3
    assert resolve_launch({**SLURM_STEP, "MASTER_PORT": "5", "MASTER_ADDR": "m"}).init_method == "tcp://m:5"


def test_batch_script_is_a_single_process() -> None:
    launch = resolve_launch({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "1"})
    assert (launch.rank, launch.world_size, launch.source) == (0, 1, "single")
    assert resolve_launch({**SLURM_STEP, "SLURM_STEP_NUM_TASKS": "1"}).source == "single"


def test_processes_started_by_hand() -> None:
    launch = resolve_launch({}, world_size=2, rank=1, dist_url="tcp://localhost:1")
    assert (launch.rank, launch.world_size, launch.source) == (1, 2, "options")
    with pytest.raises(OptionError, match="--dist_url"):
        resolve_launch({}, world_size=2)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("n1", "n1"), ("n[1-2]", "n1"), ("gpu[07,09-12],cpu1", "gpu07"), ("a,b", "a"), ("r[3-4]-ib", "r3-ib")],
)
def test_first_host_of_a_node_list(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


def test_empty_node_list_is_refused() -> None:
    with pytest.raises(OptionError, match="node list"):
        first_host("")


def test_a_single_process_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    args = argparse.Namespace(world_size=1, rank=0, local_rank=None, dist_url="env://", device="cpu", dist_timeout=1.0)
    init_distributed_mode(args)
    assert (args.rank, args.world_size, args.distributed) == (0, 1, False)
    assert (get_rank(), get_world_size(), is_main_process()) == (0, 1, True)
    value = torch.tensor(3.0)
    assert mean_over_ranks(value) is value and sum_over_ranks(value) is value
    assert reduce_dict({"a": value})["a"] is value and all_gather_object("x") == ["x"]
    barrier()
    destroy_process_group()


def test_device_falls_back_to_the_cpu(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("cuda") == torch.device("cpu") and "no GPU" in caplog.text
    assert pick_device("cpu") == torch.device("cpu")
    with pytest.raises(OptionError, match="--device"):
        pick_device("tpux")


TWO_PROCESSES = """
import argparse, torch
from util.distributed import *
from util.metrics import MetricLogger
args = argparse.Namespace(world_size=1, rank=0, local_rank=None, dist_url="env://", device="cpu", dist_timeout=1.0)
init_distributed_mode(args)
rank = get_rank()
assert args.distributed and get_world_size() == 2 and is_main_process() == (rank == 0)
value = torch.tensor(float(rank))
assert mean_over_ranks(value).item() == 0.5 and sum_over_ranks(value).item() == 1 and value.item() == rank
# The same names in another order.
values = {"a": torch.tensor(rank + 1.0), "b": torch.tensor(10.0 * rank)}
values = values if rank else dict(reversed(values.items()))
mean, total = reduce_dict(values), reduce_dict(values, average=False)
assert (mean["a"].item(), mean["b"].item()) == (1.5, 5.0) and list(mean) == list(values)
assert (total["a"].item(), total["b"].item()) == (3.0, 10.0)
assert all_gather_object({"r": rank}) == [{"r": 0}, {"r": 1}]
meters = MetricLogger()
for step in range(1 + rank):
    meters.update({"loss": torch.tensor(float(step + rank)), f"only{rank}": torch.tensor(1.0)})
meters.synchronize()
# Rank 0 saw 0, rank 1 saw 1 and 2.
assert meters.averages() == {"loss": 1.0, "only0": 1.0, "only1": 1.0}
barrier()
destroy_process_group()
"""


def free_port() -> int:
    """Return a TCP port nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_collectives_of_two_processes() -> None:
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES],
            cwd=REPOSITORY,
            env={**os.environ, **address, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [worker.communicate(timeout=120)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(errors)
