"""The deformable family: every combination of options trains and evaluates, or is refused with a sentence."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

import main
from models import build_model, dn_components, list_models
from models.layers.feature_projection import ProjectedLevels
from models.ops import use_backend
from models.ops.backends import backend_for
from models.transformers.deformable_encoder import encoder_reference_points, flatten_levels, valid_ratio, valid_ratios
from models.transformers.two_stage import base_proposals, proposal_embedding
from tests.golden_recipe import load_npz

CLASSES, QUERIES = 5, 6
TINY = (
    "--device cpu --backbone resnet18 --backbone_weights none --batch_norm_type BatchNorm2d --hidden_dim 32 --nheads 4 "
    f"--enc_layers 1 --dec_layers 2 --dim_feedforward 32 --num_queries {QUERIES} --num_classes {CLASSES}"
)
DN = "dn_dab_deformable_detr"
DINO = "dn_dab_dino_deformable_detr"
ENCODER_ONLY = "dn_dab_deformable_detr_deformable_encoder_only"


def _args(options, **overrides):
    args = main.parse_args(["-m", *options.split(), *[word for word in TINY.split() if word]])
    for name, value in overrides.items():
        setattr(args, name, value)
    return args


def _model(options, **overrides):
    torch.manual_seed(0)
    return build_model(_args(options, **overrides))


def _images(*sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn((3, *size), generator=generator) for size in sizes]


def _targets(*counts, seed=0):
    generator = torch.Generator().manual_seed(seed)
    targets = []
    for n in counts:
        u = torch.rand((n, 4), generator=generator)
        boxes = torch.cat((0.3 + 0.4 * u[:, :2], 0.1 + 0.2 * u[:, 2:]), 1)
        targets.append({"labels": torch.randint(0, CLASSES, (n,), generator=generator), "boxes": boxes})
    return targets


def _total(criterion, outputs, targets):
    losses = criterion(outputs, targets)
    return sum(losses[name] * weight for name, weight in criterion.weight_dict.items() if name in losses)


def _train_and_evaluate(built, counts=(2, 0), sizes=((64, 64), (48, 64))):
    """Run one training and one evaluation pass; every trainable parameter must get a finite gradient."""
    model, criterion, postprocessors = built
    model.train()
    targets = _targets(*counts)
    total = _total(criterion, model(_images(*sizes), targets), targets)
    assert torch.isfinite(total)
    total.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, f"{name} has no gradient"
            assert torch.isfinite(parameter.grad).all(), name
    model.eval()
    with torch.no_grad():
        outputs = model(_images(*sizes))
        results = postprocessors["bbox"](outputs, torch.tensor([[10, 20]] * len(sizes)))
    assert "dn_meta" not in outputs
    assert all(torch.isfinite(r["boxes"]).all() and len(r["scores"]) for r in results)
    return outputs


COMBINATIONS = (
    # What the official code refuses or crashes on, see its behaviour in the tests' reference data.
    f"{DN}",
    f"{DN} --use_dn --contrastive",
    f"{DN} --use_dn --two_stage",
    f"{DN} --two_stage",
    f"{DN} --use_dn --num_patterns 3",
    f"{DN} --use_dn --num_patterns 2 --contrastive --dn_mask_padding",
    f"{DN} --use_dn --label_noise_scale 0 --box_noise_scale 0",
    "dab_deformable_detr --two_stage",
    f"{DINO}",
    f"{DINO} --two_stage",
    f"{DINO} --use_dn",
    f"{DINO} --use_dn --two_stage",
    f"{DINO} --use_dn --two_stage --contrastive --box_noise_scale 0",
    f"{DINO} --use_dn --num_patterns 2",
    f"{DINO} --use_dn --scalar 100",
    f"{ENCODER_ONLY}",
    f"{ENCODER_ONLY} --use_dn --contrastive",
    # What works there too.
    f"{DN} --use_dn --no_aux_loss",
    f"{DINO} --use_dn --two_stage --no_aux_loss",
    f"{ENCODER_ONLY} --use_dn --no_aux_loss",
    "deformable_detr --no_aux_loss",
    "deformable_detr --with_box_refine --two_stage --no_aux_loss",
    f"{DN} --use_dn --dilation",
    f"{DN} --use_dn --position_embedding learned",
    f"{DN} --use_dn --random_refpoints_xy",
    f"{DN} --use_dn --dn_number 8",
    f"{DINO} --use_dn --contrastive",
    f"{DINO} --use_dn --two_stage --contrastive",
    f"{ENCODER_ONLY} --use_dn --num_patterns 3",
    f"{ENCODER_ONLY} --use_dn --num_feature_levels 1 --dilation",
    "deformable_detr --num_feature_levels 1 --dilation",
    "deformable_detr --with_box_refine",
    "deformable_detr --with_box_refine --two_stage",
)


@pytest.mark.parametrize("options", COMBINATIONS)
def test_combination_trains_and_evaluates(options):
    outputs = _train_and_evaluate(_model(options))
    patterns = int(options.split("--num_patterns ")[1][0]) if "--num_patterns" in options else 1
    assert outputs["pred_logits"].shape == (2, QUERIES * patterns, CLASSES)
    assert ("enc_outputs" in outputs) == ("--two_stage" in options)


@pytest.mark.parametrize(
    "options", [f"{DN} --use_dn", f"{DINO} --use_dn --two_stage --contrastive", f"{ENCODER_ONLY} --use_dn"]
)
def test_batch_without_any_object_trains(options):
    _train_and_evaluate(_model(options), counts=(0, 0))


@pytest.mark.parametrize("use_lft", [True, False])
@pytest.mark.parametrize("use_mqs", [True, False])
@pytest.mark.parametrize("contrastive", ["--contrastive", ""])
def test_every_dino_style_combination_trains(use_lft, use_mqs, contrastive):
    _train_and_evaluate(_model(f"{DINO} --use_dn --two_stage {contrastive}", use_lft=use_lft, use_mqs=use_mqs))


@pytest.mark.parametrize("levels", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("name", ["deformable_detr", f"{DN} --use_dn", f"{ENCODER_ONLY} --use_dn"])
def test_one_to_five_feature_levels(name, levels):
    model, criterion, postprocessors = _model(f"{name} --num_feature_levels {levels}")
    assert len(model.input_proj) == levels
    assert model.backbone.strides == [8, 16, 32][-min(levels, 3) :]
    _train_and_evaluate((model, criterion, postprocessors))


@pytest.mark.parametrize(
    "backbone",
    [
        "resnet18",
        "resnet34",
        "resnet50",
        "resnet101",
        "timm:resnet10t",
        "resnet18 --dilation",
        "resnet18 --backbone_stages 3",
    ],
)
def test_any_backbone_width(backbone):
    model, _, _ = _model(f"{DN} --backbone {backbone}", num_feature_levels=4)
    model.eval()
    with torch.no_grad():
        outputs = model(_images((64, 64), (48, 64)))
    assert torch.isfinite(outputs["pred_logits"]).all()
    assert min(model.backbone.strides) == 8


@pytest.mark.parametrize(("hidden_dim", "nheads"), [(32, 1), (64, 8), (96, 6)])
@pytest.mark.parametrize("options", [f"{DN} --use_dn", f"{DINO} --use_dn --two_stage", "deformable_detr", ENCODER_ONLY])
def test_any_width_divisible_by_the_heads(options, hidden_dim, nheads):
    _train_and_evaluate(_model(options, hidden_dim=hidden_dim, nheads=nheads))


@pytest.mark.parametrize(
    "options", [f"{DINO} --use_dn --contrastive", "dab_deformable_detr", "deformable_detr --with_box_refine"]
)
def test_two_stage_with_fewer_tokens_than_queries(options):
    # One level of stride 32 has 2 x 2 tokens: all of them become queries.
    built = _model(f"{options} --two_stage --num_feature_levels 1")
    outputs = _train_and_evaluate(built, sizes=((64, 64), (64, 64)))
    assert outputs["pred_logits"].shape == (2, 4, CLASSES)
    assert outputs["enc_outputs"]["pred_logits"].shape == (2, 4, CLASSES)


@pytest.mark.parametrize(
    ("options", "overrides", "reason"),
    [
        ("deformable_detr", {"two_stage": True}, "--with_box_refine"),
        (DN, {"two_stage": True, "num_patterns": 3}, "--num_patterns"),
        (DINO, {"two_stage": True, "random_refpoints_xy": True}, "--random_refpoints_xy"),
        (DN, {"nheads": 5}, "divisible"),
        (DN, {"hidden_dim": 40}, "multiple of 32"),
        (DN, {"use_dn": True, "scalar": 0}, "--scalar"),
        (DN, {"backbone": "swin_B_224_22k"}, "backbone"),
        (DN, {"transformer_activation": "swish"}, "activation"),
        (DN, {"dataset_file": "own", "num_classes": None}, "--num_classes"),
    ],
)
def test_senseless_combination_is_refused_with_a_sentence(options, overrides, reason):
    with pytest.raises(ValueError, match=reason):
        _model(options, **overrides)


def test_masks_are_refused_before_anything_is_built(capsys):
    with pytest.raises(SystemExit):
        _args(f"{DN} --masks")
    assert "--masks needs the segmentation head" in capsys.readouterr().err


def test_names_of_the_readme_build_the_same_model():
    assert {"dn_deformable_detr", "dab_deformable_detr", "deformable_detr", DN, DINO, ENCODER_ONLY} <= set(
        list_models()
    )
    alias, _, _ = _model("dn_deformable_detr --use_dn")
    model, _, _ = _model(f"{DN} --use_dn")
    assert list(alias.state_dict()) == list(model.state_dict())


def test_activation_prelu_means_relu_and_others_are_honoured():
    layers = {}
    for name in ("prelu", "relu", "gelu", "glu"):
        model, _, _ = _model(DN, transformer_activation=name)
        layers[name] = model.transformer.encoder.layers[0]
    x = torch.linspace(-2, 2, 8)
    for name in ("prelu", "relu"):  # works in place
        torch.testing.assert_close(layers[name].activation(x.clone()), torch.nn.functional.relu(x))
    torch.testing.assert_close(layers["gelu"].activation(x), torch.nn.functional.gelu(x))
    assert layers["glu"].linear2.in_features == 16
    encoder_only, _, _ = _model(ENCODER_ONLY)  # reads the default
    assert isinstance(encoder_only.transformer.encoder.layers[0].activation, torch.nn.PReLU)


@pytest.mark.parametrize("use_lft", [True, False])
def test_look_forward_twice_lets_a_box_learn_from_the_next_layer(use_lft):
    model, _, _ = _model(DINO, use_lft=use_lft)
    model.train()
    outputs = model(_images((64, 64), (48, 64)))
    outputs["pred_boxes"].sum().backward()
    earlier = model.bbox_embed[0].layers[-1].bias.grad
    assert (earlier is not None and earlier.abs().max() > 0) == use_lft


def test_mixed_query_selection_learns_content_and_plain_selection_computes_it():
    mixed, _, _ = _model(f"{DINO} --two_stage", use_mqs=True)
    plain, _, _ = _model(f"{DINO} --two_stage", use_mqs=False)
    names = {name for name in mixed.state_dict() if name.startswith("transformer.")}
    assert "transformer.tgt_embed.weight" in names and "transformer.pos_trans.weight" not in names
    assert "transformer.pos_trans.weight" in plain.state_dict() and plain.transformer.tgt_embed is None
    anchors = torch.randn(2, QUERIES, 4)
    content, position = mixed.transformer.start_queries(anchors)
    assert torch.equal(content[0], mixed.transformer.tgt_embed.weight) and position is None
    content, position = plain.transformer.start_queries(anchors)
    assert content.shape == position.shape == (2, QUERIES, 32)
    assert not torch.allclose(content[0], content[1])


@pytest.mark.parametrize(("counts", "mask_padding"), [((2, 2), False), ((3, 1), True)])
def test_contrastive_batch_equals_its_images_one_by_one(counts, mask_padding, monkeypatch):
    # Padding slots are seen by the objects of their group unless --dn_mask_padding, so images with different numbers of
    # objects are only compared with it. Frozen norms keep the images of a batch apart.
    options = f"{DINO} --use_dn --two_stage --contrastive --scalar 2 --num_feature_levels 2"
    model, criterion, _ = _model(
        options, dn_mask_padding=mask_padding, batch_norm_type="FrozenBatchNorm2d", use_mqs=True
    )
    model.train()
    images, targets = _images((64, 64), (64, 64)), _targets(*counts)
    generator = torch.Generator().manual_seed(3)
    noise = {tuple(box.tolist()): 0.05 * torch.rand((2, 4), generator=generator) for t in targets for box in t["boxes"]}

    def add_noise(labels, boxes, num_classes, **_):
        shift = [noise[tuple(b.tolist())][int(c == num_classes)] for b, c in zip(boxes, labels, strict=True)]
        return labels, boxes + torch.stack(shift)

    monkeypatch.setattr(dn_components, "add_noise", add_noise)
    together = model(images, targets)
    total = _total(criterion, together, targets)
    expected = 0.0
    for index, (image, target) in enumerate(zip(images, targets, strict=True)):
        alone = model([image], [target])
        # Float32 sums over other shapes: 1e-5 on logits of size 5.
        torch.testing.assert_close(together["pred_logits"][index], alone["pred_logits"][0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(together["pred_boxes"][index], alone["pred_boxes"][0], atol=1e-5, rtol=1e-5)
        ours, theirs = together["dn_meta"], alone["dn_meta"]
        here = ours.meta.image_index == index
        assert ours.meta.labels[here].tolist() == theirs.meta.labels.tolist()
        torch.testing.assert_close(
            ours.logits[:, index, ours.meta.slot_index[here]],
            theirs.logits[:, 0, theirs.meta.slot_index],
            atol=1e-5,
            rtol=1e-5,
        )
        expected = expected + _total(criterion, alone, [target]) * len(target["labels"]) / sum(counts)
    torch.testing.assert_close(total, expected, atol=1e-4, rtol=1e-5)


def test_model_trained_with_denoising_evaluates_without_the_option():
    trained, _, _ = _model(f"{DN} --use_dn")
    plain, _, _ = _model(DN)
    plain.load_state_dict(trained.state_dict())
    assert not plain.label_enc.weight.requires_grad  # nothing reads it, so no process may wait for its gradient
    images = _images((64, 64), (48, 64))
    with torch.no_grad():
        expected, actual = trained.eval()(images), plain.eval()(images)
    torch.testing.assert_close(actual["pred_logits"], expected["pred_logits"], rtol=0, atol=0)


def test_training_with_denoising_asks_for_targets():
    model, _, _ = _model(f"{DN} --use_dn")
    with pytest.raises(ValueError, match=r"model\(samples, targets\)"):
        model.train()(_images((64, 64), (48, 64)))


@pytest.mark.parametrize("options", [f"{DN} --use_dn", f"{DINO} --use_dn --two_stage", ENCODER_ONLY, "deformable_detr"])
def test_bfloat16_autocast_stays_close_to_float32(options):
    model, criterion, _ = _model(options)
    model.train()
    images, targets = _images((64, 64), (48, 64)), _targets(2, 1)
    torch.manual_seed(1)
    exact = _total(criterion, model(images, targets), targets)
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(images, targets)
    rough = _total(criterion, outputs, targets)
    rough.backward()
    # bfloat16 keeps 8 bits, a relative error of 0.4 % per product; the loss must not move by more than 5 %.
    torch.testing.assert_close(rough, exact, rtol=0.05, atol=0)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("options", [f"{DN} --use_dn", f"{ENCODER_ONLY} --use_dn"])
def test_compiled_operator_equals_the_plain_one(options):
    if backend_for("cpu").name == "torch":
        pytest.skip("no compiled operator here")
    model, criterion, _ = _model(options)
    model.train()
    images, targets = _images((64, 64), (48, 64)), _targets(2, 1)
    results = []
    for backend in ("cpu", "torch"):
        twin = copy.deepcopy(model)
        torch.manual_seed(1)
        with use_backend(backend):
            total = _total(criterion, twin(images, targets), targets)
            total.backward()
        results.append((total.detach(), twin.transformer.level_embed.grad))
    # The same float32 sums in another order.
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        f"{DN} --use_dn",
        f"{DINO} --use_dn --two_stage --contrastive",
        f"{ENCODER_ONLY} --use_dn --dn_mask_padding",
        "deformable_detr",
        "deformable_detr --with_box_refine --two_stage",
    ],
)
def test_forward_never_reads_numbers_back_from_the_device(options):
    # Tensors on "meta" have shapes and no numbers: whatever would wait for a GPU raises there.
    model, _, _ = _model(options)
    model.to("meta").train()
    images = [image.to("meta") for image in _images((64, 64), (48, 64))]
    targets = [{name: value.to("meta") for name, value in t.items()} for t in _targets(2, 0)]
    outputs = model(images, targets)
    assert outputs["pred_boxes"].shape == (2, QUERIES, 4) and outputs["pred_boxes"].is_meta
    if "dn_meta" in outputs:
        assert outputs["dn_meta"].logits.shape[2] == outputs["dn_meta"].meta.pad_size > 0


def test_reference_points_equal_official():
    arrays = load_npz("functions.npz")
    shapes = [tuple(row) for row in arrays["reference_points/shapes"].tolist()]
    points = encoder_reference_points(shapes, torch.from_numpy(arrays["reference_points/valid_ratios"]))
    np.testing.assert_allclose(points, arrays["reference_points/out"], rtol=1e-6, atol=1e-7)  # one division's rounding


def test_base_proposals_equal_official():
    arrays = load_npz("functions.npz")
    shapes = [tuple(row) for row in arrays["proposals/shapes"].tolist()]
    flat = torch.from_numpy(arrays["proposals/padding_mask"]).bool()
    lengths = [height * width for height, width in shapes]
    masks = [m.unflatten(1, shape) for m, shape in zip(flat.split(lengths, 1), shapes, strict=True)]
    maps = [mask[:, None].float() for mask in masks]
    levels = flatten_levels(ProjectedLevels(sources=maps, masks=masks, positions=maps))
    assert levels.starts == [0, lengths[0]] and torch.equal(levels.padding_mask, flat)
    boxes_unsigmoid, unusable = base_proposals(levels)
    np.testing.assert_array_equal(unusable, arrays["proposals/row_is_zeroed"].astype(bool))
    np.testing.assert_allclose(boxes_unsigmoid, arrays["proposals/out_unsigmoid"], rtol=1e-5, atol=1e-6)


def test_proposal_embedding_equals_official():
    arrays = load_npz("functions.npz")
    embedding = proposal_embedding(torch.from_numpy(arrays["proposal_pos_embed/in_unsigmoid"]), 128)
    # Sines of angles up to 2 pi in float32.
    np.testing.assert_allclose(embedding, arrays["proposal_pos_embed/out"], rtol=0, atol=2e-6)


def test_valid_ratio_counts_the_first_row_and_column():
    mask = torch.ones(1, 4, 5, dtype=torch.bool)
    mask[:, :3, :2] = False
    torch.testing.assert_close(valid_ratio(mask), torch.tensor([[0.4, 0.75]]))


def test_valid_ratios_are_one_without_padding():
    masks = [torch.zeros(2, 4, 5, dtype=torch.bool), torch.zeros(2, 2, 3, dtype=torch.bool)]
    positions = [torch.zeros(2, 8, *mask.shape[1:]) for mask in masks]
    plain, checked = (valid_ratios(ProjectedLevels(positions, masks, positions, padded)) for padded in (False, True))
    assert plain.dtype == torch.float32 and torch.equal(plain, checked)
