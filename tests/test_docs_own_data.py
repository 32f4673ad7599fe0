"""Commands of docs/own_data.md are accepted as written, and those that need no GPU do what it says."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

import main
from tests.test_tools_dataset_convert import write_csv, write_pictures, write_voc, write_yolo
from tools import dataset

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "own_data.md"


def commands() -> list[list[str]]:
    """Return the words of every command in the document."""
    blocks = re.findall(r"```bash\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if line.strip()]


def test_document_has_the_commands() -> None:
    used = {words[3] for words in commands() if words[2] == "tools.dataset"}
    assert used == set(dataset.SUBCOMMANDS)


@pytest.mark.parametrize("words", [words for words in commands() if "main.py" in words], ids=" ".join)
def test_training_command_is_accepted(words: list[str]) -> None:
    options = main.parse_args(words[2:])
    assert options.coco_path == "data/mine" and options.dataset_file == "mine"


def test_tool_commands_run_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_yolo(tmp_path / "downloads").unlink()
    for split in ("images", "labels"):
        for path in sorted((tmp_path / "downloads" / split).glob("*/*")):
            path.rename(tmp_path / "downloads" / split / path.name)
        for folder in ("train", "val"):
            (tmp_path / "downloads" / split / folder).rmdir()
    (tmp_path / "downloads" / "classes.txt").write_text("cat\ndog\n")
    lists = write_voc(tmp_path / "VOC2007") / "ImageSets" / "Main"
    (lists / "train.txt").rename(lists / "trainval.txt")
    (lists / "val.txt").rename(lists / "test.txt")
    write_csv(tmp_path, ("filename", "xmin", "ymin", "xmax", "ymax", "class"))
    (tmp_path / "train.csv").rename(tmp_path / "boxes.csv")
    write_pictures(tmp_path / "pictures", "{split}")
    for words in (words for words in commands() if words[2] == "tools.dataset"):
        if "labels.json" in words and not Path("labels.json").exists():
            Path("labels.json").write_text(Path("data/table/annotations/instances_train2017.json").read_text())
        assert dataset.main(words[3:]) == 0, words
    written = {path.name for path in tmp_path.iterdir()}
    assert {"problems.json", "preview.jpg", "problems.png", "stats.png", "stats.json"} <= written
