"""Denoising queries and losses: against official numbers, by their laws, and where the official code is wrong."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from models import dn_components
from models.dn_components import (
    DenoisingOptions,
    add_noise,
    compute_dn_loss,
    denoising_attn_mask,
    dn_post_process,
    prepare_for_dn,
)
from tests.golden_models import recorded_noise
from tests.golden_recipe import load_meta, load_npz, rs_for, weight

GOLDEN = "dn/prepare_for_dn.npz"
QUERIES, CLASSES, WIDTH = 6, 91, 16


@pytest.fixture(scope="module")
def golden():
    arrays = load_npz(GOLDEN)
    return arrays, load_meta(arrays)


def _targets(arrays, key, counts):
    return [
        {
            "labels": torch.from_numpy(arrays[f"{key}/target_labels{i}"]).reshape(-1),
            "boxes": torch.from_numpy(arrays[f"{key}/target_boxes{i}"]).reshape(-1, 4),
        }
        for i in range(len(counts))
    ]


def _label_enc(salt="dn:"):
    label_enc = nn.Embedding(CLASSES + 1, WIDTH - 1)
    with torch.no_grad():
        label_enc.weight.copy_(torch.from_numpy(weight("label_enc.weight", (CLASSES + 1, WIDTH - 1), salt)))
    return label_enc


def _options(case):
    budget = case["scalar"] if case["scalar"] >= 100 else 0
    if case["scalar"] == 0:
        budget = 1  # the DINO-style official code turns 0 groups into one
    return DenoisingOptions(
        num_groups=max(case["scalar"], 1),
        query_budget=budget,
        label_noise_scale=case["label_noise_scale"],
        box_noise_scale=case["box_noise_scale"],
        box_noise="corner" if case["variant"].startswith("dino") else "center",
        contrastive=bool(case["contrastive"]),
    )


def _random_outputs(key, batch, queries):
    rs = rs_for("dnloss:" + key)
    logits = rs.standard_normal((2, batch, queries, CLASSES)).astype(np.float32) - np.float32(2)
    boxes = (0.2 + 0.6 * rs.uniform(size=(2, batch, queries, 4))).astype(np.float32)
    return torch.from_numpy(logits), torch.from_numpy(boxes)


def test_prepare_for_dn_equals_official_in_every_recorded_case(golden, monkeypatch):
    arrays, meta = golden
    compared = 0
    for key, case in meta["cases"].items():
        if case["contrastive"] and len(case["counts"]) > 1:
            continue  # pairs of different images are mixed there: see the tests of contrastive pairs below
        options = _options(case)
        replay = {name: case[name] for name in ("label_noise_scale", "box_noise_scale", "contrastive")}
        replay["corner"] = options.box_noise == "corner"
        monkeypatch.setattr(dn_components, "add_noise", recorded_noise(arrays, f"{key}/", replay))
        targets, patterns = _targets(arrays, key, case["counts"]), max(case["num_patterns"], 1)
        dn = prepare_for_dn(targets, _label_enc(), num_matching=QUERIES * patterns, options=options)

        assert dn.meta.pad_size == case["pad_size"], key
        if "attn_mask" in {name.removeprefix(f"{key}/") for name in arrays if name.startswith(key)}:
            np.testing.assert_array_equal(dn.attn_mask, arrays[f"{key}/attn_mask"], err_msg=key)
        np.testing.assert_array_equal(dn.meta.slot_index, arrays[f"{key}/map_known_indice"], err_msg=key)
        np.testing.assert_array_equal(dn.meta.labels, arrays[f"{key}/known_labels"], err_msg=key)
        part = slice(0, dn.meta.pad_size)
        # An embedding lookup is exact; the inverse sigmoid of float32 boxes agrees to a few units in the last place.
        np.testing.assert_array_equal(dn.content.detach(), arrays[f"{key}/input_query_label"][:, part], err_msg=key)
        np.testing.assert_allclose(
            dn.boxes_unsigmoid, arrays[f"{key}/input_query_bbox"][:, part], atol=2e-6, rtol=2e-6, err_msg=key
        )
        queries = dn.meta.pad_size + case["post_process_query_count"]
        logits, boxes = _random_outputs(key, len(targets), queries)
        _, _, denoised = dn_post_process(logits, boxes, dn.meta)
        losses = compute_dn_loss(denoised, focal_alpha=0.25)
        for name, value in zip(case["loss_names"], arrays[f"{key}/loss_values"], strict=True):
            np.testing.assert_allclose(losses[name].item(), value, rtol=1e-5, atol=1e-6, err_msg=f"{key} {name}")
        compared += 1
    assert compared > 100


def _objects(*counts, seed=0):
    generator = torch.Generator().manual_seed(seed)
    targets = []
    for n in counts:
        u = torch.rand((n, 4), generator=generator)
        boxes = torch.cat((0.4 + 0.2 * u[:, :2], 0.1 + 0.2 * u[:, 2:]), 1)
        targets.append({"labels": torch.randint(0, 5, (n,), generator=generator), "boxes": boxes})
    return targets


def _small_label_enc():
    torch.manual_seed(0)
    return nn.Embedding(6, 7)


def test_contrastive_pairs_stay_within_their_image():
    # The official code makes the first half of the concatenated batch positive: with 3 and 1 objects image 0 then
    # holds five negatives out of six. Here every image has its own positives first, then its own negatives.
    targets = _objects(3, 1)
    options = DenoisingOptions(num_groups=2, contrastive=True, box_noise="corner", box_noise_scale=0.0)
    meta = prepare_for_dn(targets, _small_label_enc(), num_matching=4, options=options).meta
    first_group = slice(0, 8)
    assert meta.image_index[first_group].tolist() == [0, 0, 0, 0, 0, 0, 1, 1]
    assert meta.slot_index[first_group].tolist() == [0, 1, 2, 3, 4, 5, 0, 1]
    negative = (meta.labels[first_group] == 5).tolist()
    assert negative == [False, False, False, True, True, True, False, True]
    own = torch.cat([targets[0]["boxes"], targets[0]["boxes"], targets[1]["boxes"], targets[1]["boxes"]])
    torch.testing.assert_close(meta.boxes_cxcywh[first_group], own)


def test_contrastive_batch_equals_its_images_one_by_one(monkeypatch):
    # Same noise for a batch of two and for its images alone: fed boxes, labels and summed losses must agree.
    targets = _objects(3, 1)
    options = DenoisingOptions(num_groups=1, contrastive=True, box_noise="corner")
    torch.manual_seed(1)
    shifts = {tuple(box.tolist()): torch.rand(2, 4) * 0.05 for t in targets for box in t["boxes"]}

    def add_noise(labels, boxes, num_classes, **_):
        shift = [shifts[tuple(b.tolist())][int(c == num_classes)] for b, c in zip(boxes, labels, strict=True)]
        return labels, boxes + torch.stack(shift)

    monkeypatch.setattr(dn_components, "add_noise", add_noise)
    label_enc = _small_label_enc()
    together = prepare_for_dn(targets, label_enc, num_matching=0, options=options)
    logits, boxes = torch.randn(1, 2, 6, 5), torch.rand(1, 2, 6, 4)
    batch = compute_dn_loss(dn_post_process(logits, boxes, together.meta)[2])
    total = dict.fromkeys(batch, 0.0)
    for index, target in enumerate(targets):
        alone = prepare_for_dn([target], label_enc, num_matching=0, options=options)
        used = alone.meta.pad_size
        torch.testing.assert_close(together.content[index, :used], alone.content[0])
        torch.testing.assert_close(together.boxes_unsigmoid[index, :used], alone.boxes_unsigmoid[0])
        part = compute_dn_loss(
            dn_post_process(logits[:, index : index + 1, :used], boxes[:, index : index + 1, :used], alone.meta)[2]
        )
        total = {name: total[name] + part[name] * len(target["labels"]) / 4 for name in total}
    for name in ("tgt_loss_ce", "tgt_loss_bbox", "tgt_loss_giou"):
        torch.testing.assert_close(batch[name], total[name])


def test_add_noise_follows_its_laws():
    # 20,000 objects well inside the image: bounds hold exactly, means and rates to three standard errors.
    torch.manual_seed(0)
    n, scale = 20000, 0.4
    boxes = torch.tensor([0.5, 0.5, 0.2, 0.1]).repeat(n, 1)
    labels = torch.full((n,), 3)
    new, center = add_noise(labels, boxes, 10, label_noise_scale=0.2, box_noise_scale=scale)
    assert abs((new != 3).float().mean() - 0.2 * 0.9) < 0.01
    assert set(new.tolist()) == set(range(10))
    shift, size = center[:, :2] - 0.5, boxes[:, 2:]
    assert (shift.abs() <= scale * size / 2 + 1e-6).all()
    assert (shift.abs().amax(0) > 0.99 * scale * size[0] / 2).all()
    assert ((center[:, 2:] - size).abs() <= scale * size + 1e-6).all()

    labels[n // 2 :] = 10
    kept, corner = add_noise(labels, boxes, 10, label_noise_scale=1.0, box_noise_scale=scale, box_noise="corner")
    assert (kept[n // 2 :] == 10).all() and (kept[: n // 2] < 10).all()
    low = (corner[:, :2] - corner[:, 2:] / 2) - (boxes[:, :2] - boxes[:, 2:] / 2)
    relative = (low / (size / 2 * scale)).abs()
    assert (relative[: n // 2] <= 1 + 1e-4).all()
    assert (relative[n // 2 :] >= 1 - 1e-4).all() and (relative[n // 2 :] <= 2 + 1e-4).all()


def test_attention_mask_lets_no_answer_leak():
    mask = denoising_attn_mask(2, 3, 4)
    group = torch.tensor([0] * 3 + [1] * 3 + [-1] * 4)
    for i in range(10):
        for j in range(10):
            leaks = group[j] >= 0 and group[i] != group[j]
            assert mask[i, j] == leaks


def test_mask_padding_hides_unused_slots_from_others():
    options = DenoisingOptions(num_groups=2, mask_padding=True)
    dn = prepare_for_dn(_objects(2, 1), _small_label_enc(), num_matching=3, options=options)
    assert dn.attn_mask.shape == (2, 7, 7)
    plain = denoising_attn_mask(2, 2, 3)
    assert torch.equal(dn.attn_mask[0], plain)  # image 0 fills its slots
    hidden = dn.attn_mask[1] & ~plain
    assert hidden[:, [1, 3]].any() and not hidden[:, [0, 2, 4, 5, 6]].any()
    assert not dn.attn_mask[1].all(dim=1).any()  # every query sees something


@pytest.mark.parametrize(("counts", "budget", "groups"), [((4, 1), 20, 5), ((9, 1), 8, 1), ((0, 0), 8, 8)])
def test_query_budget_bounds_the_denoising_part(counts, budget, groups):
    options = DenoisingOptions(query_budget=budget)
    meta = prepare_for_dn(_objects(*counts), _small_label_enc(), num_matching=3, options=options).meta
    assert meta.num_groups == groups
    assert meta.pad_size <= max(budget, max(counts))


@pytest.mark.parametrize("counts", [(0, 0), (0, 2), (0,)])
def test_images_without_objects_keep_a_gradient(counts):
    label_enc = _small_label_enc()
    dn = prepare_for_dn(_objects(*counts), label_enc, num_matching=3, options=DenoisingOptions())
    queries = torch.cat((dn.content, torch.zeros(len(counts), 3, 8)), dim=1)
    logits = queries[None, ..., :5].expand(2, -1, -1, -1)
    boxes = queries[None, ..., :4].sigmoid().expand(2, -1, -1, -1)
    losses = compute_dn_loss(dn_post_process(logits, boxes, dn.meta)[2])
    assert all(torch.isfinite(value) for value in losses.values())
    sum(losses.values()).backward()
    assert label_enc.weight.grad is not None and torch.isfinite(label_enc.weight.grad).all()


def test_num_known_replaces_the_local_normaliser():
    dn = prepare_for_dn(_objects(2, 1), _small_label_enc(), num_matching=0, options=DenoisingOptions(num_groups=2))
    denoised = dn_post_process(torch.randn(1, 2, 4, 5), torch.rand(1, 2, 4, 4), dn.meta)[2]
    local, doubled = compute_dn_loss(denoised), compute_dn_loss(denoised, num_known=12)
    torch.testing.assert_close(local["tgt_loss_bbox"], doubled["tgt_loss_bbox"] * 2)


@pytest.mark.parametrize(
    "wrong", [{"num_groups": 0}, {"label_noise_scale": 1.5}, {"box_noise_scale": -1.0}, {"box_noise": "edge"}]
)
def test_options_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=r"group|label_noise_scale|box_noise"):
        DenoisingOptions(**wrong)
