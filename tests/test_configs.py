"""Configurations of published results: they parse, build, have the published size, and say how to run them."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import main
from models import build_model
from tools.benchmarks.model import count

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIGS = REPOSITORY / "configs"
SHARED = REPOSITORY.parent / "shared"
# Trainable parameters with 91 classes: published, or counted in the official code.
TRAINABLE = {
    "dn_dab_detr_r50_50ep": 43_472_577,
    "dn_dab_detr_r101_50ep": 62_412_481,
    "dn_dab_detr_dc5_r50_50ep": 43_472_577,
    "dn_dab_detr_dc5_r101_50ep": 62_412_481,
    "dn_encoder_only_r50_50ep": 48_266_189,
    "dn_deformable_r50_50ep": 47_206_754,
    "dn_deformable_r50_24ep": 47_206_754,
    "dn_deformable_r50_12ep": 47_206_754,
    "dn_dab_detr_dc5_r50_3pat_12ep": 43_473_345,
    "dn_dab_detr_dc5_r101_3pat_12ep": 62_413_249,
    "dn_encoder_only_r50_12ep": 48_266_189,
    "dn_encoder_only_r101_12ep": 67_206_093,
    "dn_dino_deformable_r50_36ep": 47_428_157,
    "dn_dino_4scale_r50_12ep": 47_581_757,
    "dab_detr_r50_50ep": 43_449_117,
    "dab_detr_r50_3pat_50ep": 43_449_885,
    "dab_detr_r101_50ep": 62_389_021,
    "dab_detr_r101_3pat_50ep": 62_389_789,
    "dab_detr_dc5_r50_50ep": 43_449_117,
    "dab_detr_dc5_r50_3pat_50ep": 43_449_885,
    "dab_detr_dc5_r101_50ep": 62_389_021,
    "dab_detr_dc5_r101_3pat_50ep": 62_389_789,
    "dab_detr_dc5_r50_3pat_12ep": 43_449_885,
    "dab_detr_dc5_r101_3pat_12ep": 62_389_789,
    "dab_encoder_only_r50_50ep": 48_266_189,
    "dab_deformable_r50_50ep": 47_183_594,
    "deformable_detr_r50_50ep": 39_847_265,
    "deformable_detr_r50_refine_50ep": 40_627_260,
    "deformable_detr_r50_two_stage_50ep": 40_959_129,
    "deformable_detr_r50_single_scale_50ep": 33_844_193,
    "deformable_detr_r50_single_scale_dc5_50ep": 33_844_193,
    "deformable_detr_r50_12ep": 39_847_265,
}
# Official script of Deformable DETR -> the configuration that says the same.
SCRIPTS = {
    "r50_deformable_detr.sh": "deformable_detr_r50_50ep",
    "r50_deformable_detr_single_scale.sh": "deformable_detr_r50_single_scale_50ep",
    "r50_deformable_detr_single_scale_dc5.sh": "deformable_detr_r50_single_scale_dc5_50ep",
    "r50_deformable_detr_plus_iterative_bbox_refinement.sh": "deformable_detr_r50_refine_50ep",
    "r50_deformable_detr_plus_iterative_bbox_refinement_plus_plus_two_stage.sh": "deformable_detr_r50_two_stage_50ep",
}


def parse(name: str, *more: str):
    return main.parse_args(["--config_file", str(CONFIGS / f"{name}.py"), *more])


def header(name: str) -> str:
    docstring = ast.get_docstring(ast.parse((CONFIGS / f"{name}.py").read_text(encoding="utf-8")))
    assert docstring is not None, name
    return docstring


def command(name: str) -> list[str]:
    """Return the words of the command in a header: its indented lines."""
    lines = [line.strip() for line in header(name).splitlines() if line.startswith("    ")]
    return shlex.split(" ".join(line.removesuffix("\\") for line in lines))


def test_every_configuration_is_checked():
    files = {path.stem for path in CONFIGS.glob("*.py") if not path.stem.startswith(("demo", "study"))}
    assert files == set(TRAINABLE)
    assert {path.name for path in CONFIGS.glob("*.sh")} == set(SCRIPTS)


@pytest.mark.parametrize("name", TRAINABLE)
def test_configuration_builds_with_the_published_number_of_parameters(name):
    with torch.device("meta"):
        model, _, _ = build_model(parse(name, "--backbone_weights", "none"))
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert count == TRAINABLE[name]
    assert f"Trainable parameters: {count:,}." in header(name)


@pytest.mark.parametrize("name", TRAINABLE)
def test_header_names_result_and_command(name):
    text, args = header(name), parse(name)
    assert "Expected on COCO val2017: AP " in text and f"{args.epochs} epochs" in text.splitlines()[0]
    words = command(name)
    assert words[words.index("--config_file") + 1] == f"configs/{name}.py"
    processes = int(words[words.index("tools/run_dist_launch.sh") + 1])
    assert f"{processes} GPUs x {args.batch_size} image" in text
    # Batches of 16 images; 32 in the paper of Deformable DETR.
    assert processes * args.batch_size == (32 if args.modelname == "deformable_detr" else 16)
    # What the header tells to type is accepted as it stands.
    main.parse_args(words[words.index("main.py") + 1 :])


@pytest.mark.parametrize("name", TRAINABLE)
def test_schedule_follows_the_number_of_epochs(name):
    args = parse(name)
    assert name.endswith(f"_{args.epochs}ep")
    assert args.lr_drop == {12: 11, 24: 20, 36: 30, 50: 40}[args.epochs]
    assert args.use_dn == name.startswith("dn_")
    assert args.dilation == ("dc5" in name) and args.backbone == ("resnet101" if "r101" in name else "resnet50")


def zoo_rows() -> dict[str, list[str]]:
    """Return the table rows of docs/zoo.md: configuration -> AP, epochs, run, parameters, G, operator."""
    lines = (REPOSITORY / "docs" / "zoo.md").read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    return {row[0].strip("`"): row[1:] for row in cells}


def test_zoo_lists_every_configuration_as_its_header_does():
    rows = zoo_rows()
    assert set(rows) == set(TRAINABLE)
    launches = {"A": "8 GPUs x 2 images", "B": "16 GPUs x 1 image", "C": "16 GPUs x 2 images"}
    for name, (ap, epochs, launch, parameters, _, _) in rows.items():
        text = header(name)
        assert re.search(rf"Expected on COCO val2017: AP {ap}[.,;]", text), name
        assert f"Training: {launches[launch]}, {epochs} epochs. Trainable parameters: {parameters}." in text, name


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINABLE)
def test_zoo_has_the_measured_multiply_adds(name):
    _, counts = count(parse(name, "--backbone_weights", "none"), (800, 1199), 1)
    products, operator = (sum(getattr(c, what) for c in counts.values()) / 1e9 for what in ("total", "operator"))
    assert zoo_rows()[name][4:] == [f"{products:.1f}", f"{operator:.1f}"]


@pytest.mark.parametrize(("script", "name"), SCRIPTS.items(), ids=SCRIPTS)
def test_official_script_says_what_its_configuration_says(script, name, tmp_path):
    (tmp_path / "python").write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    (tmp_path / "python").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "COCO_PATH": "elsewhere"}
    done = subprocess.run(
        [str(CONFIGS / script), "--seed", "7"], cwd=REPOSITORY, env=environment, capture_output=True, check=True
    )
    arguments = json.loads(done.stdout)
    assert arguments[:2] == ["-u", "main.py"]
    said, expected = vars(main.parse_args(arguments[2:])), vars(parse(name, "--coco_path", "elsewhere", "--seed", "7"))
    assert said.pop("output_dir") == f"outputs/{script.removesuffix('.sh')}"
    assert {k: said[k] for k in said if k != "config_file"} == {k: expected[k] for k in said if k != "config_file"}


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "data" / "bccd").is_dir(), reason="no photographs beside the repository")
def test_official_command_trains_under_the_launcher(tmp_path):
    small = "--device cpu --backbone resnet18 --backbone_weights none --batch_norm_type BatchNorm2d --hidden_dim 32"
    small += " --enc_layers 1 --dec_layers 2 --dim_feedforward 32 --num_queries 10 --epochs 1 --debug --num_workers 0"
    small += " --data_aug_scales 64 --data_aug_scales2_resize 64 --data_aug_scales2_crop 32 48 --data_aug_max_size 96"
    small += f" --eval_scale 64 --output_dir {tmp_path}"
    done = subprocess.run(
        ["./tools/run_dist_launch.sh", "2", "./configs/r50_deformable_detr.sh", *small.split()],
        cwd=REPOSITORY,
        env={
            **os.environ,
            "GPUS_PER_NODE": "2",
            "OMP_NUM_THREADS": "1",
            "COCO_PATH": str(SHARED / "data" / "bccd"),
            "MASTER_PORT": "29731",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(json.loads((tmp_path / "log.txt").read_text())["test_coco_eval_bbox"]) == 12
