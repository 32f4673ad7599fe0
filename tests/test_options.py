"""Options: official names and defaults, and what is refused."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from util.config import resolve_options
from util.errors import OptionError
from util.option_rules import BOUNDS, EVERY_MODEL, FAMILIES, NEEDS, check_options, model_family
from util.options import OptionParser, build_parser, model_defaults

GOLDEN = json.loads((Path(__file__).parent / "golden" / "cli_defaults.json").read_text())
MODELS = [name for repo in ("DN-DETR", "DAB-DETR", "Deformable-DETR") for name in GOLDEN[repo]["models"]]
# Differs from official: without --coco_path a generated data set is used.
# use_mqs and use_lft: on by default in the DINO-style model, which computes with both in the official code too.
NOT_AS_OFFICIAL = {"modelname", "coco_path", "use_mqs", "use_lft"}


def resolve(*argv: str) -> argparse.Namespace:
    """Resolve and check a command line."""
    parser = build_parser(MODELS)
    args, command_line, from_files = resolve_options(parser, argv)
    check_options(args, vars(parser.parse_args([])), command_line, from_files)
    return args


@pytest.mark.parametrize("repo", ["DN-DETR", "DAB-DETR", "Deformable-DETR"])
def test_options_have_official_names_and_defaults(repo: str) -> None:
    parser = build_parser(MODELS)
    flags = {flag: action.dest for action in parser._actions for flag in action.option_strings}
    for modelname in GOLDEN[repo]["models"]:
        args = resolve("-m", modelname)
        for flag, (dest, default) in GOLDEN[repo]["options"].items():
            assert flags[flag] == dest
            if dest not in NOT_AS_OFFICIAL:
                assert getattr(args, dest) == default, dest


def test_parser_defaults_are_dn_detrs() -> None:
    values = vars(build_parser(MODELS).parse_args([]))
    for dest, default in GOLDEN["DN-DETR"]["options"].values():
        assert values[dest] == default, dest


def test_parser_is_a_parent_without_help() -> None:
    parser = OptionParser("x", parents=[build_parser(MODELS)])
    assert parser.parse_args(["-m", "dab_detr"]).modelname == "dab_detr"


@pytest.mark.parametrize("flag", ["--local_rank", "--local-rank"])
def test_local_rank_is_accepted_in_both_spellings(flag: str) -> None:
    assert resolve("-m", "dab_detr", f"{flag}=3").local_rank == 3


def test_every_rule_names_an_option() -> None:
    known = set(vars(build_parser(MODELS).parse_args([])))
    for family, rules in FAMILIES.items():
        assert set(rules) <= known, family
    assert set(EVERY_MODEL) | set(NEEDS) | set(NEEDS.values()) | set(BOUNDS) <= known


def test_every_family_is_used() -> None:
    assert {model_family(name) for name in MODELS} == set(FAMILIES)


def test_defaults_pass_for_every_model() -> None:
    for name in MODELS:
        assert resolve("-m", name).modelname == name


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("-m", "dn_dab_detr", "--two_stage"), "no encoder proposals"),
        (("-m", "dn_dab_detr", "--num_feature_levels", "3"), "not deformable"),
        (("-m", "dn_dab_detr", "--masks"), "not available yet"),
        (("-m", "dn_dab_detr", "--dataset_file", "coco_panoptic"), "not available yet"),
        (("-m", "dn_dab_detr", "--eos_coef", "0.2"), "focal"),
        (("-m", "dn_dab_detr", "--num_results", "50"), "--num_select"),
        (("-m", "dab_detr", "--use_dn"), "without denoising"),
        (("-m", "dn_dab_detr", "--scalar", "3"), "without --use_dn"),
        (("-m", "dn_dab_detr", "--use_dn", "--scalar", "0"), "at least one"),
        (("-m", "dn_dab_detr", "--ema_decay", "0.9"), "without --ema"),
        (("-m", "dn_dab_detr", "--drop_lr_now"), "without --resume"),
        (("-m", "dn_dab_detr", "--tensorboard"), "without --output_dir"),
        (("-m", "dn_dab_detr", "--wandb_project", "x"), "without --output_dir"),
        (("-m", "dn_dab_detr", "--output_dir", "x", "--mlflow_uri", "y"), "without --mlflow_experiment"),
        (("-m", "dn_dab_detr", "--output_dir", "x", "--log_pictures_every", "5"), "without a tracker"),
        (("-m", "dn_dab_detr", "--output_dir", "x", "--eval", "--tensorboard"), "no effect with --eval"),
        (("-m", "dn_dab_detr", "--resume", "auto"), "--output_dir"),
        (("-m", "dn_dab_detr", "--resume", "a.pth", "--pretrain_model_path", "b.pth"), "pass one"),
        (("-m", "dn_dab_detr", "--batch_size", "0"), "at least 1"),
        (("-m", "dn_dab_detr", "--size_bucket", "-64"), "at least 0"),
        (("-m", "dn_dab_detr", "--use_dn", "--label_noise_scale", "1.5"), "from 0 to 1"),
        (("-m", "dn_dab_detr", "--dataset_file", "mine"), "--coco_path"),
        (("-m", "dn_dab_detr", "--fix_size", "--data_aug_scales", "300"), "--fix_size"),
        (("-m", "dn_dab_deformable_detr_deformable_encoder_only", "--pre_norm"), "post-norm"),
        (("-m", "dn_dab_dino_deformable_detr", "--use_mqs"), "--two_stage"),
        (("-m", "deformable_detr", "--num_patterns", "3"), "anchor"),
    ],
)
def test_options_without_meaning_are_refused(argv: tuple[str, ...], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        resolve(*argv)


@pytest.mark.parametrize(
    "argv",
    [
        ("-m", "dn_dab_detr", "--num_feature_levels", "4"),  # the default, given by hand
        ("-m", "dn_dab_deformable_detr", "--transformer_activation", "gelu"),
        ("-m", "dn_dab_dino_deformable_detr", "--no-use_mqs", "--no-use_lft"),
        ("-m", "dn_dab_deformable_detr", "--with_box_refine"),
        ("-m", "dn_dab_dino_deformable_detr", "--two_stage", "--use_mqs", "--use_lft", "--use_dn", "--contrastive"),
        ("-m", "dn_dab_detr", "--eval", "--scalar", "10"),  # evaluation has no denoising at all
        ("-m", "dn_dab_detr", "--options", "scalar=3"),  # a shared configuration may hold it
        ("-m", "dn_dab_detr", "--use_dn", "--dn_number", "100", "--scalar", "0"),
    ],
)
def test_options_that_say_what_happens_anyway_pass(argv: tuple[str, ...]) -> None:
    assert resolve(*argv).modelname == argv[1]


def test_model_defaults_choose_the_longest_start() -> None:
    assert model_defaults("dab_detr")["epochs"] == 300
    assert model_defaults("deformable_detr")["lr"] == 2e-4
    assert model_defaults("dn_dab_detr") == {}


def test_parser_error_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        OptionParser("main.py").error("wrong")
    assert stop.value.code == 2
    assert capsys.readouterr().err == "main.py: error: wrong\n"
