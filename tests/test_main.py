"""The program from its command line: train, resume, evaluate, fine-tune, and what it says about bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import main
from tools import training
from util.checkpoint import load_checkpoint

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = REPOSITORY.parent / "shared"
SMALL = [
    "-m",
    "dn_dab_detr",
    "--use_dn",
    "--backbone",
    "resnet18",
    "--backbone_weights",
    "none",
    "--backbone_stages",
    "2",
    "--device",
    "cpu",
    "--batch_norm_type",
    "BatchNorm2d",
    "--enc_layers",
    "1",
    "--dec_layers",
    "2",
    "--dim_feedforward",
    "32",
    "--num_queries",
    "8",
    "--batch_size",
    "2",
    "--data_aug_scales",
    "48",
    "--data_aug_scales2_resize",
    "48",
    "--data_aug_scales2_crop",
    "24",
    "32",
    "--eval_scale",
    "48",
    "--num_workers",
    "0",
    "--label_mapping",
    "contiguous",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a data set of six and three small pictures with two categories; return its folder."""
    root = tmp_path_factory.mktemp("data")
    (root / "annotations").mkdir()
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 3)):
        (root / f"{split}2017").mkdir()
        images, annotations = [], []
        for number in range(count):
            image_id = 10 * (split == "val") + number + 1
            pixels = rng.integers(0, 60, (48, 64, 3), dtype=np.uint8)
            left, top = (int(value) for value in rng.integers(0, 20, 2))
            pixels[top : top + 20, left : left + 30] = (250, 40, 40) if number % 2 else (40, 250, 40)
            Image.fromarray(pixels).save(root / f"{split}2017" / f"{image_id}.png")
            images.append({"id": image_id, "file_name": f"{image_id}.png", "width": 64, "height": 48})
            annotations.append(
                {
                    "id": image_id, "image_id": image_id, "category_id": 3 + 4 * (number % 2),
                    "bbox": [left, top, 30, 20], "area": 600, "iscrowd": 0,
                }
            )  # fmt: skip
        categories = [{"id": 3, "name": "leaf"}, {"id": 7, "name": "brick"}]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
    return root


def run(data: Path | str, *more: Any, status: int = 0) -> None:
    """Run the program in this process and check its exit status."""
    argv = [*SMALL, "--coco_path", str(data), *map(str, more)]
    assert main.run_command_line(argv) == status


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train two epochs with everything switched on; return the output folder."""
    folder = tmp_path_factory.mktemp("trained")
    run(data, "--output_dir", folder, "--epochs", 2, "--lr_drop", 1, "--ema", "--save_results", "--accumulate_steps", 2)
    return folder


def test_training_leaves_what_it_promises(trained: Path) -> None:
    names = {path.name for path in trained.iterdir()}
    assert names == {
        *("config.py", "info.txt", "log.txt", "curves.png", "predictions.png", "eval", "results-0.pkl"),
        "environment.jsonl",
        *("checkpoint.pth", "checkpoint_prev1.pth"),
        *("checkpoint0000_beforedrop.pth", "checkpoint0000.pth"),
        *("checkpoint0001_beforedrop.pth", "checkpoint0001.pth"),
    }
    assert {path.name for path in (trained / "eval").iterdir()} == {"latest.pth", "000.pth", "detections.json"}
    records = [json.loads(line) for line in (trained / "log.txt").read_text().splitlines()]
    assert [record["epoch"] for record in records] == [0, 1]
    assert [record["train_lr"] for record in records] == [1e-4, pytest.approx(1e-5)]
    assert len(records[0]["test_coco_eval_bbox"]) == 12
    assert {"train_loss", "train_tgt_loss_bbox", "test_loss_ce_0", "n_parameters", "epoch_time"} <= set(records[0])
    for picture in ("curves.png", "predictions.png"):
        with Image.open(trained / picture) as image:
            assert image.size[0] > 500


def test_checkpoint_carries_the_whole_run(trained: Path) -> None:
    content = load_checkpoint(trained / "checkpoint.pth")
    assert (content["epoch"], content["step"], content["batches_done"]) == (1, 4, 0)
    assert content["class_names"] == ["leaf", "brick"]
    assert content["options"]["num_classes"] == 2 and content["options"]["use_dn"] is True
    assert {"model", "optimizer", "lr_scheduler", "ema", "rng", "versions"} <= set(content)


def test_effective_configuration_can_be_used_again(trained: Path) -> None:
    args = main.parse_args(["--config_file", str(trained / "config.py")])
    assert (args.modelname, args.num_queries, args.epochs, args.num_classes) == ("dn_dab_detr", 8, 2, None)


def test_evaluation_of_a_checkpoint(
    trained: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(data, "--output_dir", tmp_path, "--eval", "--ema", "--resume", trained / "checkpoint.pth")
    out = capsys.readouterr().out
    assert "Average Precision" in out and "leaf" in out and "brick" in out
    last = json.loads((trained / "log.txt").read_text().splitlines()[-1])
    record = json.loads((tmp_path / "log.txt").read_text())
    # The same weights on the same pictures: the same figures and, up to the order of float32 sums, losses.
    assert record["test_coco_eval_bbox"] == last["test_coco_eval_bbox"]
    assert record["test_loss"] == pytest.approx(last["test_loss"], rel=1e-6)
    assert torch.load(tmp_path / "eval.pth", weights_only=True)["precision"].shape[2] == 2


def test_evaluation_in_mixed_precision_rounds_weights_once(
    trained: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated: list[torch.nn.Module] = []
    prepare = training.prepare_for_inference
    monkeypatch.setattr(
        training, "prepare_for_inference", lambda *a, **k: evaluated.append(prepare(*a, **k)) or evaluated[-1]
    )
    losses = []
    for flags in ([], ["--amp"], ["--amp", "--amp_dtype", "float16"]):
        run(data, "--output_dir", tmp_path, "--eval", "--ema", "--resume", trained / "checkpoint.pth", *flags)
        losses.append(json.loads((tmp_path / "log.txt").read_text().splitlines()[-1])["test_loss"])
    types = [{p.dtype for name, p in model.named_parameters() if "class_embed" in name} for model in evaluated]
    assert types == [{torch.float32}, {torch.bfloat16}, {torch.float16}]
    # Eight and eleven bits through three layers.
    assert losses[1] == pytest.approx(losses[0], rel=0.02) and losses[2] == pytest.approx(losses[0], rel=0.005)
    assert len(set(losses)) == 3


def test_resumed_in_mid_epoch_equals_the_undisturbed_run_bit_for_bit(data: Path, tmp_path: Path) -> None:
    common = ("--epochs", 2, "--lr_drop", 1, "--dropout", 0.1, "--ema", "--lr", 1e-3)
    run(data, *common, "--output_dir", tmp_path / "whole")
    stopping = [*SMALL, "--coco_path", str(data), *map(str, common), "--output_dir", str(tmp_path / "killed")]
    # Each epoch has three steps. The process ends without a word after the fifth, of which only four are saved.
    program = f"""
