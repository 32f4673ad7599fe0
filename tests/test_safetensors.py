"""Weights in .safetensors files: what reads them, and what they cannot do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import main
from tests.runs import command
from tests.trained_files import evaluated
from tools import convert_checkpoint
from tools.predictor import Predictor
from util.checkpoint import load_checkpoint
from util.errors import CheckpointError

pytest_plugins = ("tests.tiny_run",)


def test_safetensors_file_predicts_the_same(tiny_checkpoint: Path, tiny_data: Path, tmp_path: Path) -> None:
    target = tmp_path / "model.safetensors"
    assert convert_checkpoint.main([str(tiny_checkpoint), str(target), "--ema"]) == 0
    path = sorted((tiny_data / "val2017").iterdir())[0]
    one, other = (Predictor(file, device="cpu", score_threshold=0) for file in (tiny_checkpoint, target))
    assert other.class_names == ["leaf", "brick"] and other.category_ids == [1, 2]
    assert (other.transform.scale, other.transform.max_size) == (48, 1333)
    np.testing.assert_array_equal(one(path).boxes_xyxy, other(path).boxes_xyxy)


def test_resume_of_safetensors_says_what_to_do_instead(
    tiny_checkpoint: Path,
    tiny_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "model.safetensors"
    assert convert_checkpoint.main([str(tiny_checkpoint), str(file)]) == 0
    assert main.run_command_line(command(tiny_data, tmp_path / "a", "--epochs", 2, "--resume", file)) == 1
    assert f"--pretrain_model_path {file}, or evaluate them with --eval" in capsys.readouterr().err
    expected = evaluated(monkeypatch, *command(tiny_data, tmp_path / "b", "--eval", "--resume", tiny_checkpoint))
    own = evaluated(monkeypatch, *command(tiny_data, tmp_path / "c", "--eval", "--resume", file))
    for image_id, result in expected.items():
        assert torch.equal(own[image_id]["scores"], result["scores"])


def test_pretraining_takes_names_from_safetensors(tiny_checkpoint: Path, tiny_data: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    assert convert_checkpoint.main([str(tiny_checkpoint), str(file)]) == 0
    # Ids as labels: three rows instead of two, "leaf" moves from row 0 to row 1.
    argv = command(tiny_data, tmp_path, "--label_mapping", "ids", "--pretrain_model_path", file)
    args = main.parse_args(argv)
    main.init_distributed_mode(args)
    parts = main.build_run(args, torch.device("cpu"), None)
    main.restore(parts.state, args, None, coco_names=main.COCO_NAMES)
    source, own = load_checkpoint(tiny_checkpoint)["model"], parts.state.model.state_dict()
    assert torch.equal(own["class_embed.weight"][1:], source["class_embed.weight"])
    assert torch.equal(own["input_proj.weight"], source["input_proj.weight"])


def test_damaged_safetensors_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.arange(100.0)}, path)
    whole = path.read_bytes()
    for content in (whole[:-50], b"", b"\xff" * 64):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"x\.safetensors is damaged"):
            load_checkpoint(path)
    save_file({"a": torch.zeros(1)}, path, metadata={"options": "{"})
    with pytest.raises(CheckpointError, match=r"x\.safetensors is damaged"):
        load_checkpoint(path)
