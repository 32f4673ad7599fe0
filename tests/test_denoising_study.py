"""The comparison with and without denoising: the runs it starts, its table and its picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

import main
from tools import denoising_study


def test_denoising_study_draws_every_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(name: str, kind: str, seed: int, output: Path, extra: Sequence[str]) -> None:
        assert ("--coco_path" in extra) == (name == "bccd")
        folder = denoising_study.run_folder(output, name, kind, seed)
        folder.mkdir(parents=True)
        ap = 0.1 if kind == "dn" else 0.05
        figures = [[ap * epoch, 2 * ap * epoch, *[0.0] * 10] for epoch in (1, 2)]
        lines = [{"epoch": i, "test_loss": 5.0 - i, "test_coco_eval_bbox": figure} for i, figure in enumerate(figures)]
        (folder / "log.txt").write_text("\n".join(map(json.dumps, lines)))

    monkeypatch.setattr(denoising_study, "train", train)
    assert denoising_study.main(["--output", str(tmp_path), "--bccd", "cells", "--seeds", "1", "2"]) == 0
    printed = capsys.readouterr().out
    assert "| generated | with denoising | 2 | 20.0, 20.0 | 40.0, 40.0 | 4.00, 4.00 |" in printed
    assert "| bccd | without | 1 | 5.0, 5.0 | 10.0, 10.0 | 5.00, 5.00 |" in printed
    assert Image.open(tmp_path / "study.png").size == (1100, 720)


@pytest.mark.parametrize("name", ["generated", "bccd"])
def test_denoising_study_configurations_differ_in_denoising_alone(name: str) -> None:
    config = ["--config_file", str(denoising_study.REPOSITORY / f"configs/study_{name}.py")]
    runs = {kind: vars(main.parse_args([*config, *options])) for kind, (_, options, _) in denoising_study.KINDS.items()}
    differing = {key for key in runs["dn"] if runs["dn"][key] != runs["match"][key]}
    assert differing - {"options"} == {"use_dn"}
