"""From a checkpoint of COCO's 91 classes to own classes with the documented command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import main
from datasets.coco_names import COCO_NAMES
from tests.dataset_helpers import shared_data
from tests.test_main import SMALL
from util.checkpoint import load_checkpoint

pytestmark = pytest.mark.slow
FEW = 4  # pictures per split
SMALL_PICTURES = ("--data_aug_max_size", "96")


@pytest.fixture(scope="module")
def coco_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write what official checkpoints hold: weights for 91 classes and no names."""
    options = [*SMALL, "--coco_path", str(shared_data("coco_tiny")), "--label_mapping", "ids"]
    args = main.parse_args(options)
    main.init_distributed_mode(args)
    torch.manual_seed(0)
    model = main.build_run(args, torch.device("cpu"), None).state.model
    assert args.num_classes == max(COCO_NAMES) + 1
    path = tmp_path_factory.mktemp("coco") / "checkpoint.pth"
    torch.save({"model": model.state_dict()}, path)
    return path


def own_data(folder: Path, **renamed: str) -> Path:
    """Write the annotations of a few pictures of cells with some classes renamed; return the data set."""
    source = shared_data("bccd")
    (folder / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (folder / f"{split}2017").symlink_to(source / f"{split}2017")
        content = json.loads((source / "annotations" / f"instances_{split}2017.json").read_text())
        content["images"] = content["images"][:FEW]
        known = {image["id"] for image in content["images"]}
        content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] in known]
        for category in content["categories"]:
            category["name"] = renamed.get(category["name"], category["name"])
        (folder / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
    return folder


def finetune(checkpoint: Path, data: Path, output: Path, *more: str) -> str:
    """Fine-tune one epoch as documented and return what the run wrote into its log."""
    argv = [*SMALL, *SMALL_PICTURES, "--coco_path", str(data), "--dataset_file", "mine", "--epochs", "1"]
    status = main.run_command_line(
        [*argv, "--pretrain_model_path", str(checkpoint), "--output_dir", str(output), *more]
    )
    assert status == 0
    return (output / "info.txt").read_text()


def test_finetune_starts_new_classes_anew_and_says_so(coco_checkpoint: Path, tmp_path: Path) -> None:
    data = own_data(tmp_path / "data", WBC="Person")
    log = finetune(coco_checkpoint, data, tmp_path / "out")
    assert "classes known to the checkpoint: Person; classes that start anew: RBC, Platelets" in log
    record = json.loads((tmp_path / "out" / "log.txt").read_text())
    assert record["train_loss"] > 0 and len(record["test_coco_eval_bbox"]) == 12
    content = load_checkpoint(tmp_path / "out" / "checkpoint.pth")
    assert content["class_names"] == ["RBC", "Person", "Platelets"]
    assert content["model"]["class_embed.weight"].shape[0] == 3
    # The weights in it are evaluated by themselves too.
    evaluated = [*SMALL, *SMALL_PICTURES, "--coco_path", str(data), "--eval", "--output_dir", str(tmp_path / "eval")]
    assert main.run_command_line([*evaluated, "--resume", str(tmp_path / "out" / "checkpoint.pth")]) == 0
    assert "Platelets" in (tmp_path / "eval" / "info.txt").read_text()


def test_finetune_ignore_starts_all_classes_anew(coco_checkpoint: Path, tmp_path: Path) -> None:
    data = own_data(tmp_path / "data")
    log = finetune(coco_checkpoint, data, tmp_path / "out", "--finetune_ignore", "class_embed", "label_enc")
    assert "left out on request: " in log and "class_embed.weight" in log and "classes that start anew" not in log
    assert load_checkpoint(tmp_path / "out" / "checkpoint.pth")["class_names"] == ["RBC", "WBC", "Platelets"]
