"""Starting from another model's weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from util.errors import CheckpointError
from util.pretrain import load_pretrained, load_pretrained_file, matching_classes


class Detector(nn.Module):
    """One body, a class head and label embeddings with a row for "no object"."""

    def __init__(self, num_classes: int, width: int = 4) -> None:
        super().__init__()
        self.body = nn.Linear(4, width)
        self.class_embed = nn.Linear(4, num_classes)
        self.label_enc = nn.Embedding(num_classes + 1, 4)


def test_equal_models_are_copied_whole() -> None:
    source, own = Detector(3), Detector(3)
    report = load_pretrained(own, source.state_dict())
    assert len(report.taken) == 5 and not report.untouched
    for name, value in source.state_dict().items():
        assert torch.equal(own.state_dict()[name], value)


def test_class_rows_are_matched_by_name() -> None:
    source, own = Detector(4), Detector(3)
    before = {name: value.clone() for name, value in own.state_dict().items()}
    report = load_pretrained(
        own, source.state_dict(), source_classes=["N/A", "Cat", "dog", "cow"], model_classes=["dog", "fox", "cat"]
    )
    assert sorted(report.by_class) == ["class_embed.bias", "class_embed.weight", "label_enc.weight"]
    for name in report.by_class:
        new, old = own.state_dict()[name], source.state_dict()[name]
        assert torch.equal(new[0], old[2]) and torch.equal(new[2], old[1])
        assert torch.equal(new[1], before[name][1])  # "fox" is new
    assert torch.equal(own.label_enc.weight[-1], source.label_enc.weight[-1])


def test_report_names_the_classes_taken_and_the_new_ones() -> None:
    report = load_pretrained(
        Detector(4),
        Detector(3).state_dict(),
        source_classes=["N/A", "Cat", "dog"],
        model_classes=["N/A", "fox", "cat", "x"],
    )
    assert (report.classes_taken, report.classes_new) == (["cat"], ["fox", "x"])
    assert "classes known to the checkpoint: cat; classes that start anew: fox, x" in str(report)
    unmatched = load_pretrained(Detector(3), Detector(3).state_dict())
    assert unmatched.classes_taken == unmatched.classes_new == []


def test_equal_counts_with_other_names_are_matched_by_name_too() -> None:
    source, own = Detector(2), Detector(2)
    load_pretrained(own, source.state_dict(), source_classes=["a", "b"], model_classes=["b", "c"])
    assert torch.equal(own.class_embed.bias[0], source.class_embed.bias[1])
    assert not torch.equal(own.class_embed.bias[1], source.class_embed.bias[1])


def test_another_class_count_without_names_is_one_sentence() -> None:
    with pytest.raises(
        CheckpointError, match="checkpoint has 91 classes, the model 3: pass --finetune_ignore class_emb"
    ):
        load_pretrained(Detector(3), Detector(91).state_dict())


def test_weights_of_another_shape_and_unknown_ones_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    weights = {**Detector(3).state_dict(), "extra": torch.ones(1)}
    report = load_pretrained(Detector(3, width=5), weights)
    assert report.unfit == ["body.weight", "body.bias", "extra"]
    assert report.untouched == ["body.weight", "body.bias"]
    assert "does not fit: body.weight, body.bias, extra" in caplog.text


def test_finetune_ignore_leaves_the_heads_alone() -> None:
    own, source = Detector(3), Detector(91)
    report = load_pretrained(own, source.state_dict(), ignore=["class_embed", "label_enc"])
    assert sorted(report.ignored) == ["class_embed.bias", "class_embed.weight", "label_enc.weight"]
    assert sorted(report.untouched) == sorted(report.ignored)
    assert torch.equal(own.body.weight, source.body.weight)
    assert "left out on request: class_embed.weight" in str(report)


def test_nothing_fitting_is_an_error() -> None:
    with pytest.raises(CheckpointError, match="another model's"):
        load_pretrained(Detector(3), {"x": torch.ones(1)})


def test_unused_names_match_nothing() -> None:
    assert matching_classes(["N/A", "", "cat"], ["N/A", "", "CAT"]) == [(2, 2)]


def test_an_official_file_is_taken_for_coco(tmp_path: Path) -> None:
    coco = {1: "person", 3: "car"}
    source, own = Detector(4), Detector(2)
    torch.save({"model": source.state_dict()}, tmp_path / "official.pth")
    load_pretrained_file(own, str(tmp_path / "official.pth"), model_classes=["car", "person"], coco_names=coco)
    assert torch.equal(own.class_embed.weight, source.class_embed.weight[[3, 1]])


def test_own_files_bring_their_names(tmp_path: Path) -> None:
    source, own = Detector(3), Detector(2)
    torch.save({"model": source.state_dict(), "class_names": ["a", "b", "c"]}, tmp_path / "own.pth")
    load_pretrained_file(own, str(tmp_path / "own.pth"), model_classes=["c", "x"], coco_names={1: "person"})
    assert torch.equal(own.class_embed.weight[0], source.class_embed.weight[2])