import os, main
from util.run_state import RunState
save = RunState.save
def save_or_die(self, *args, **options):
    if self.step == 5:
        os._exit(9)
    save(self, *args, **options)
RunState.save = save_or_die
main.run_command_line({[*stopping, "--checkpoint_steps", "1"]!r})
"""
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 9, done.stderr
    content = load_checkpoint(tmp_path / "killed" / "checkpoint.pth")
    assert (content["epoch"], content["batches_done"], content["step"]) == (0, 1, 4)
    run(data, *common, "--output_dir", tmp_path / "killed", "--resume", "auto")
    whole, resumed = (load_checkpoint(tmp_path / name / "checkpoint.pth") for name in ("whole", "killed"))
    assert whole["step"] == resumed["step"] == 6
    for part in (whole["model"], whole["ema"]["model"]):
        assert all(value.isfinite().all() for value in part.values())
    for name, value in whole["model"].items():
        assert torch.equal(value, resumed["model"][name]), name
    for name, value in whole["ema"]["model"].items():
        assert torch.equal(value, resumed["ema"]["model"][name]), name
    for index, state in whole["optimizer"]["state"].items():
        assert torch.equal(state["exp_avg_sq"], resumed["optimizer"]["state"][index]["exp_avg_sq"])


def test_finished_run_has_nothing_left_to_train(trained: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(data, "--resume", trained / "checkpoint.pth", "--epochs", 2)
    assert "nothing left to train" in capsys.readouterr().out


def test_fine_tuning_takes_class_rows_by_name(trained: Path, data: Path, tmp_path: Path) -> None:
    other = tmp_path / "data"
    for part in ("train2017", "val2017"):
        (other / part).parent.mkdir(exist_ok=True)
        (other / part).symlink_to(data / part)
    (other / "annotations").mkdir()
    for split in ("train", "val"):
        text = (data / "annotations" / f"instances_{split}2017.json").read_text()
        content = json.loads(text.replace('"leaf"', '"brick"', 1).replace('"name": "brick"}]', '"name": "pipe"}]'))
        (other / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
    args = main.parse_args(
        [*SMALL, "--coco_path", str(other), "--pretrain_model_path", str(trained / "checkpoint.pth")]
    )
    main.init_distributed_mode(args)
    run_parts = main.build_run(args, torch.device("cpu"), None)
    main.restore(run_parts.state, args, None, coco_names=main.COCO_NAMES)
    source, own = load_checkpoint(trained / "checkpoint.pth")["model"], run_parts.state.model.state_dict()
    assert run_parts.val_data.class_names == ["brick", "pipe"]
    assert torch.equal(own["class_embed.weight"][0], source["class_embed.weight"][1])
    assert not torch.equal(own["class_embed.weight"][1], source["class_embed.weight"][1])
    assert torch.equal(own["input_proj.weight"], source["input_proj.weight"])


def test_seed_decides_the_weights(data: Path) -> None:
    weights = []
    for seed in ("1", "1", "2"):
        args = main.parse_args([*SMALL, "--coco_path", str(data), "--seed", seed, "--eval"])
        main.init_distributed_mode(args)
        main.seed_everything(args.seed)
        weights.append(main.build_run(args, torch.device("cpu"), None).state.model.state_dict()["class_embed.weight"])
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--resume", "/nowhere/x.pth"), "no checkpoint /nowhere/x.pth"),
        (("--pretrain_model_path", "/nowhere/x.pth"), "no checkpoint /nowhere/x.pth"),
        (("--output_dir", "/dev/null/x"), "cannot write to --output_dir /dev/null/x"),
        (("--device", "warp"), "--device"),
        (("--backbone", "resnet17"), "resnet17"),
        (("--num_classes", "1"), "--num_classes"),
        (("--lr_linear_proj_names", "nothing"), "--lr_linear_proj_names nothing"),
        (("--batch_size", "50"), "--batch_size"),
    ],
)
def test_bad_input_is_one_sentence(
    data: Path, more: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run(data, *more, status=1)
    error = capsys.readouterr().err
    assert error.startswith("main.py: error: ") and error.count("\n") == 1 and words in error


def test_missing_data_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path / "none", status=1)
    error = capsys.readouterr().err
    assert error.startswith("main.py: error: ") and error.count("\n") == 1 and "none" in error


@pytest.mark.parametrize("workers", [0, 1])
def test_a_truncated_picture_is_named(
    data: Path, tmp_path: Path, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "data"
    broken.mkdir()
    (broken / "annotations").symlink_to(data / "annotations")
    (broken / "val2017").symlink_to(data / "val2017")
    (broken / "train2017").mkdir()
    for path in (data / "train2017").iterdir():
        content = path.read_bytes()
        (broken / "train2017" / path.name).write_bytes(content[:200] if path.name == "2.png" else content)
    run(broken, "--num_workers", workers, "--epochs", 1, status=1)
    error = capsys.readouterr().err
    assert error.startswith("main.py: error: ") and error.count("\n") == 1
    assert "2.png" in error and "Traceback" not in error


def test_another_class_count_is_one_sentence(trained: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(data, "--label_mapping", "ids", "--resume", trained / "checkpoint.pth", status=1)
    assert "checkpoint has 2 classes, the model 8" in capsys.readouterr().err


def test_traceback_can_be_asked_for(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DN_DETR_TRACEBACK", "1")
    with pytest.raises(main.CheckpointError):
        run(data, "--resume", "/nowhere/x.pth")


def test_wrong_option_ends_with_status_two(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main.parse_args(["-m", "dn_dab_detr", "--two_stage"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("main.py: error: --two_stage has no meaning here")


def test_help_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main.parse_args(["--help"])
    assert stop.value.code == 0 and "--use_dn" in capsys.readouterr().out
    assert main.get_args_parser().add_help is False


def test_two_processes_train_and_evaluate(data: Path, tmp_path: Path) -> None:
    argv = [*SMALL, "--coco_path", str(data), "--output_dir", str(tmp_path), "--epochs", "1", "--batch_size", "1"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launcher, "main.py", *argv],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((tmp_path / "log.txt").read_text())
    assert len(record["test_coco_eval_bbox"]) == 12
    content = load_checkpoint(tmp_path / "checkpoint.pth")
    assert content["step"] == 3 and len(content["rng"]) == 2
    assert (tmp_path / "rank1.txt").exists()


@pytest.mark.skipif(not (SHARED / "data" / "bccd").is_dir(), reason="no photographs beside the repository")
def test_photographs_train_and_evaluate(tmp_path: Path) -> None:
    run(SHARED / "data" / "bccd", "--debug", "--epochs", 1, "--output_dir", tmp_path, "--data_aug_max_size", 96)
    assert json.loads((tmp_path / "log.txt").read_text())["train_loss"] > 0
