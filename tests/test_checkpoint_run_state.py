"""Going on where a run stopped: bit for bit, by the official rules, with clear errors."""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import StepLR

from engine import train_one_epoch
from tests.stand_ins import TinyCriterion, TinyData, TinyDetector, TinyLoader, engine_args
from util.checkpoint import load_checkpoint
from util.ema import ModelEma
from util.errors import CheckpointError
from util.resume import read_resume, restore_average, restore_model, restore_run
from util.rng import get_rng_state, seed_everything, set_rng_state
from util.run_state import RunState, numbered_names

CPU = torch.device("cpu")


def new_state(*, lr: float = 0.1, lr_drop: int = 2, ema: bool = True, sgd: bool = False) -> RunState:
    """Return a fresh run of the stand-in detector."""
    model = TinyDetector()
    kind: Any = torch.optim.SGD if sgd else torch.optim.AdamW
    optimizer = kind(model.parameters(), lr=lr)
    average = ModelEma(model, 0.9) if ema else None
    return RunState(model, optimizer, StepLR(optimizer, lr_drop), ema=average, class_names=["a"], options={"lr": lr})


class Killed(Exception):
    """Stands for a kill in the middle of training."""


def train(state: RunState, epochs: int, folder: Path | None = None, *, kill_at: int | None = None) -> None:
    """Train from the state's position on; save after every step; die after step `kill_at`, before saving it."""
    data = TinyData(8)

    def after_step(batches_done: int) -> None:
        state.step += 1
        state.batches_done = batches_done
        if state.step == kill_at:
            raise Killed
        state.save(folder)

    while state.epoch < epochs:
        train_one_epoch(
            state.model,
            TinyCriterion(),
            TinyLoader(data, first_batch=state.batches_done),
            state.optimizer,
            CPU,
            state.epoch,
            args=engine_args(),
            ema=state.ema,
            first_batch=state.batches_done,
            after_step=after_step,
        )
        state.finish_epoch(folder, lr_drop=2, interval=10, keep=2)


def restored(path: Path, **options: Any) -> RunState:
    """Return a new run that continues a file."""
    state = new_state()
    content = load_checkpoint(path)
    restore_model(state.model, content, str(path))
    restore_run(state, content, str(path), **options)
    return state


# Steps 2 and 7 are in the middle of an epoch of 4 steps, 5 is the first of one, 9 the first after a drop of the rate.
@pytest.mark.parametrize("kill_at", [2, 5, 7, 9])
def test_a_killed_and_resumed_run_equals_the_undisturbed_one_bit_for_bit(tmp_path: Path, kill_at: int) -> None:
    seed_everything(1)
    whole = new_state()
    train(whole, 5)
    whole_rng = torch.get_rng_state()
    seed_everything(1)
    with pytest.raises(Killed):
        train(new_state(), 5, tmp_path, kill_at=kill_at)
    seed_everything(99)
    resumed = restored(tmp_path / "checkpoint.pth")
    assert resumed.step == kill_at - 1
    train(resumed, 5)
    assert resumed.step == whole.step == 20
    assert resumed.optimizer.param_groups[0]["lr"] == whole.optimizer.param_groups[0]["lr"]
    assert whole.ema is not None and resumed.ema is not None
    pairs = [(whole.model, resumed.model), (whole.ema.module, resumed.ema.module)]
    for one, other in pairs:
        for name, value in one.state_dict().items():
            assert torch.equal(value, other.state_dict()[name]), name
    assert torch.equal(torch.get_rng_state(), whole_rng)


def test_random_states_of_all_generators_are_restored() -> None:
    seed_everything(3)
    random.gauss(0, 1)
    np.random.standard_normal()
    state = get_rng_state()
    first = (random.gauss(0, 1), random.random(), np.random.standard_normal(), np.random.rand(), torch.rand(2).tolist())
    set_rng_state(state)
    again = (random.gauss(0, 1), random.random(), np.random.standard_normal(), np.random.rand(), torch.rand(2).tolist())
    assert first == again


