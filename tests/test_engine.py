"""Training and evaluation loops on a stand-in detector, and the effective batch on the real one."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

import main
from engine import DEBUG_BATCHES, as_sums, evaluate, train_one_epoch
from models import build_model
from tests.stand_ins import (
    TinyCriterion,
    TinyData,
    TinyDetector,
    TinyEvaluator,
    TinyLoader,
    engine_args,
    tiny_postprocess,
)
from util.checkpoint import load_checkpoint
from util.ema import ModelEma
from util.errors import NonFiniteLossError
from util.nested_tensor import nested_tensor_from_tensor_list
from util.rng import set_rng_state
from util.step import amp_dtype, backward, in_groups

CPU = torch.device("cpu")


def train(model: torch.nn.Module, loader: TinyLoader, **changes: object) -> dict[str, float]:
    """Train a model for one epoch with SGD and return the statistics."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return train_one_epoch(model, TinyCriterion(), loader, optimizer, CPU, 0, args=engine_args(**changes))


def test_training_lowers_the_loss_and_names_it_as_official() -> None:
    torch.manual_seed(0)
    model, loader = TinyDetector(dropout=0.0), TinyLoader(TinyData())
    first = train(model, loader)
    for _ in range(10):
        last = train(model, loader)
    assert last["loss"] < first["loss"]
    assert set(first) == {
        *("loss", "grad_norm", "lr", "class_error", "loss_ce", "loss_bbox", "loss_ce_unscaled", "loss_bbox_unscaled"),
        *("class_error_unscaled", "cardinality_error_unscaled"),
    }
    # Sums of float32 losses in another order.
    assert first["loss"] == pytest.approx(first["loss_ce"] + first["loss_bbox"], rel=1e-5)
    assert first["loss_ce"] == pytest.approx(2 * first["loss_ce_unscaled"])


def test_gradients_are_clipped() -> None:
    torch.manual_seed(0)
    model = TinyDetector(dropout=0.0)
    before = copy.deepcopy(model.state_dict())
    train(model, TinyLoader(TinyData(2)), clip_max_norm=1e-3)
    moved = torch.cat([(after - before[name]).flatten() for name, after in model.state_dict().items()])
    # One step of rate 0.1 along a gradient of norm 0.001.
    assert moved.norm().item() == pytest.approx(1e-4, rel=1e-2)


def test_no_clipping_leaves_the_gradient_as_it_is() -> None:
    torch.manual_seed(0)
    model = TinyDetector(dropout=0.0)
    reference = copy.deepcopy(model)
    loader = TinyLoader(TinyData(2))
    train(model, loader, clip_max_norm=0.0)
    samples, targets = next(iter(loader))
    losses = TinyCriterion()(reference(samples), targets)
    (2 * losses["loss_ce"] + 5 * losses["loss_bbox"]).backward()
    for own, wanted in zip(model.parameters(), reference.parameters(), strict=True):
        assert wanted.grad is not None and torch.allclose(
            own, wanted - 0.1 * wanted.grad, atol=1e-7
        )  # the same float32 sums


def test_accumulated_batches_equal_one_large_batch() -> None:
    torch.manual_seed(0)
    large = TinyDetector(dropout=0.0)
    small = copy.deepcopy(large)
    # Batches of one image with 1 and 2 objects: a mean of means would differ.
    stats_large = train(large, TinyLoader(TinyData(4), batch_size=4))
    stats_small = train(small, TinyLoader(TinyData(4), batch_size=1), accumulate_steps=4)
    for one, other in zip(large.parameters(), small.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-7)  # the same sums in another order
    assert stats_small["loss"] == pytest.approx(stats_large["loss"], rel=1e-5)


def test_a_last_incomplete_group_is_trained_on() -> None:
    assert list(in_groups(iter(range(5)), 2)) == [[0, 1], [2, 3], [4]]
    done: list[int] = []
    optimizer = torch.optim.SGD((model := TinyDetector()).parameters(), lr=0.1)
    loader = TinyLoader(TinyData(6))
    args = engine_args(accumulate_steps=2)
    train_one_epoch(model, TinyCriterion(), loader, optimizer, CPU, 0, args=args, after_step=done.append)
    assert done == [2, 3]


def test_debug_stops_after_fifteen_batches_even_when_resumed() -> None:
    done: list[int] = []
    optimizer = torch.optim.SGD((model := TinyDetector()).parameters(), lr=0.1)
    loader = TinyLoader(TinyData(40), batch_size=1, first_batch=10)
    args = engine_args(debug=True)
    train_one_epoch(
        model, TinyCriterion(), loader, optimizer, CPU, 0, args=args, first_batch=10, after_step=done.append
    )
    assert done == list(range(11, DEBUG_BATCHES + 1))


