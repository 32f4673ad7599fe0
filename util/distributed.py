"""Several processes: where they come from, and the few collectives the training needs.

Every function also works in a single process, where the collectives do nothing.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .errors import OptionError

# gloo raises plain RuntimeErrors. In the order of what was seen: a process died, a process hangs.
_LOST_PROCESS = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting", "gloo/")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Launch:
    """How this process was started.

    Attributes:
        rank: number of this process, 0 to world_size - 1.
        world_size: number of processes.
        local_rank: number of this process on its host; picks the GPU.
        init_method: rendezvous address.
        source: "environment", "slurm", "options" or "single".
    """

    rank: int
    world_size: int
    local_rank: int
    init_method: str
    source: str


def resolve_launch(
    environ: Mapping[str, str],
    *,
    world_size: int = 1,
    rank: int = 0,
    local_rank: int | None = None,
    dist_url: str = "env://",
) -> Launch:
    """Decide rank, world size and rendezvous of this process.

    In this order: RANK and WORLD_SIZE in the environment (torchrun, torch.distributed.launch, submitit); a Slurm step
    of more than one task (SLURM_PROCID alone is set in batch scripts too and proves nothing); ``world_size`` above 1
    given by hand; a single process.

    Args:
        environ: the environment.
        world_size: with a launcher on each host, the number of hosts (the official meaning); else of processes.
        rank: number of this host under a launcher, else of this process.
        local_rank: as passed by a launcher; LOCAL_RANK wins.
        dist_url: rendezvous address; "env://" reads MASTER_ADDR and MASTER_PORT.

    Raises:
        OptionError: numbers that contradict each other.
    """
    if environ.get("RANK") and environ.get("WORLD_SIZE"):
        per_launch = int(environ["WORLD_SIZE"])
        own = int(environ["RANK"])
        local = int(environ.get("LOCAL_RANK") or (own if local_rank is None else local_rank))
        # --world_size and --rank count hosts that each run a launcher of their own.
        launch = Launch(rank * per_launch + own, world_size * per_launch, local, dist_url, "environment")
        needs_address = world_size > 1
    elif int(environ.get("SLURM_STEP_NUM_TASKS") or 1) > 1:
        url = _slurm_url(environ) if dist_url == "env://" else dist_url
        numbers = (int(environ["SLURM_PROCID"]), int(environ["SLURM_STEP_NUM_TASKS"]), int(environ["SLURM_LOCALID"]))
        return Launch(*numbers, url, "slurm")
    elif world_size > 1:
        launch = Launch(rank, world_size, local_rank or 0, dist_url, "options")
        needs_address = not environ.get("MASTER_ADDR")
    else:
        return Launch(0, 1, local_rank or 0, dist_url, "single")
    if needs_address and launch.init_method == "env://":
        raise OptionError(f"--world_size {world_size} needs one address for all: pass --dist_url tcp://HOST:PORT")
    if not 0 <= launch.rank < launch.world_size:
        raise OptionError(f"expected --rank from 0 to {world_size - 1} for --world_size {world_size}, got {rank}")
    return launch


def init_distributed_mode(args: argparse.Namespace) -> None:
    """Join the process group and write rank, world_size, local_rank and distributed into the options.

    Raises:
        OptionError: as `resolve_launch`, or a local rank without a GPU of its own.
    """
    launch = resolve_launch(
        os.environ,
        world_size=args.world_size,
        rank=args.rank,
        local_rank=args.local_rank,
        dist_url=args.dist_url,
    )
    args.rank, args.world_size, args.local_rank = launch.rank, launch.world_size, launch.local_rank
    args.distributed = launch.world_size > 1
    if args.distributed:
        use_cuda = args.device.startswith("cuda") and torch.cuda.is_available()
        init_process_group(launch, use_cuda=use_cuda, timeout_minutes=args.dist_timeout)


def init_process_group(launch: Launch, *, use_cuda: bool, timeout_minutes: float = 30.0) -> None:
    """Start torch's process group: nccl with GPUs, gloo without.

    Raises:
        OptionError: more processes than GPUs on this host.
    """
    if use_cuda:
        if launch.local_rank >= torch.cuda.device_count():
            raise OptionError(
                f"process {launch.rank} wants GPU {launch.local_rank}, this host has {torch.cuda.device_count()}: "
                "start fewer processes or pass --device cpu"
            )
        torch.cuda.set_device(launch.local_rank)
    timeout = timedelta(minutes=timeout_minutes)
    store = _store_of_this_restart(os.environ, launch, timeout)
    dist.init_process_group(
        backend="nccl" if use_cuda else "gloo",
        init_method=launch.init_method if store is None else None,
        store=store,
        world_size=launch.world_size,
        rank=launch.rank,
        timeout=timeout,
    )


def pick_device(name: str, local_rank: int | None = None) -> torch.device:
    """Return the device of this process; the CPU, said once, when a GPU is asked for and there is none.

    Args:
        name: as torch.device takes it.
        local_rank: the GPU's number among several processes.

    Raises:
        OptionError: torch knows no such device.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise OptionError(f"expected --device cuda, cuda:N or cpu, got '{name}'") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        if is_main_process():
            _log.warning("no GPU is available: computing on the CPU")
        return torch.device("cpu")
    if device.type == "cuda" and is_initialized():
        return torch.device("cuda", local_rank or 0)
    return device


