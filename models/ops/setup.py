"""Build the compiled kernels into `lib/`: CPU kernels always, CUDA kernels where torch has CUDA and nvcc is found.

    python setup.py build [install]        (the words build_ext, --inplace and develop are accepted as well)
    python setup.py clean

Without a C++ compiler nothing is built and nothing breaks: it is said, and only `install` then fails.

The compilers are called directly: the libraries are plain shared libraries, tied to a torch but to no Python version,
and are used from where they lie, so that `install` only has to show that they load.

Environment: CXX (default c++); CUDA_HOME (else nvcc on the PATH); FORCE_CUDA=1 (no nvcc is then an error);
TORCH_CUDA_ARCH_LIST, as in PyTorch; MAX_JOBS, compilers at a time (default: one per core).
"""

from __future__ import annotations

import functools
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

# This file is run as a script; the package itself is not imported, because it cannot be complete yet.
import library
import torch

SOURCES = library.FOLDER / "csrc"
WORDS = {"build", "build_ext", "install", "develop", "--inplace", "clean"}
ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0+PTX", "12.0")
CUDA_TYPES = ("f32", "f64", "f16", "bf16")
X86_SETS = {
    "avx2": ("-mavx2", "-mfma"),
    "avx512": ("-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"),
}
# GCC 12 warns about its own header of AVX-512 intrinsics.
KERNEL_FLAGS = ("-fno-math-errno", "-fno-trapping-math", "-Wno-uninitialized", "-Wno-maybe-uninitialized")


class BuildError(RuntimeError):
    """The libraries cannot be built; the message says what is missing or what the compiler said."""


class NoCompilerError(BuildError):
    """There is no C++ compiler."""


class Job(NamedTuple):
    """One source file to be compiled into one object file."""

    command: tuple[str, ...]
    source: str
    target: str


def main(arguments: Sequence[str]) -> int:
    """Carry out the command line; return the exit code."""
    unknown = [word for word in arguments if word not in WORDS]
    if unknown or not arguments:
        print(f"expected some of {', '.join(sorted(WORDS))}, got {' '.join(arguments) or 'nothing'}", file=sys.stderr)
        return 2
    if "clean" in arguments:
        shutil.rmtree(library.FOLDER / "lib", ignore_errors=True)
        return 0
    try:
        build_library("cpu", cpu_jobs(), ("-ltorch", "-ltorch_cpu", "-lc10", "-fopenmp"))
        nvcc = find_nvcc()
        if nvcc:
            runtime = cuda_runtime(nvcc)
            build_library(
                "cuda",
                cuda_jobs(nvcc),
                ("-ltorch", "-ltorch_cpu", "-lc10", "-lc10_cuda", f"-L{runtime.parent}", f"-l:{runtime.name}"),
            )
    except NoCompilerError as error:
        print(f"{error}; until then the operator runs as plain PyTorch or Triton", file=sys.stderr)
        return int("install" in arguments)
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for name in ("cpu", "cuda") if nvcc else ("cpu",):
        obstacle = library.obstacle(name)
        if obstacle:
            print(f"error: {obstacle}", file=sys.stderr)
            return 1
        print(f"{library.library_path(name)} is ready")
    return 0


def build_library(name: str, jobs: Sequence[Job], link: Sequence[str]) -> None:
    """Compile and link one library, unless one made by the same commands is there. It appears complete or not at all.

    Raises:
        BuildError: a compiler failed or is missing.
    """
    path = library.library_path(name)
    recipe = path.with_suffix(".txt")
    commands = "\n".join([*(" ".join(job.command) for job in jobs), " ".join(link)])
    fits = path.is_file() and library.read_mark(path) == library.expected_mark()
    if fits and recipe.is_file() and recipe.read_text() == commands:
        return
    path.parent.mkdir(exist_ok=True)
    start = time.monotonic()
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        workers = int(os.environ.get("MAX_JOBS", 0)) or os.cpu_count() or 1
        with ThreadPoolExecutor(workers) as pool:
            objects = list(pool.map(functools.partial(compile_job, folder=folder), jobs))
        result = os.path.join(folder, path.name)
        torch_lib = Path(torch.__file__).parent / "lib"
        # No -Wl,--as-needed: which libraries of torch a symbol lives in is torch's affair.
        call(compiler(), "-shared", "-o", result, *objects, f"-L{torch_lib}", *link)
        os.replace(result, path)
    recipe.write_text(commands)
    print(f"built {path.name} in {time.monotonic() - start:.0f} s")


def compile_job(job: Job, folder: str) -> str:
    """Compile one source and return the path of the object file."""
    target = os.path.join(folder, job.target)
    call(*job.command, "-c", str(SOURCES / job.source), "-o", target)
    return target