def test_average_of_weights_follows_the_model() -> None:
    torch.manual_seed(0)
    model = TinyDetector()
    ema = ModelEma(model, decay=0.9)
    start = copy.deepcopy(list(model.parameters()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = TinyLoader(TinyData(2))
    train_one_epoch(model, TinyCriterion(), loader, optimizer, CPU, 0, args=engine_args(), ema=ema)
    decay = 2 / 11  # (1 + n) / (10 + n) after the first update
    for average, old, new in zip(ema.module.parameters(), start, model.parameters(), strict=True):
        assert torch.allclose(average, decay * old + (1 - decay) * new, atol=1e-7)


def poisoned(loader: TinyLoader) -> TinyLoader:
    """Make the third image of the data not finite."""
    loader.data.colors[2] = float("nan")
    return loader


def test_non_finite_loss_stops_before_the_step_and_can_be_reproduced(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = TinyDetector()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader, args = poisoned(TinyLoader(TinyData())), engine_args(output_dir=str(tmp_path))
    with pytest.raises(NonFiniteLossError, match=r"loss_ce, loss_bbox.*images \[102, 103\]"):
        train_one_epoch(model, TinyCriterion(), loader, optimizer, CPU, 4, args=args)
    content = load_checkpoint(tmp_path / "nonfinite_epoch4_batch1_rank0.pth")
    # The model is as it was before the step, and all that made the loss is in the file.
    for name, value in model.state_dict().items():
        assert value.isfinite().all() and torch.equal(value, content["model"][name])
    again = TinyDetector()
    again.load_state_dict(content["model"])
    set_rng_state(content["rng"])
    batch = content["batches"][0]
    outputs = again(nested_tensor_from_tensor_list(list(batch["tensors"])))
    assert TinyCriterion()(outputs, batch["targets"])["loss_ce"].isnan()


def test_non_finite_gradient_of_a_finite_loss_stops_too() -> None:
    class RootCriterion(TinyCriterion):
        def forward(self, outputs, targets, **extra):  # type: ignore[no-untyped-def]
            # The square root has an infinite slope at zero.
            zero = (outputs["pred_boxes"].sum() * 0).sqrt()
            return {"loss_ce": zero}

    optimizer = torch.optim.SGD((model := TinyDetector()).parameters(), lr=0.1)
    with pytest.raises(NonFiniteLossError, match="grad_norm not finite"):
        train_one_epoch(model, RootCriterion(), TinyLoader(TinyData()), optimizer, CPU, 0, args=engine_args())


def test_evaluation_counts_every_image_once_whatever_the_batch_size(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, stats, evaluators = TinyDetector(), [], []
    for batch_size in (1, 4):
        evaluator = TinyEvaluator()
        loader = TinyLoader(TinyData(), batch_size=batch_size)
        post = {"bbox": tiny_postprocess}
        args = engine_args()
        stats.append(evaluate(model, TinyCriterion(), post, loader, evaluator, CPU, args=args))
        evaluators.append(evaluator)
    assert sorted(evaluators[0].predictions) == list(range(100, 108))
    assert evaluators[0].calls == ["synchronize", "accumulate", "summarize"]
    assert stats[0]["coco_eval_bbox"] == [i / 10 for i in range(12)]
    assert stats[0]["loss"] == pytest.approx(stats[1]["loss"], rel=1e-5)  # float32 sums in another order
    assert stats[0]["loss"] == pytest.approx(stats[0]["loss_ce"] + stats[0]["loss_bbox"], rel=1e-5)


def test_evaluation_loss_is_the_mean_over_all_objects() -> None:
    torch.manual_seed(0)
    model, data = TinyDetector().eval(), TinyData()
    everything, targets = next(iter(TinyLoader(data, batch_size=8)))
    wanted = TinyCriterion()(model(everything), targets)
    stats = evaluate(
        model, TinyCriterion(), {"bbox": tiny_postprocess}, TinyLoader(data), TinyEvaluator(), CPU, args=engine_args()
    )
    assert stats["loss_bbox_unscaled"] == pytest.approx(wanted["loss_bbox"].item(), rel=1e-5)
    assert stats["class_error"] == pytest.approx(50.0)
    assert stats["cardinality_error_unscaled"] == pytest.approx(2.0)  # the stand-in's batch size


def test_results_are_saved_with_boxes_relative_to_the_image(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, args = TinyDetector(), engine_args(save_results=True, output_dir=str(tmp_path), debug=True)
    post = {"bbox": tiny_postprocess}
    evaluate(model, TinyCriterion(), post, TinyLoader(TinyData()), TinyEvaluator(), CPU, args=args)
    saved = torch.load(tmp_path / "results-0.pkl", weights_only=True)
    assert saved["image_id"] == list(range(100, 108))
    target = TinyData()[1][1]
    assert torch.equal(saved["gt_info"][1], torch.cat((target["boxes"], target["labels"][:, None].float()), dim=1))
    with torch.no_grad():
        outputs = model.eval()(nested_tensor_from_tensor_list([TinyData()[1][0]]))
    # Once to pixels and back.
    assert torch.allclose(saved["res_info"][1][:, :4], outputs["pred_boxes"][0], atol=1e-6)


def test_labels_are_mapped_to_categories_for_the_evaluator() -> None:
    evaluator = TinyEvaluator()
    evaluate(
        TinyDetector(),
        TinyCriterion(),
        {"bbox": tiny_postprocess},
        TinyLoader(TinyData()),
        evaluator,
        CPU,
        args=engine_args(),
        to_categories=lambda labels: labels + 1000,
    )
    assert all((result["labels"] >= 1000).all() for result in evaluator.predictions.values())


def test_as_sums_weighs_class_errors_by_objects_and_the_rest_by_images() -> None:
    losses = {name: torch.tensor(2.0) for name in ("loss", "tgt_loss_ce_0", "class_error", "cardinality_error")}
    sums, counts = as_sums(losses, num_images=3, num_boxes=5)
    assert counts == {"loss": 5.0, "tgt_loss_ce_0": 5.0, "class_error": 5.0, "cardinality_error": 3.0}
    assert [value.item() for value in sums.values()] == [2.0, 2.0, 10.0, 6.0]


def test_mixed_precision_on_a_cpu_is_bfloat16_and_trains() -> None:
    assert amp_dtype(None, CPU) is torch.bfloat16 and amp_dtype("float16", CPU) is torch.float16
    assert amp_dtype(None, torch.device("cuda")) is torch.float16
    torch.manual_seed(0)
    model = TinyDetector(dropout=0.0)
    first = train(model, TinyLoader(TinyData()), amp=True)
    assert train(model, TinyLoader(TinyData()), amp=True)["loss"] < first["loss"]


def test_float16_steps_are_scaled_and_unscaled_before_clipping() -> None:
    torch.manual_seed(0)
    model = TinyDetector(dropout=0.0)
    plain = copy.deepcopy(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    loader, optimizer = TinyLoader(TinyData(2)), torch.optim.SGD(model.parameters(), lr=0.1)
    args = engine_args(amp=True, amp_dtype="float16")
    stats = train_one_epoch(model, TinyCriterion(), loader, optimizer, CPU, 0, args=args, scaler=scaler)
    reference = train(plain, TinyLoader(TinyData(2)))
    # float16 products carry 11 bits: 1e-3 of the norm.
    assert stats["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-2)


def tiny_dn_options(*more: str) -> list[str]:
    """Return a command line of a small DN-DAB-DETR whose denoising draws nothing."""
    sizes = "--enc_layers 1 --dec_layers 2 --dim_feedforward 32 --num_queries 6 --num_classes 4 --backbone resnet18"
    data = "--backbone_weights none --backbone_stages 2 --device cpu"
    # Unmasked empty slots would let the largest image of a batch change the others.
    noise = "--use_dn --label_noise_scale 0 --box_noise_scale 0 --dn_mask_padding"
    return ["-m", "dn_dab_detr", *sizes.split(), *data.split(), *noise.split(), *more]


@pytest.mark.parametrize("normalizer", ["local", "global"])
def test_effective_batch_of_the_real_model_with_denoising(normalizer: str) -> None:
    args = main.parse_args(tiny_dn_options("--dn_normalizer", normalizer))
    torch.manual_seed(0)
    model, criterion, _ = build_model(args)
    model.train()
    data = TinyData(4)
    images = torch.randn((4, 3, 32, 32))
    targets = [data[i][1] for i in range(4)]
    parts = [(nested_tensor_from_tensor_list(list(images[i : i + 1])), targets[i : i + 1]) for i in range(4)]
    whole = [(nested_tensor_from_tensor_list(list(images)), targets)]
    gradients, totals = [], []
    for batches in (whole, parts):
        model.zero_grad()
        totals.append(backward(model, criterion, batches, amp=False)["loss"].item())
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert totals[1] == pytest.approx(totals[0], rel=1e-5)
    for name, wanted in gradients[0].items():
        # float32 sums in another order, relative to the largest gradient of the tensor.
        assert torch.allclose(gradients[1][name], wanted, atol=1e-4 * max(wanted.abs().max().item(), 1e-2)), name
