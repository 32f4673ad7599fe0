"""Every command of the README is run, in its order, on small data; those that cannot be are listed with the reason."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

import main
from tests.runs import OPTIONS, write_pictures

README = Path(__file__).resolve().parents[1] / "README.md"
# Start of a command -> who runs it instead.
ELSEWHERE = {
    "make ": "the check on a fresh machine runs `make test`, whose set-up `make demo` shares",
    "python3 -m venv": "`make test` does the same",
    "pip install": "`make test` does the same",
    "python models/ops/setup.py": "`make test` does the same",
    "torchrun": "tests/test_reliability_processes.py, with two processes",
    "python run_with_submitit.py": "tests/test_slurm.py and tests/test_distributed_submitit.py",
    "python tools/benchmark.py": "tests/test_benchmark_*.py, in small",
    "python -m tools.examples.denoising_detr": "tests/test_plugin_example.py, in small",
}
EXPORT = "python -m tools.export"


def commands() -> list[str]:
    """Return the command lines of the README's bash blocks, without comments."""
    blocks = re.findall(r"```bash\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split("   #")[0].split("    #")[0].strip() for line in lines if line and not line.startswith("#")]


def run(command: str, folder: Path) -> int:
    """Run a command of the README in a folder with small data, in this process; return its exit status."""
    words = shlex.split(command)
    if words[1] == "main.py":
        # The small options come last and win, but for what the command is about.
        small = [*OPTIONS.split()[2:], "--epochs", "1", "--lr_drop", "1"]
        return main.run_command_line([*words[2:], *small])
    assert words[:2] == ["python", "-m"], command
    return importlib.import_module(words[2]).main(words[3:])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the data the README speaks of: COCO, YOLO files and photographs."""
    root = tmp_path_factory.mktemp("newcomer")
    coco = write_pictures(root / "data" / "coco", num_train=4)
    (root / "downloads").mkdir()
    (root / "downloads" / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [leaf, brick]\n")
    for split in ("train", "val"):
        content = json.loads((coco / "annotations" / f"instances_{split}2017.json").read_text())
        shutil.copytree(coco / f"{split}2017", root / "downloads" / "images" / split)
        (root / "downloads" / "labels" / split).mkdir(parents=True)
        for annotation in content["annotations"]:
            left, top, width, height = annotation["bbox"]
            numbers = ((left + width / 2) / 64, (top + height / 2) / 48, width / 64, height / 48)
            text = " ".join(map(str, (annotation["category_id"] - 1, *numbers)))
            (root / "downloads" / "labels" / split / f"{annotation['image_id']}.txt").write_text(text + "\n")
    (root / "photos").mkdir()
    shutil.copy(coco / "val2017" / "101.png", root / "photos" / "street.jpg")
    return root


def test_readme_commands_run_in_order(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    run_here = [c for c in commands() if not c.startswith((*ELSEWHERE, EXPORT, ". ", "python3"))]
    assert len(run_here) >= 10
    for command in run_here:
        assert run(command, folder) == 0, command
        trained = folder / "logs" / "dn_dab_detr" / "R50" / "checkpoint.pth"
        if not (folder / "checkpoint.pth").exists() and trained.exists():
            shutil.copy(trained, folder / "checkpoint.pth")
    for written in (
        "report.html",
        "curves.svg",
        "found/predictions.jsonl",
        "attention.png",
        "preview.png",
        "stats.png",
    ):
        assert (folder / written).stat().st_size > 0


@pytest.mark.slow
def test_readme_export_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    if not (folder / "checkpoint.pth").exists():
        train = next(command for command in commands() if command.startswith("python main.py"))
        assert run(train, folder) == 0
        shutil.copy(folder / "logs" / "dn_dab_detr" / "R50" / "checkpoint.pth", folder / "checkpoint.pth")
    (command,) = (command for command in commands() if command.startswith(EXPORT))
    assert run(command, folder) == 0
    assert (folder / "model.onnx").stat().st_size > 0


def test_readme_reasons_are_needed() -> None:
    for start in ELSEWHERE:
        assert any(command.startswith(start) for command in commands()), start