def call(*command: str) -> None:
    """Run a compiler and pass on what it says.

    Raises:
        BuildError: it failed.
        NoCompilerError: it is not there.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise NoCompilerError(f"no compiler {command[0]!r}: install one or name it in CXX") from error
    output = done.stdout + done.stderr
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\n{output}")
    if output.strip():
        print(output.strip(), file=sys.stderr)


def compiler() -> str:
    """Return the C++ compiler."""
    return os.environ.get("CXX", "c++")


def torch_flags() -> tuple[str, ...]:
    """Return the options for a source that includes torch's headers."""
    include = Path(torch.__file__).parent / "include"
    abi = int(torch.compiled_with_cxx11_abi())
    return (
        "-isystem", str(include), "-isystem", str(include / "torch/csrc/api/include"),
        f"-D_GLIBCXX_USE_CXX11_ABI={abi}", f'-DMSDA_MARK="{library.expected_mark()}"',
    )  # fmt: skip


def cpu_jobs() -> list[Job]:
    """List the sources of the CPU library: the kernels once per instruction set, and what calls them."""
    base: tuple[str, ...] = (compiler(), "-O3", "-std=c++17", "-fPIC", "-Wall", "-Wextra", "-fvisibility=hidden")
    sets: dict[str, tuple[str, ...]] = {"default": ()}
    if platform.machine().lower() in ("x86_64", "amd64"):
        base = (*base, "-DMSDA_HAVE_X86")
        sets |= X86_SETS
    jobs = [Job((*base, "-fopenmp", *torch_flags()), "cpu.cpp", "cpu.o")]  # first: it takes longest
    for name, flags in sets.items():
        command = (*base, *KERNEL_FLAGS, *flags, f"-DMSDA_KERNELS=kernels_{name}")
        jobs.append(Job(command, "cpu_kernels.cpp", f"{name}.o"))
    return jobs


def find_nvcc() -> str | None:
    """Return the CUDA compiler, or None where torch has no CUDA or there is no compiler.

    Raises:
        BuildError: FORCE_CUDA=1 and one of them is missing.
    """
    force = os.environ.get("FORCE_CUDA") == "1"
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=os.path.join(home, "bin") if home else None)
    missing = (
        "this torch is built without CUDA" if not torch.version.cuda else "no nvcc in CUDA_HOME/bin or on the PATH"
    )
    if torch.version.cuda and nvcc:
        return nvcc
    if force:
        raise BuildError(f"FORCE_CUDA=1, but {missing}")
    print(f"no CUDA kernels: {missing}")
    return None


def cuda_jobs(nvcc: str) -> list[Job]:
    """List the sources of the CUDA library: the kernels once per type, and what calls them."""
    include = toolkit(nvcc) / "include"
    host = (compiler(), "-O2", "-std=c++17", "-fPIC", "-Wall", "-Wextra", "-isystem", str(include), *torch_flags())
    jobs = [Job(host, "cuda.cpp", "cuda.o")]
    device = (nvcc, "-ccbin", compiler(), "-O3", "-std=c++17", "-Xcompiler", "-fPIC", *architecture_flags(nvcc))
    return jobs + [Job((*device, f"-DMSDA_VALUE={kind}"), "cuda_kernels.cu", f"{kind}.o") for kind in CUDA_TYPES]


def architecture_flags(nvcc: str) -> list[str]:
    """Turn TORCH_CUDA_ARCH_LIST, or our list as far as the compiler has it, into options of nvcc.

    Raises:
        BuildError: an entry is not of the form 9.0, 9.0a or 9.0+PTX.
    """
    asked = re.split(r"[;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip())
    if asked == [""]:
        listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
        asked = [a for a in ARCHITECTURES if f"compute_{a.removesuffix('+PTX').replace('.', '')}" in listed]
    flags = []
    for entry in asked:
        match = re.fullmatch(r"(\d+)\.(\d+[af]?)(\+PTX)?", entry)
        if not match:
            raise BuildError(f"expected numbers such as 9.0 or 9.0+PTX in TORCH_CUDA_ARCH_LIST, got {entry!r}")
        number = match[1] + match[2]
        flags += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
        if match[3]:
            flags += ["-gencode", f"arch=compute_{number},code=compute_{number}"]
    return flags


def toolkit(nvcc: str) -> Path:
    """Return the folder of the CUDA toolkit; nvcc on the PATH may be a script that calls the real one.

    Raises:
        BuildError: nvcc does not say where it lives.
    """
    dry = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True)
    match = re.search(r"^#\$ TOP=(.*)$", dry.stderr, re.MULTILINE)
    if not match:
        raise BuildError(f"{nvcc} --dryrun names no toolkit folder:\n{dry.stderr}")
    return Path(match[1]).resolve()


def cuda_runtime(nvcc: str) -> Path:
    """Return the shared CUDA runtime to link with: torch's own, so that the process has one, else the toolkit's.

    Raises:
        BuildError: neither has one.
    """
    major = str(torch.version.cuda).split(".")[0]
    site = Path(torch.__file__).parent.parent
    folders = [site / f"nvidia/cu{major}/lib", site / "nvidia/cuda_runtime/lib", site / "torch/lib"]
    folders += [toolkit(nvcc) / "lib64", toolkit(nvcc) / "lib"]
    for folder in folders:
        path = folder / f"libcudart.so.{major}"
        if path.is_file():
            return path
    raise BuildError(
        f"no libcudart.so.{major} in {', '.join(map(str, folders))}: nvcc has to fit CUDA {torch.version.cuda}"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
