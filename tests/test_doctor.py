"""The doctor: what is sound is ok, and each planted fault gets its sentence, its remedy and its exit status."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from models.ops import backends, library
from tests.stand_ins import NUM_CLASSES
from tools import doctor
from tools.checkup import machine, operator, packages, storage
from tools.checkup.finding import ERROR, OK, WARNING, Finding

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_STEP_NUM_TASKS", "SLURM_JOB_ID", "MSDA_BACKEND")


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def fresh_choice() -> Iterator[None]:
    """Forget what was found out about the backends, before and after."""
    backends._choose.cache_clear()
    library.obstacle.cache_clear()
    yield
    backends._choose.cache_clear()
    library.obstacle.cache_clear()


def only(findings: Sequence[Finding], name: str) -> Finding:
    """Return the finding of a name."""
    (found,) = [each for each in findings if each.name == name]
    return found


def versions(monkeypatch: pytest.MonkeyPatch, **changed: str | None) -> None:
    """Let packages appear in other versions, None for missing."""
    real = importlib.metadata.version

    def version(name: str) -> str:
        found = changed.get(name, real(name))
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)


def write_data(root: Path) -> Path:
    """Write a data set of one picture per split."""
    (root / "annotations").mkdir(parents=True)
    for number, split in enumerate(("train2017", "val2017"), start=1):
        (root / split).mkdir()
        Image.new("RGB", (40, 30), "gray").save(root / split / "a.png")
        content = {
            "images": [{"id": number, "file_name": "a.png", "height": 30, "width": 40}],
            "categories": [{"id": index, "name": f"kind {index}"} for index in range(1, NUM_CLASSES)],
            "annotations": [
                {"id": 1, "image_id": number, "category_id": 2, "bbox": [5, 5, 10, 8], "area": 80, "iscrowd": 0}
            ],
        }
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


def test_report_of_a_sound_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_data(tmp_path / "data")
    assert doctor.main(["--coco_path", str(data), "--output_dir", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out
    assert "1 pictures, 1 objects, 2 classes (--num_classes 3); the first is 40 x 30 pixels" in printed
    assert "can be created" in printed and " 0 errors" in printed.splitlines()[-1]
    assert not (tmp_path / "run").exists()
    for subject in (
        "python",
        "torch + torchvision",
        "torch on cpu",
        "backend for cpu",
        "speed on cpu",
        "shared memory",
    ):
        assert any(line.split(maxsplit=1)[1].startswith(subject) for line in printed.splitlines()), subject


def test_json_report_and_exit_status(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    versions(monkeypatch, scipy=None)
    assert doctor.main(["--json"]) == 1
    found = [Finding(**each) for each in json.loads(capsys.readouterr().out)]
    assert only(found, "scipy")[:3] == (ERROR, "scipy", "missing")
    assert only(found, "scipy").remedy.startswith("pip install 'scipy==")
    # A broken installation is not imported.
    assert only(found, "the rest").mark == WARNING and "torch on cpu" not in {each.name for each in found}


def test_other_versions_are_warned_about_and_optional_packages_may_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    versions(monkeypatch, scipy="1.2.3", timm=None)
    found = packages.examine()
    assert only(found, "scipy").mark == WARNING and "1.2.3 is installed, tested is ==1." in only(found, "scipy").text
    assert only(found, "timm").mark == WARNING and "--backbone timm:NAME" in only(found, "timm").text
    assert only(found, "torch + torchvision").mark == OK


def test_torchvision_of_another_torch_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["numpy", "torch==2.5.1"])
    found = only(packages.examine(), "torch + torchvision")
    assert found.mark == ERROR and "was built for torch==2.5.1, installed is torch" in found.text
    assert found.remedy.startswith("install the two together: pip install torch==")


def test_torchvision_whose_operators_are_missing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr("torchvision.ops.nms", broken)
    found = only(packages.examine(), "torch + torchvision")
    assert found.mark == ERROR and "torchvision::nms does not exist" in found.text and found.remedy


def test_library_of_another_torch_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fresh_choice: None) -> None:
    built = tmp_path / "libms_deform_attn_cpu.so"
    built.write_bytes(b"code" + library.MARK + b"torch-1.0.0;sources-abc\0more")
    monkeypatch.setattr(library, "library_path", lambda name: built)
    found = operator.examine()
    assert only(found, "cpu on cpu").mark == WARNING
    assert "was built for torch-1.0.0;sources-abc" in only(found, "cpu on cpu").text
    assert "setup.py build" in only(found, "cpu on cpu").remedy
    assert only(found, "backend for cpu").text.startswith("torch (cpu: ")
    assert only(found, "torch on cpu").mark == OK and "cpu 0" not in only(found, "speed on cpu").text


def test_backend_that_computes_wrongly_is_an_error(monkeypatch: pytest.MonkeyPatch, fresh_choice: None) -> None:
    right = backends.reference.forward
    monkeypatch.setattr(backends.reference, "forward", lambda *arguments: right(*arguments) * 1.001)
    monkeypatch.setattr(operator.self_test, "worst_error", lambda *_: 1e-3)
    found = only(operator.examine(), "torch on cpu")
    assert found.mark == ERROR and "relative error 1.0e-03" in found.text and "MSDA_BACKEND=torch" in found.remedy


def test_backend_that_cannot_be_had_is_an_error(monkeypatch: pytest.MonkeyPatch, fresh_choice: None) -> None:
    monkeypatch.setenv("MSDA_BACKEND", "cuda")
    found = only(operator.examine(), "backend for cpu")
    assert found.mark == ERROR and "it computes cuda tensors only" in found.text and "unset" in found.remedy


def test_missing_data_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = storage.examine_data(str(tmp_path / "nowhere"), "ids")
    assert [each.mark for each in found] == [ERROR, ERROR] and "must hold train2017, val2017" in found[0].text
    data = write_data(tmp_path / "data")
    (data / "val2017" / "a.png").write_bytes(b"no picture")
    train, val = storage.examine_data(str(data), "ids")
    assert train.mark == OK and val.mark == ERROR and "a.png" in val.text and val.remedy


def test_folder_that_cannot_be_written_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "file").write_text("")
    (below_file,) = storage.examine_output(str(tmp_path / "file" / "run"))
    assert below_file.mark == ERROR and "cannot write" in below_file.text
    monkeypatch.setattr(storage.tempfile, "TemporaryFile", refuse)
    (found,) = storage.examine_output(str(tmp_path / "run"))
    assert found.mark == ERROR and found.text == f"cannot write to {tmp_path}: Permission denied" and found.remedy


@pytest.mark.parametrize(("free", "mark"), [(5e8, ERROR), (5e9, WARNING), (5e10, OK)])
def test_little_space_is_said(free: float, mark: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda _: SimpleNamespace(free=free, total=1e12))
    (found,) = storage.examine_output(str(tmp_path))
    assert found.mark == mark and f"{free / 1e9:.1f} GB are free" in found.text


def test_machine_faults_have_remedies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4096)
    assert machine.cores().mark == WARNING and "OMP_NUM_THREADS=" in machine.cores().remedy
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: SimpleNamespace(free=64 << 20, total=64 << 20))
    found = machine.shared_memory(tmp_path)
    assert found.mark == WARNING and "--shm-size" in found.remedy
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    assert machine.launch().mark == ERROR and "torchrun or srun" in machine.launch().remedy
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert machine.launch()[:3] == (OK, "processes", "process 1 of 4, started by torchrun or a like launcher")


def test_gpu_without_a_torch_for_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine, "driver_version", lambda: "580.1")
    monkeypatch.setattr(torch.version, "cuda", None)
    (found,) = machine.gpus()
    assert found.mark == WARNING and "driver 580.1" in found.text and "built for the CPU" in found.text
    monkeypatch.setattr(machine, "driver_version", lambda: None)
    assert machine.gpus()[0].mark == OK


def test_kernels_without_code_for_the_gpu_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lib.txt").write_text("nvcc -gencode arch=compute_80,code=sm_80 -gencode arch=compute_90,code=sm_90")
    monkeypatch.setattr(library, "library_path", lambda name: tmp_path / "lib.so")
    (found,) = machine._kernels("GPU 0 kernels", (12, 0))
    assert found.mark == ERROR and "built for sm_80, sm_90, not for this GPU" in found.text
    assert "TORCH_CUDA_ARCH_LIST=12.0" in found.remedy
    assert machine._kernels("GPU 0 kernels", (8, 6))[0].mark == OK


def test_runs_on_knows_own_and_portable_code() -> None:
    assert machine.runs_on({("sm", 80)}, (8, 6)) and not machine.runs_on({("sm", 86)}, (8, 0))
    assert not machine.runs_on({("sm", 90)}, (12, 0)) and machine.runs_on({("compute", 90)}, (12, 0))
    assert machine.runs_on({("sm", 120)}, (12, 0)) and not machine.runs_on({("compute", 120)}, (9, 0))


def test_an_examination_that_breaks_off_becomes_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> list[Finding]:
        raise OSError("libcudart.so.13: cannot open shared object file")

    monkeypatch.setattr(packages, "examine", lambda: [Finding(OK, "python", "3")])
    monkeypatch.setattr(machine, "examine", broken)
    monkeypatch.setattr(operator, "examine", lambda: [])
    found = doctor.examine(SimpleNamespace(coco_path=None, label_mapping="ids", output_dir=""))
    assert only(found, "machine").mark == ERROR and "libcudart" in only(found, "machine").text
    assert only(found, "output").mark == OK
