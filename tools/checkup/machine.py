"""The machine: GPUs, compilers, cores, shared memory, and how several processes would be started here."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import torch

from models.ops import library
from util.distributed import resolve_launch
from util.errors import OptionError

from .finding import ERROR, OK, WARNING, Finding

# A loading process holds two batches of two large images in shared memory, and there are a few of them.
ENOUGH_SHARED_MEMORY = 1 << 30
CODE = re.compile(r"code=(sm|compute)_(\d+)")


def examine() -> list[Finding]:
    """Look at all of it."""
    return [*gpus(), *compilers(), cores(), shared_memory(), launch()]


def gpus() -> list[Finding]:
    """Look at driver, runtime and every GPU."""
    driver = driver_version()
    if not torch.cuda.is_available():
        if driver is None:
            return [Finding(OK, "GPU", "none: everything runs on the CPU")]
        if torch.version.cuda is None:
            text = f"there is one (driver {driver}), but this torch is built for the CPU"
        else:
            text = f"there is one (driver {driver}), but torch {torch.__version__} cannot use it"
        return [Finding(WARNING, "GPU", text, "install a torch that fits the driver: see https://pytorch.org")]
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = (properties.major, properties.minor)
        text = (
            f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, compute capability {capability[0]}."
            f"{capability[1]}, driver {driver or 'unknown'}, CUDA {torch.version.cuda}"
        )
        found.append(Finding(OK, f"GPU {index}", text))
        found += _kernels(f"GPU {index} kernels", capability)
    return found


def _kernels(name: str, capability: tuple[int, int]) -> list[Finding]:
    """Say whether the compiled CUDA kernels hold code for a GPU; nothing where they are not built."""
    notes = library.library_path("cuda").with_suffix(".txt")
    if not notes.is_file():
        return []  # said with the backends
    codes = {(kind, int(number)) for kind, number in CODE.findall(notes.read_text(encoding="utf-8"))}
    if runs_on(codes, capability):
        return [Finding(OK, name, "built for this GPU")]
    built = ", ".join(sorted(f"{kind}_{number}" for kind, number in codes))
    remedy = f"TORCH_CUDA_ARCH_LIST={capability[0]}.{capability[1]} python models/ops/setup.py build"
    return [Finding(ERROR, name, f"the CUDA kernels are built for {built}, not for this GPU", remedy)]


def runs_on(codes: set[tuple[str, int]], capability: tuple[int, int]) -> bool:
    """Return whether a GPU runs one of the codes: its own major version from below, or portable code not newer."""
    own = capability[0] * 10 + capability[1]
    return any(number <= own and (kind == "compute" or number // 10 == capability[0]) for kind, number in codes)


def driver_version() -> str | None:
    """Ask nvidia-smi for the driver's version; None where there is no driver."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return answer[0] if answer else None


def compilers() -> list[Finding]:
    """Look for the compilers of the operator; they matter where it is not built."""
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which(str(Path(home) / "bin" / "nvcc")) if home else shutil.which("nvcc")
    wanted = [("C++ compiler", shutil.which(os.environ.get("CXX", "c++").split()[0]), "cpu", "a C++ compiler (g++)")]
    if torch.cuda.is_available():
        wanted.append(("nvcc", nvcc, "cuda", f"the CUDA toolkit {torch.version.cuda}, or set CUDA_HOME"))
    found = []
    for name, path, backend, remedy in wanted:
        built = not library.obstacle(backend)
        text = path or f"none; the {backend} kernels are {'built already' if built else 'not built'}"
        fine = path is not None or built
        found.append(Finding(OK if fine else WARNING, name, text, "" if fine else f"install {remedy}"))
    return found


def cores() -> Finding:
    """Say how many cores this process may use and how many threads torch takes."""
    usable, threads = len(os.sched_getaffinity(0)), torch.get_num_threads()
    text = f"{usable} usable cores, torch computes with {threads} threads"
    if threads > usable:
        return Finding(WARNING, "cores", text, f"more threads than cores slow down: set OMP_NUM_THREADS={usable}")
    return Finding(OK, "cores", text)


def shared_memory(folder: Path = Path("/dev/shm")) -> Finding:
    """Look at the memory through which loading processes hand over their batches."""
    if not folder.is_dir():
        return Finding(OK, "shared memory", f"no {folder} on this system")
    usage = shutil.disk_usage(folder)
    text = f"{usage.free / 2**30:.1f} of {usage.total / 2**30:.1f} GiB free in {folder}"
    if usage.free < ENOUGH_SHARED_MEMORY:
        remedy = "loading processes may die of it: docker run --shm-size=8g (or --ipc=host), or --num_workers 0"
        return Finding(WARNING, "shared memory", text, remedy)
    return Finding(OK, "shared memory", text)


def launch() -> Finding:
    """Say as which process of how many this one was started, as the training would understand it."""
    try:
        found = resolve_launch(os.environ)
    except (OptionError, KeyError, ValueError) as error:
        text = f"the variables of a launcher are incomplete or contradict each other ({error})"
        return Finding(
            ERROR, "processes", text, "start with torchrun or srun, or unset RANK, WORLD_SIZE and LOCAL_RANK"
        )
    how = {"environment": "by torchrun or a like launcher", "slurm": "by srun", "single": "alone"}[found.source]
    text = f"process {found.rank} of {found.world_size}, started {how}"
    in_job, devices = "SLURM_JOB_ID" in os.environ, torch.cuda.device_count()
    if found.world_size == 1 and devices > 1:
        starter = "srun (tools/run_dist_slurm.sh)" if in_job else f"torchrun --nproc_per_node={devices}"
        return Finding(
            WARNING, "processes", f"{text}; there are {devices} GPUs", f"to use all of them start with {starter}"
        )
    return Finding(OK, "processes", text + (", inside a Slurm job" if in_job else ""))
