"""Matching instability: by hand, over epochs of a run, over a resume and over several processes."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import main
from datasets import build_dataset
from engine import evaluate
from models import build_model
from tests.runs import command, finish, start, torchrun, write_pictures
from tests.stand_ins import TinyCriterion, TinyData, TinyDetector, TinyEvaluator, TinyLoader, engine_args
from tests.stand_ins import tiny_postprocess as postprocess
from tools import visualize
from util.checkpoint import atomic_save, load_checkpoint
from util.instability import MATCHES_FILE, MatchingHistory, matching_instability

RUN = ("--log_instability", "--lr_drop", 9, "--lr", "1e-3", "--save_checkpoint_interval", 1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write twelve training and six validation pictures, a third of them without objects; return their folder."""
    return write_pictures(tmp_path_factory.mktemp("pictures") / "data", num_val=6)


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train three epochs with the score logged; return the output folder."""
    folder = tmp_path_factory.mktemp("trained")
    run(data, folder, "--epochs", 3)
    return folder


def run(data: Path, folder: Path, *more: Any) -> None:
    """Train through the program."""
    assert main.run_command_line(command(data, folder, *RUN, *more)) == 0


def logged(folder: Path) -> list[dict[str, Any]]:
    """Return the log lines of a run."""
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def index_vectors(folder: Path, epoch: int, data: Path) -> torch.Tensor:
    """Match with the checkpoint of an epoch, image by image; return V (images, queries), -1 for no object."""
    args = main.parse_args(command(data, folder))
    dataset = build_dataset("val", args)
    args.num_classes = dataset.num_classes
    model, criterion, _ = build_model(args)
    model.load_state_dict(load_checkpoint(folder / f"checkpoint{epoch:04d}.pth")["model"])
    model.eval()
    vectors = torch.full((len(dataset), args.num_queries), -1)
    for vector, (image, target) in zip(vectors, dataset, strict=False):
        with torch.no_grad():
            queries, objects = criterion.matcher(model([image]), [target])[0]
        vector[queries] = objects
    return vectors


def test_instability_counts_queries_with_another_object() -> None:
    before = {7: {0: 0, 3: 1}, 8: {}, 9: {1: 0}}
    assert matching_instability(before, before) == 0
    # Image 7: queries 0 and 3 swap their objects; 8: nothing to match; 9: query 2 takes over from query 1.
    after = {7: {0: 1, 3: 0}, 8: {}, 9: {2: 0}}
    assert matching_instability(before, after) == pytest.approx(4 / 3)
    assert matching_instability({}, {}) == 0
    with pytest.raises(ValueError, match="same images"):
        matching_instability(before, {7: {}})


class FixedMatcher:
    """Gives prepared matches; one entry per batch."""

    def __init__(self, *batches: list[tuple[list[int], list[int]]]) -> None:
        self.batches = list(batches)

    def __call__(self, outputs: Any, targets: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [(torch.tensor(queries), torch.tensor(objects)) for queries, objects in self.batches.pop(0)]


OUTPUTS = {"pred_logits": torch.zeros(1), "pred_boxes": torch.zeros(1), "aux_outputs": []}


def targets(*image_ids: int) -> list[dict[str, torch.Tensor]]:
    """Return targets that have an image id only."""
    return [{"image_id": torch.tensor([image_id])} for image_id in image_ids]


def test_history_compares_with_the_epoch_before_only(tmp_path: Path) -> None:
    one, other = [([2, 5], [0, 1])], [([2, 6], [0, 1])]
    history = MatchingHistory(FixedMatcher(one, other, other, one), tmp_path)
    history.add(OUTPUTS, targets(4))
    assert history.finish_epoch(0) == {}
    history.add(OUTPUTS, targets(4))
    assert history.finish_epoch(1) == {"instability": 2}  # queries 5 and 6
    # Started anew as by --resume: the file takes the place of the memory.
    history = MatchingHistory(FixedMatcher(one, other), tmp_path)
    history.add(OUTPUTS, targets(4))
    assert history.finish_epoch(2) == {"instability": 2}
    # An epoch is missing between the two, or the images are others.
    history.add(OUTPUTS, targets(4))
    assert history.finish_epoch(4) == {}
    history = MatchingHistory(FixedMatcher(one), tmp_path)
    history.add(OUTPUTS, targets(5))
    assert history.finish_epoch(5) == {}


def test_history_gathers_the_images_of_all_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    history = MatchingHistory(FixedMatcher([([0], [0])], [([1], [0])]), tmp_path)
    of_others: list[Any] = [{2: {3: 0}, 3: {}}, {2: {3: 0}, 3: {}}]
    monkeypatch.setattr("util.instability.all_gather_object", lambda own: [own, of_others.pop(0)])
    for epoch, expected in enumerate(({}, {"instability": 2 / 3})):
        history.add(OUTPUTS, targets(1))
        assert history.finish_epoch(epoch) == expected


def test_history_goes_on_without_a_damaged_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / MATCHES_FILE).write_bytes(b"nothing")
    assert MatchingHistory(FixedMatcher(), tmp_path).finish_epoch(3) == {}
    assert "no instability" in caplog.text
    assert load_checkpoint(tmp_path / MATCHES_FILE) == {"epoch": 3, "matches": {}}
    atomic_save({"epoch": 3}, tmp_path / MATCHES_FILE)
    assert MatchingHistory(FixedMatcher(), tmp_path).finish_epoch(4) == {}


def test_evaluation_hands_on_every_batch_once() -> None:
    seen: list[int] = []

    def after_batch(outputs: Any, targets: Any) -> None:
        assert len(outputs["pred_boxes"]) == len(targets)
        seen.extend(int(target["image_id"]) for target in targets)

    place = (TinyDetector(), TinyCriterion(), {"bbox": postprocess}, TinyLoader(TinyData(6)), TinyEvaluator())
    evaluate(*place, torch.device("cpu"), args=engine_args(), after_batch=after_batch)
    assert seen == [100, 101, 102, 103, 104, 105]


def test_run_logs_what_its_checkpoints_say(data: Path, trained: Path) -> None:
    records = logged(trained)
    assert "test_instability" not in records[0]
    vectors = [index_vectors(trained, epoch, data) for epoch in range(3)]
    assert (vectors[0] >= 0).sum() == 4  # four of six pictures have an object
    wanted = [(a != b).sum(1).float().mean().item() for a, b in pairwise(vectors)]
    assert max(wanted) > 0
    # The logged matches come from batches of one as well: the same float32 numbers.
    assert [record["test_instability"] for record in records[1:]] == pytest.approx(wanted)
    assert "instability" in (trained / "info.txt").read_text()
    assert (trained / "instability.png").exists()


def test_score_survives_a_resume(data: Path, trained: Path, tmp_path: Path) -> None:
    run(data, tmp_path, "--epochs", 2)
    run(data, tmp_path, "--epochs", 3, "--resume", "auto")
    resumed, whole = logged(tmp_path), logged(trained)
    assert [record["epoch"] for record in resumed] == [0, 1, 2]
    assert [r.get("test_instability") for r in resumed] == [r.get("test_instability") for r in whole]


@pytest.mark.slow
def test_two_processes_count_each_image_once(data: Path, tmp_path: Path) -> None:
    arguments = [*torchrun(2), *command(data, tmp_path, *RUN, "--epochs", 2)]
    log = tmp_path / "out.txt"
    process = start(arguments, log)
    text = finish(process, log)
    assert process.returncode == 0, text
    before, after = (index_vectors(tmp_path, epoch, data) for epoch in range(2))
    assert logged(tmp_path)[1]["test_instability"] == pytest.approx((before != after).sum(1).float().mean().item())
    assert len(load_checkpoint(tmp_path / MATCHES_FILE)["matches"]) == 6


def test_evaluation_alone_refuses_the_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main.parse_args(["-m", "dn_dab_detr", "--eval", "--log_instability"])
    assert "compares epochs" in capsys.readouterr().err


def test_curve_is_drawn_where_the_score_was_logged(trained: Path, tmp_path: Path) -> None:
    assert visualize.main(["instability", str(trained), "--output", str(tmp_path / "curve.svg")]) == 0
    assert "<svg" in (tmp_path / "curve.svg").read_text()
    (tmp_path / "log.txt").write_text('{"epoch": 0}\n')
    with pytest.raises(SystemExit):
        visualize.main(["instability", str(tmp_path), "--output", str(tmp_path / "none.png")])
    assert not (tmp_path / "none.png").exists()
