"""Commands of the README, and those of the official one, are accepted as written."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

import main
import run_with_submitit

README = Path(__file__).resolve().parents[1] / "README.md"
# Facts of the official README: models, options and their spelling, on one line each.
OFFICIAL = (
    "python main.py -m dn_dab_detr --output_dir logs/dn_DABDETR/R50 --batch_size 1 --coco_path coco "
    "--resume checkpoint.pth --use_dn --eval",
    "python main.py -m dn_dab_deformable_detr --output_dir logs/dab_deformable/R50 --batch_size 2 --coco_path coco "
    "--resume checkpoint.pth --transformer_activation relu --use_dn --eval",
    "python main.py -m dn_deformable_detr --output_dir logs/R50 --batch_size 2 --coco_path coco --use_dn "
    "--transformer_activation relu",
    "python main.py -m dab_deformable_detr --output_dir R50 --batch_size 1 --coco_path coco --epochs 50 --lr_drop 40 "
    "--transformer_activation relu",
    "python main.py -m dn_dab_detr --output_dir logs/dn_DABDETR/R50 --batch_size 1 --epochs 50 --lr_drop 40 "
    "--coco_path coco --use_dn",
    "python -m torch.distributed.launch --nproc_per_node=8 main.py -m dn_dab_detr --output_dir logs/dn_DABDETR/R50 "
    "--batch_size 2 --epochs 50 --lr_drop 40 --coco_path coco --use_dn",
    "python run_with_submitit.py --timeout 3000 --job_name DNDETR --coco_path coco --qos normal -m dn_dab_detr "
    "--job_dir logs/dn_dabdetr/R50_%j --batch_size 2 --ngpus 8 --nodes 1 --epochs 50 --lr_drop 40 --use_dn",
)


def _commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if "main.py" in line or "run_with_submitit.py" in line]


def test_readme_has_the_commands() -> None:
    assert len(_commands()) >= 5


@pytest.mark.parametrize("command", [*OFFICIAL, *_commands()])
def test_command_is_accepted(command: str) -> None:
    words = shlex.split(command)
    if "run_with_submitit.py" in words:
        resources, rest = run_with_submitit.get_args_parser().parse_known_args(words[2:])
        assert resources.job_dir.endswith("%j")
        options = main.parse_args(rest)
    else:
        options = main.parse_args(words[words.index("main.py") + 1 :])
    assert f"-m {options.modelname} " in command
