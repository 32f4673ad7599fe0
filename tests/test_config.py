"""Configuration files: what they may hold, what wins over what, writing and reading again."""

from __future__ import annotations

from pathlib import Path

import pytest

from util.config import load_config, parse_assignments, resolve_options, save_config
from util.errors import OptionError
from util.options import build_parser

PARSER = build_parser(["dn_dab_detr", "dab_detr"])


def write(path: Path, text: str) -> str:
    """Write a file and return its path as text."""
    path.write_text(text)
    return str(path)


def test_command_line_wins_over_options_over_file_over_model_default(tmp_path: Path) -> None:
    file = write(tmp_path / "c.py", "modelname = 'dab_detr'\nlr = 1\nepochs = 7\nnheads = 4\n")
    argv = ["--config_file", file, "--options", "epochs=8", "nheads=2", "--nheads", "1"]
    args, command_line, from_files = resolve_options(PARSER, argv)
    assert (args.lr, args.epochs, args.nheads, args.lr_drop) == (1.0, 8, 1, 200)
    assert isinstance(args.lr, float)
    assert command_line["nheads"] == 1 and "epochs" not in command_line
    assert from_files == {"modelname": "dab_detr", "lr": 1.0, "epochs": 8, "nheads": 2}


def test_explicit_value_equal_to_the_default_wins_over_the_file(tmp_path: Path) -> None:
    file = write(tmp_path / "c.py", "lr = 0.5\n")
    args, _, _ = resolve_options(PARSER, ["-m", "dn_dab_detr", "--config_file", file, "--lr", "1e-4"])
    assert args.lr == 1e-4


def test_base_files_come_first(tmp_path: Path) -> None:
    write(tmp_path / "a.py", '"""Doc."""\nlr = 1.0\nepochs = 3\n')
    write(tmp_path / "b.py", "epochs = 4\nnheads = 2\n")
    file = write(tmp_path / "c.py", "_base_ = ['a.py', 'b.py']\nnheads = 1\n")
    assert load_config(file) == {"lr": 1.0, "epochs": 4, "nheads": 1}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import os\n", "line 1: expected 'option = value'"),
        ("lr = open('x')\n", "line 1: expected a number"),
        ("lr = \n", "not a Python file"),
        ("_base_ = 'c.py'\n", "builds on itself"),
        ("_base_ = 'none.py'\n", "cannot read"),
    ],
)
def test_files_with_more_than_literals_are_refused(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        load_config(write(tmp_path / "c.py", text))


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("lerning_rate=1", "unknown option"),
        ("batchsize=1", "did you mean 'batch_size'"),
        ("lr=high", "expects float"),
        ("epochs=1.5", "expects int"),
        ("epochs=True", "expects int"),
        ("use_dn=1", "True or False"),
        ("position_embedding=round", "one of sine, learned"),
        ("data_aug_scales=480", "expects a list"),
        ("data_aug_scales2_crop=[1,2,3]", "expects 2 values"),
        ("lr", "KEY=VALUE"),
        ("rank=1", "unknown option"),
    ],
)
def test_wrong_values_are_refused(assignment: str, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        resolve_options(PARSER, ["-m", "dn_dab_detr", "--options", assignment])


def test_missing_model_names_the_choices() -> None:
    with pytest.raises(OptionError, match="dn_dab_detr, dab_detr"):
        resolve_options(PARSER, [])


def test_unknown_argument_names_the_nearest() -> None:
    with pytest.raises(OptionError, match="did you mean '--batch_size'"):
        resolve_options(PARSER, ["-m", "dab_detr", "--batchsize", "2"])


def test_assignments_are_literals_or_text() -> None:
    assert parse_assignments(["a=[1, 2]", "b=x/y", "c=None", "d=1e-4"]) == {
        "a": [1, 2],
        "b": "x/y",
        "c": None,
        "d": 1e-4,
    }


def test_saved_config_is_read_back_to_the_same_options(tmp_path: Path) -> None:
    argv = ["-m", "dab_detr", "--use_dn", "--finetune_ignore", "a", "b", "--note", "it's", "--no_aux_loss"]
    args, _, _ = resolve_options(PARSER, argv)
    save_config(args, PARSER, tmp_path / "config.py")
    again, _, _ = resolve_options(PARSER, ["--config_file", str(tmp_path / "config.py")])
    assert vars(again) | {"config_file": None} == vars(args)