def wrap_model(model: nn.Module, device: torch.device, *, find_unused_parameters: bool = False) -> nn.Module:
    """Connect the processes' models, which also gives all of them process 0's weights; one process needs nothing."""
    if not is_initialized():
        return model
    ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids, find_unused_parameters=find_unused_parameters)


def destroy_process_group() -> None:
    """Leave the process group, if there is one."""
    if is_initialized():
        dist.destroy_process_group()


def is_initialized() -> bool:
    """Return whether a process group of this process is running."""
    return dist.is_available() and dist.is_initialized()


def get_rank() -> int:
    """Return the number of this process, 0 in a single one."""
    return dist.get_rank() if is_initialized() else 0


def get_world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if is_initialized() else 1


def is_main_process() -> bool:
    """Return whether this is process 0, the one that writes files."""
    return get_rank() == 0


def barrier() -> None:
    """Wait until every process is here."""
    if is_initialized():
        dist.barrier()


def all_gather_object(value: Any) -> list[Any]:
    """Return the picklable values of all processes, by rank."""
    if not is_initialized():
        return [value]
    gathered: list[Any] = [None] * get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


class DelayedVote:
    """Tells all processes at the same step what the greatest wish of any of them was, one step late.

    A vote is sent when the next one is cast, so that nobody waits for the network or for the GPU. A single process
    gets its own vote at once.

    Args:
        device: where the process group communicates.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sent: tuple[dist.Work, Tensor] | None = None

    def cast(self, *wishes: int) -> list[int]:
        """Send this step's wishes and return the greatest of the step before, zeros at the first step.

        Args:
            wishes: as many on every process and at every step.
        """
        if not is_initialized():
            return list(wishes)
        before = self._sent
        votes = torch.tensor(wishes).to(self._device, non_blocking=True)
        work = dist.all_reduce(votes, op=dist.ReduceOp.MAX, async_op=True)
        assert work is not None
        self._sent = (work, votes)
        if before is None:
            return [0] * len(wishes)
        before[0].wait()
        # Waits on a GPU for the optimizer's kernels of this step only: the vote itself is a step old.
        return [int(wish) for wish in before[1].tolist()]


def lost_process(error: BaseException) -> str | None:
    """Return one sentence when an error says that another process died or did not answer in time, else None."""
    text = str(error).strip()
    known = isinstance(error, dist.DistError) or any(words in text for words in _LOST_PROCESS)
    if not known:
        return None
    return (
        f"another process of the run is gone or did not answer within --dist_timeout ({text.splitlines()[0][:200]}); "
        "look for its own message, then start all again with --resume auto"
    )


def mean_over_ranks(value: Tensor) -> Tensor:
    """Return the mean of a tensor over all processes, on its own device; the input is left as it is."""
    if not is_initialized():
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return total / get_world_size()


def sum_over_ranks(value: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes, on its own device; the input is left as it is."""
    if not is_initialized():
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return total


def reduce_dict(values: dict[str, Tensor], average: bool = True) -> dict[str, Tensor]:
    """Sum or average 0-d tensors over all processes in one collective.

    Args:
        values: the same names on every process.
        average: divide by the number of processes.

    Returns:
        name -> 0-d tensor, in the order of the input.
    """
    if not is_initialized() or not values:
        return values
    # Sorted, so that processes which built their dict in another order still add like to like.
    names = sorted(values)
    stacked = torch.stack([values[name].detach() for name in names])
    stacked = mean_over_ranks(stacked) if average else sum_over_ranks(stacked)
    reduced = dict(zip(names, stacked.unbind(), strict=True))
    return {name: reduced[name] for name in values}


def _slurm_url(environ: Mapping[str, str]) -> str:
    # A port from the job id: another job on the host gets another port, and a requeued job, which keeps its id, gets
    # another one than the processes of its last start, which may still be ending. Nothing is left behind in a file.
    nodes = environ.get("SLURM_STEP_NODELIST") or environ["SLURM_JOB_NODELIST"]
    host = environ.get("MASTER_ADDR") or first_host(nodes)
    start = int(environ.get("SLURM_STEP_ID") or 0) + int(environ.get("SLURM_RESTART_COUNT") or 0)
    number = int(environ["SLURM_JOB_ID"]) * 64 + start % 64
    port = environ.get("MASTER_PORT") or str(20000 + number % 20000)
    return f"tcp://{host}:{port}"


def _store_of_this_restart(environ: Mapping[str, str], launch: Launch, timeout: timedelta) -> dist.Store | None:
    # torchrun with a fixed address keeps one store for all its restarts, where new workers find the addresses of dead
    # ones and fail to connect. On one host the count of restarts tells them apart; on several hosts counts may
    # differ, but there restarts need the c10d rendezvous, which makes a new store each time.
    by_torchrun = launch.init_method == "env://" and environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not by_torchrun or environ.get("GROUP_WORLD_SIZE") != "1":
        return None
    address = (environ["MASTER_ADDR"], int(environ["MASTER_PORT"]))
    store = dist.TCPStore(*address, launch.world_size, is_master=False, timeout=timeout)
    return dist.PrefixStore(f"restart{environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def first_host(nodes: str) -> str:
    """Return the first host of a Slurm node list: "gpu[07-09,12],cpu1" gives "gpu07".

    Raises:
        OptionError: the list does not start with a host name.
    """
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\]([^,]*))?", nodes)
    if match is None:
        raise OptionError(f"expected a Slurm node list such as 'n[1-2]', got '{nodes}'")
    prefix, number, suffix = match.groups()
    return f"{prefix}{number or ''}{suffix or ''}"