def test_files_are_those_of_the_official_code(tmp_path: Path) -> None:
    train(new_state(), 4, tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [
        "checkpoint.pth",
        "checkpoint0001.pth",
        "checkpoint0001_beforedrop.pth",
        "checkpoint0003.pth",
        "checkpoint0003_beforedrop.pth",
        "checkpoint_prev1.pth",
    ]
    before, after = (load_checkpoint(tmp_path / f"checkpoint0001{end}.pth") for end in ("_beforedrop", ""))
    rates = [content["optimizer"]["param_groups"][0]["lr"] for content in (before, after)]
    assert rates == [0.1, pytest.approx(0.01)]
    assert before["epoch"] == after["epoch"] == 1
    assert after["versions"]["torch"] == str(torch.__version__) and after["class_names"] == ["a"]


def test_numbered_names_follow_drop_and_interval() -> None:
    def names(epoch: int, before_drop: bool) -> list[str]:
        return numbered_names(epoch, lr_drop=40, interval=10, before_drop=before_drop)

    assert names(39, True) == ["checkpoint0039_beforedrop.pth"] and names(39, False) == ["checkpoint0039.pth"]
    assert names(9, True) == [] and names(9, False) == ["checkpoint0009.pth"]
    assert names(10, True) == names(10, False) == []


def official_file(path: Path, epoch: int = 2) -> Path:
    """Write a checkpoint as the official code would: no step, no random states, a namespace of options."""
    state = new_state(ema=False)
    train(state, epoch + 1)
    content = {key: state.state_dict()[key] for key in ("model", "optimizer", "lr_scheduler", "epoch")}
    torch.save({**content, "args": argparse.Namespace(modelname="dn_dab_detr")}, path)
    return path


def test_an_official_file_resumes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = restored(official_file(tmp_path / "official.pth"))
    assert (state.epoch, state.batches_done, state.step) == (3, 0, 0)
    assert state.optimizer.param_groups[0]["lr"] == pytest.approx(0.01)
    assert "holds no average" in caplog.text
    assert state.ema is not None
    assert torch.equal(state.ema.module.backbone.weight, state.model.backbone.weight)


def test_override_replaces_the_restored_step_size_and_rates_follow(tmp_path: Path) -> None:
    path = official_file(tmp_path / "official.pth", epoch=3)
    assert restored(path).optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)
    state = restored(path, override_lr_drop=3)
    assert state.scheduler.step_size == 3
    # Four epochs with a drop every three: one drop, as if it had always been so.
    assert state.optimizer.param_groups[0]["lr"] == pytest.approx(0.01)


def test_drop_lr_now_divides_by_ten(tmp_path: Path) -> None:
    path = official_file(tmp_path / "official.pth", epoch=0)
    assert restored(path, drop_lr_now=True).optimizer.param_groups[0]["lr"] == pytest.approx(0.01)


def test_deformable_rule_keeps_the_rate_of_the_command_line(tmp_path: Path) -> None:
    path = official_file(tmp_path / "official.pth", epoch=0)
    state, content = new_state(lr=0.5), load_checkpoint(path)
    restore_run(state, content, str(path), keep_given_rates=True, override_lr_drop=7)
    assert state.optimizer.param_groups[0]["lr"] == 0.5 and state.scheduler.step_size == 7
    # Its state, apart from the rate, is the restored one.
    assert state.optimizer.state_dict()["state"][0]["step"] == content["optimizer"]["state"][0]["step"]


def test_a_file_with_weights_only_starts_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = new_state()
    restore_run(state, {"model": state.model.state_dict()}, "weights.pth")
    assert state.epoch == 0 and "only its weights" in caplog.text


