"""Checkpoints of small runs, and what their evaluation finds, for tests of what reads such files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import main
from datasets.coco_eval import CocoEvaluator
from models import build_model


def evaluated(monkeypatch: pytest.MonkeyPatch, *argv: Any) -> dict[int, dict[str, torch.Tensor]]:
    """Run `main.py --eval` and return what reached the evaluator, by image id."""
    seen: dict[int, dict[str, torch.Tensor]] = {}
    update = CocoEvaluator.update

    def listening(self: CocoEvaluator, predictions: Any) -> None:
        seen.update(predictions)
        update(self, predictions)

    with monkeypatch.context() as patch:
        patch.setattr(CocoEvaluator, "update", listening)
        assert main.run_command_line(list(map(str, argv))) == 0
    return seen


def small_file(path: Path, *, num_classes: int, official: bool, **beside: Any) -> Path:
    """Write an untrained DAB-DETR; as the official code does, options are a namespace and names are missing."""
    size = "--backbone resnet18 --hidden_dim 32 --enc_layers 1 --dec_layers 1 --num_queries 5 --dim_feedforward 16"
    argv = ["-m", "dab_detr", *size.split(), "--num_classes", str(num_classes), "--backbone_weights", "none"]
    args = main.parse_args(argv)
    torch.manual_seed(0)
    content: dict[str, Any] = {"model": build_model(args)[0].state_dict(), **beside}
    if official:
        del args.backbone_stages, args.eval_scale, args.label_mapping  # ours alone
        args.num_classes = None
    torch.save({**content, "args" if official else "options": args if official else vars(args)}, path)
    return path
