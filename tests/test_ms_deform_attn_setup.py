"""The build of the operator's kernels: options, architectures, and what happens where a compiler is missing."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from models.ops.library import FOLDER


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Load setup.py as Python does when it is run as a script."""
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location("ops_setup", FOLDER / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop("library", None)


def test_unknown_words_are_refused(setup: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert setup.main(["bild"]) == 2
    assert "got bild" in capsys.readouterr().err


def test_architecture_list_becomes_options(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0a 12.0+PTX")
    flags = setup.architecture_flags("nvcc")
    assert flags[1::2] == [
        "arch=compute_80,code=sm_80",
        "arch=compute_90a,code=sm_90a",
        "arch=compute_120,code=sm_120",
        "arch=compute_120,code=compute_120",
    ]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    with pytest.raises(setup.BuildError, match="got 'Hopper'"):
        setup.architecture_flags("nvcc")


def test_forced_cuda_without_compiler_is_an_error(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", "/nonexistent")
    monkeypatch.setenv("FORCE_CUDA", "1")
    with pytest.raises(setup.BuildError, match="FORCE_CUDA=1, but"):
        setup.find_nvcc()
    monkeypatch.delenv("FORCE_CUDA")
    assert setup.find_nvcc() is None


def test_missing_compiler_is_said_and_fails_install_only(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: object, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    monkeypatch.setattr(setup.library, "library_path", lambda name: setup.Path(str(tmp_path)) / "lib" / f"{name}.so")
    assert setup.main(["build_ext", "--inplace"]) == 0
    assert setup.main(["build", "install"]) == 1
    assert "no compiler '/nonexistent/c++'" in capsys.readouterr().err


def test_same_commands_are_not_run_twice(setup: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    path = setup.Path(str(tmp_path)) / "kernels.so"
    monkeypatch.setattr(setup.library, "library_path", lambda name: path)
    calls: list[tuple[str, ...]] = []

    def pretend(*command: str) -> None:
        calls.append(command)
        mark = setup.library.MARK + setup.library.expected_mark().encode() + b"\0"
        setup.Path(command[command.index("-o") + 1]).write_bytes(mark)

    monkeypatch.setattr(setup, "call", pretend)
    jobs = [setup.Job(("c++", "-O3"), "cpu.cpp", "cpu.o")]
    for _ in range(2):
        setup.build_library("cpu", jobs, ("-lc10",))
    assert len(calls) == 2  # one compilation, one link
    setup.build_library("cpu", [setup.Job(("c++", "-O2"), "cpu.cpp", "cpu.o")], ("-lc10",))
    assert len(calls) == 4


def test_cuda_runtime_is_found_where_torch_has_cuda(setup: ModuleType) -> None:
    nvcc = setup.find_nvcc() if torch.version.cuda else None
    if nvcc is None:
        pytest.skip("no CUDA compiler")
    assert setup.cuda_runtime(nvcc).is_file()
    assert (setup.toolkit(nvcc) / "include" / "cuda_runtime_api.h").is_file()