def test_another_number_of_processes_goes_on_in_the_order_where_it_can(caplog: pytest.LogCaptureFixture) -> None:
    # Two processes of 2 images each stopped after 3 batches: 12 images.
    saved = new_state().state_dict() | {"epoch": 3, "batches_done": 3, "images_per_batch": 4}
    saved["rng"] = saved["rng"] * 2
    for images_per_batch, batches_done in ((2, 6), (12, 1), (8, 0)):
        caplog.clear()
        state = new_state()
        state.images_per_batch = images_per_batch
        restore_run(state, saved, "two.pth")
        assert (state.epoch, state.batches_done) == (4, batches_done)
        assert "saved by 2 processes, there are 1 now: random numbers start anew" in caplog.text
        assert ("after 12 images of epoch 4" in caplog.text) == (batches_done == 0)


def test_another_batch_size_keeps_the_place_in_the_order() -> None:
    state, saved = new_state(), new_state()
    saved.batches_done, saved.images_per_batch, state.images_per_batch = 3, 4, 6
    restore_run(state, saved.state_dict(), "a.pth")
    assert state.batches_done == 2


def test_another_optimizer_is_refused() -> None:
    with pytest.raises(CheckpointError, match="--sgd to both"):
        restore_run(new_state(), new_state(sgd=True).state_dict(), "sgd.pth")


def test_an_optimizer_of_other_parameters_is_refused() -> None:
    content = new_state().state_dict()
    content["optimizer"]["param_groups"][0]["params"].pop()
    with pytest.raises(CheckpointError, match="does not fit the model's trainable parameters"):
        restore_run(new_state(), content, "other.pth")


def test_scaler_state_is_restored() -> None:
    state, other = new_state(), new_state()
    state.scaler, other.scaler = (torch.amp.GradScaler("cpu", init_scale=scale) for scale in (8.0, 2.0))
    restore_run(other, state.state_dict(), "x.pth")
    assert other.scaler.get_scale() == 8.0


def test_another_class_count_says_how_to_fine_tune() -> None:
    weights = new_state().model.state_dict()
    weights["class_embed.weight"], weights["class_embed.bias"] = torch.zeros(91, 8), torch.zeros(91)
    with pytest.raises(CheckpointError, match=r"91 classes, the model 9.*--finetune_ignore class_embed label_enc"):
        restore_model(new_state().model, {"model": weights}, "coco.pth")


def test_another_model_is_named() -> None:
    content = {"model": {"other.weight": torch.ones(1)}, "options": {"modelname": "dab_detr"}}
    with pytest.raises(
        CheckpointError, match=r"trained with -m dab_detr.*6 missing such as backbone.weight, 1 unknown"
    ):
        restore_model(new_state().model, content, "other.pth")
    with pytest.raises(CheckpointError, match="another model"):
        restore_model(new_state().model, content, "other.pth", strict=False)


def test_another_shape_is_named() -> None:
    weights = new_state().model.state_dict() | {"backbone.weight": torch.ones(2, 3)}
    content = {"model": weights, "args": argparse.Namespace(modelname="x")}
    with pytest.raises(CheckpointError, match=r"backbone.weight \(2, 3\) instead of \(8, 3\)"):
        restore_model(new_state().model, content, "other.pth")


def test_non_strict_loading_warns_about_what_is_missing(caplog: pytest.LogCaptureFixture) -> None:
    weights = new_state().model.state_dict()
    del weights["bbox_embed.bias"]
    restore_model(new_state().model, {"model": weights}, "a.pth", strict=False)
    assert "bbox_embed.bias" in caplog.text


def test_auto_starts_anew_in_an_empty_folder_and_finds_the_newest(tmp_path: Path) -> None:
    assert read_resume("auto", tmp_path) is None
    train(new_state(), 1, tmp_path)
    found = read_resume("auto", tmp_path)
    assert found is not None and found[1] == str(tmp_path / "checkpoint.pth")
    assert read_resume(found[1], None) is not None


def test_average_is_restored_for_evaluation() -> None:
    state, other = new_state(), new_state()
    restore_average(other, state.state_dict(), "a.pth")
    assert state.ema is not None and other.ema is not None
    assert torch.equal(state.ema.module.backbone.weight, other.ema.module.backbone.weight)


def test_saving_without_a_folder_does_nothing() -> None:
    new_state().save(None, ["a.pth"])
