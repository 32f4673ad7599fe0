"""The CUDA kernels: on a GPU where there is one; elsewhere emulated on the CPU, and the built library loaded."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess

import pytest
import torch
from torch import Tensor

from models.ops import library, use_backend
from tests.golden_recipe import TESTS_DIR
from tests.ms_deform_attn_cases import (
    GOLDEN,
    Problem,
    assert_golden,
    random_problem,
    relative_error,
    run,
    run_plain,
)

EMULATION = TESTS_DIR / "cuda_emulation"
TYPES = {"f32": torch.float32, "f64": torch.float64, "f16": torch.float16, "bf16": torch.bfloat16}
GPU = [pytest.param(name, marks=pytest.mark.gpu) for name in ("cuda", "triton")]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@needs_gpu
@pytest.mark.parametrize("backend", GPU)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", GOLDEN)
def test_gpu_equals_reference_numbers(backend: str, case: str, dtype: torch.dtype) -> None:
    with use_backend(backend):
        assert_golden(case, dtype, "cuda")


@needs_gpu
@pytest.mark.parametrize("backend", GPU)
@pytest.mark.parametrize("channels", [16, 32, 64, 30, 129])
@pytest.mark.parametrize("kind", TYPES)
def test_gpu_error_is_at_most_twice_that_of_plain_pytorch(backend: str, kind: str, channels: int) -> None:
    dtype = TYPES[kind]
    p = random_problem([(13, 17), (7, 9), (4, 5)], queries=50, heads=4, channels=channels, points=4).to(dtype)
    exact = run_plain(p.to(torch.float64))
    with use_backend(backend):
        actual = run(p.to(dtype, device="cuda"))
    for got, plain, truth in zip(actual, run_plain(p), exact, strict=True):
        limit = 2 * relative_error(plain, truth) + torch.finfo(dtype).eps / 8
        assert relative_error(got.cpu(), truth) <= limit


@needs_gpu
@pytest.mark.gpu
def test_gpu_deterministic_backward_repeats_its_bits() -> None:
    p = random_problem([(4, 5), (2, 2)], queries=500, heads=8, channels=32).to(torch.float32, device="cuda")
    torch.use_deterministic_algorithms(True)
    try:
        with use_backend("cuda"):
            first, second = run(p), run(p)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, first, second))
    with use_backend("cuda"):
        torch.testing.assert_close(first, run(p))


@pytest.mark.skipif(not library.library_path("cuda").is_file(), reason="the CUDA kernels are not built")
def test_library_loads_without_a_gpu() -> None:
    assert library.obstacle("cuda") == ""
    assert torch._C._dispatch_has_kernel_for_dispatch_key("dn_detr_kernels::forward", "CUDA")
    assert torch._C._dispatch_has_kernel_for_dispatch_key("dn_detr_kernels::backward", "CUDA")


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """Compile the kernels with the emulation instead of CUDA."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("the emulation needs g++")
    folder = tmp_path_factory.mktemp("emulation")
    sources = library.FOLDER / "csrc"
    launch = r"(\w+_kernel<S>)<<<(.*?), kThreads, 0, stream>>>\(p\);"
    text, launches = re.subn(
        launch, r"emulation::launch(\1, \2, kThreads, p);", (sources / "cuda_kernels.cu").read_text()
    )
    assert launches == 2
    (folder / "kernels.cpp").write_text(text)
    flags = ["-std=c++20", "-O1", "-fPIC", "-w", f"-I{EMULATION}", f"-I{sources}"]
    objects = [folder / f"{kind}.o" for kind in TYPES]
    for kind, target in zip(TYPES, objects, strict=True):
        command = [compiler, *flags, f"-DMSDA_VALUE={kind}", "-c", str(folder / "kernels.cpp"), "-o", str(target)]
        subprocess.run(command, check=True)
    shared = folder / "emulated.so"
    subprocess.run(
        [compiler, *flags, "-shared", str(EMULATION / "run.cpp"), *map(str, objects), "-o", str(shared)], check=True
    )
    return ctypes.CDLL(str(shared))


def run_emulated(emulated: ctypes.CDLL, kind: str, backward: bool, p: Problem, arrays: list[Tensor | None]) -> None:
    """Run one emulated kernel; arrays as in run.cpp."""
    batch, tokens, heads, channels = p.value.shape
    levels = [number for (h, w), start in zip(p.shapes, p.starts, strict=True) for number in (h, w, start)]
    sizes = (tokens, heads, channels, len(p.shapes), p.weights.shape[4])
    pointers = (ctypes.c_void_p * 10)(*[None if a is None else a.data_ptr() for a in arrays])
    queries = p.weights.shape[1]
    status = emulated.run(
        kind.encode(),
        int(backward),
        ctypes.c_int64(batch),
        ctypes.c_int64(queries),
        (ctypes.c_int64 * 5)(*sizes),
        (ctypes.c_int32 * len(levels))(*levels),
        pointers,
    )
    assert status == 0


@pytest.mark.parametrize("channels", [16, 32, 64, 1, 71])
@pytest.mark.parametrize("kind", TYPES)
def test_emulated_kernels_agree_with_plain_pytorch(emulated: ctypes.CDLL, kind: str, channels: int) -> None:
    dtype = TYPES[kind]
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    p = random_problem([(4, 5), (2, 3), (1, 1)], queries=23, heads=3, channels=channels, points=6).to(dtype, sums)
    p.locations.view(-1)[::17] = float("nan")
    p.locations.view(-1)[::31] = 1e30
    output = torch.full_like(p.grad_output, 7.0)
    run_emulated(emulated, kind, False, p, [p.value, p.locations, p.weights, output, *[None] * 6])
    grad_value = torch.zeros_like(p.value, dtype=sums)
    grads = [torch.full_like(p.locations, 7.0), torch.full_like(p.weights, 7.0)]
    inputs: list[Tensor | None] = [p.value, p.locations, p.weights, None, p.grad_output]
    run_emulated(emulated, kind, True, p, [*inputs, grad_value, *grads, None, None])
    exact = [t.nan_to_num(0.0) for t in run_plain(p.to(torch.float64))]
    for actual, truth in zip([output, grad_value, *grads], exact, strict=True):
        # Sums are kept in float32 or float64; only the output is rounded to the value type.
        limit = torch.finfo(actual.dtype).eps * 10
        assert relative_error(actual, truth) < limit
    check_fixed_point(emulated, kind, p, inputs, grads, exact[1])


def check_fixed_point(
    emulated: ctypes.CDLL, kind: str, p: Problem, inputs: list[Tensor | None], grads: list[Tensor], exact: Tensor
) -> None:
    """Check the deterministic backward pass: integer sums, the other gradients unchanged to the bit."""
    scale = torch.tensor([2.0**30], dtype=p.locations.dtype)
    total = torch.zeros(p.value.shape, dtype=torch.int64)
    again = [torch.full_like(t, 7.0) for t in grads]
    run_emulated(emulated, kind, True, p, [*inputs, None, *again, total, scale])
    assert all(map(torch.equal, grads, again))
    # Each of the contributions to a token is rounded to 2^-31 at most.
    assert relative_error(total.double() / 2.0**30, exact) < 1e-6
