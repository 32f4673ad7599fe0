"""Denoising training as a plug-in: noised ground truth becomes extra decoder queries with known answers.

Source: DN-DETR, CVPR 2022, "Denoising", "Attention Mask", "Label Embedding"; contrastive pairs from DINO, ICLR 2023,
"Contrastive DeNoising Training". Three calls add it to a detector: before the decoder, after the heads and beside the
matching losses::

    dn = prepare_for_dn(targets, label_enc, num_matching=Qm, options=options)
    logits, boxes, dn_outputs = dn_post_process(logits, boxes, dn.meta)
    losses |= compute_dn_loss(dn_outputs, focal_alpha=0.25)

Layout of the denoising part: G groups of M' slots, M' = most objects in an image (twice that with contrastive pairs);
object j of group g sits in slot g * M' + j, slots beyond an image's objects hold zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from util.box_ops import box_cxcywh_to_xyxy, box_xyxy_to_cxcywh, inverse_sigmoid

from .losses import class_error, elementwise_box_losses, focal_loss_sums

Targets = Sequence[dict[str, Tensor]]


@dataclass(frozen=True)
class DenoisingOptions:
    """How queries are noised and arranged.

    Attributes:
        num_groups: G, copies of every object, each with noise of its own (`--scalar`).
        query_budget: when above 0, G = budget // (slots of one group), at least 1 (`--dn_number`): memory stays bounded
            when an image holds many objects.
        label_noise_scale: probability in [0, 1] that a label is replaced by a uniform class.
        box_noise_scale: noise relative to the box size.
        box_noise: "center" moves centres by up to scale * size / 2 and changes sizes by up to scale * size (DN-DETR);
            "corner" moves each corner by up to scale * size / 2 (the DINO-style variant).
        contrastive: add to every object a negative with label "no object" and corners moved one to two times as far.
        mask_padding: hide unused slots from the other queries; the official code lets them be seen.

    Raises:
        ValueError: a value is out of range or the box-noise law is unknown.
    """

    num_groups: int = 5
    query_budget: int = 0
    label_noise_scale: float = 0.2
    box_noise_scale: float = 0.4
    box_noise: str = "center"
    contrastive: bool = False
    mask_padding: bool = False

    def __post_init__(self) -> None:
        if self.query_budget <= 0 and self.num_groups < 1:
            raise ValueError(f"--scalar {self.num_groups} leaves no denoising group: raise it or drop --use_dn")
        if not 0 <= self.label_noise_scale <= 1 or self.box_noise_scale < 0:
            raise ValueError(
                "expected label_noise_scale in [0, 1] and box_noise_scale >= 0, got "
                f"{self.label_noise_scale} and {self.box_noise_scale}"
            )
        if self.box_noise not in ("center", "corner"):
            raise ValueError(f"box_noise must be 'center' or 'corner', got '{self.box_noise}'")


@dataclass(frozen=True)
class DenoisingMeta:
    """Where the known objects sit among the queries and what their answers are; N = G * T (2 T with contrastive pairs).

    Attributes:
        image_index: (N,) int64, image of each known object; slot_index: (N,) int64, its query.
        labels: (N,) int64 true classes, K for the negatives of contrastive pairs.
        boxes_cxcywh: (N, 4) true boxes in [0, 1].
        pad_size: Qd = G * M', queries of the denoising part.
        num_groups: G.
        num_positive: known objects without the negatives of contrastive pairs: the normaliser of the losses.
    """

    image_index: Tensor
    slot_index: Tensor
    labels: Tensor
    boxes_cxcywh: Tensor
    pad_size: int
    num_groups: int
    num_positive: int


class DenoisingQueries(NamedTuple):
    """The denoising part, to stand before the matching part.

    Attributes:
        content: (B, Qd, C) label embeddings with the indicator 1 in the last channel.
        boxes_unsigmoid: (B, Qd, 4) noised boxes before the sigmoid, cxcywh.
        attn_mask: (Qd + Qm, Qd + Qm), or (B, Qd + Qm, Qd + Qm) with mask_padding; True = may not attend.
        meta: what `dn_post_process` and `compute_dn_loss` need.
    """

    content: Tensor
    boxes_unsigmoid: Tensor
    attn_mask: Tensor
    meta: DenoisingMeta


class DenoisingOutputs(NamedTuple):
    """Predictions of the denoising part of N decoder layers, last layer last.

    Attributes:
        logits: (N, B, Qd, K); boxes_cxcywh: (N, B, Qd, 4) in [0, 1]; meta: from `prepare_for_dn`.
    """

    logits: Tensor
    boxes_cxcywh: Tensor
    meta: DenoisingMeta


def prepare_for_dn(
    targets: Targets, label_enc: nn.Embedding, *, num_matching: int, options: DenoisingOptions
) -> DenoisingQueries:
    """Build the denoising queries of a batch ("Denoising" and "Attention Mask" in DN-DETR, CVPR 2022).

    Images without objects, and batches without any, are fine: the part is then empty (Qd = 0 in the latter case)
    and `label_enc` still receives a gradient of zeros.

    Args:
        targets: per image `labels` (n,) int64 in [0, K) and `boxes` (n, 4) cxcywh in [0, 1], on one device.
        label_enc: embedding of K + 1 rows and C - 1 channels; row K stands for "no object".
        num_matching: Qm, number of matching queries (patterns x queries).
        options: noise and arrangement.

    Returns:
        DenoisingQueries on the targets' device.
    """
    num_classes = label_enc.num_embeddings - 1
    place = _place_objects([len(t["labels"]) for t in targets], options)
    # Host to device, nothing is read back: object counts are known from shapes.
    index = torch.from_numpy(place.rows).to(targets[0]["boxes"].device, non_blocking=True)
    image, slot, source, negative = index[0], index[1], index[2], index[3].bool()

    groups = place.num_groups
    labels = torch.cat([t["labels"] for t in targets])[source].masked_fill(negative, num_classes).repeat(groups)
    boxes = torch.cat([t["boxes"] for t in targets]).float()[source].repeat(groups, 1)
    group = torch.arange(groups, device=index.device).repeat_interleave(len(slot))
    meta = DenoisingMeta(
        image_index=image.repeat(groups),
        slot_index=slot.repeat(groups) + group * place.group_size,
        labels=labels,
        boxes_cxcywh=boxes,
        pad_size=groups * place.group_size,
        num_groups=groups,
        num_positive=groups * sum(len(t["labels"]) for t in targets),
    )
    noised_labels, noised_boxes = add_noise(
        labels,
        boxes,
        num_classes,
        label_noise_scale=options.label_noise_scale,
        box_noise_scale=options.box_noise_scale,
        box_noise=options.box_noise,
    )
    where = (meta.image_index, meta.slot_index)
    content, boxes_unsigmoid = _fill_slots(label_enc(noised_labels), noised_boxes, where, len(targets), meta.pad_size)
    attn_mask = denoising_attn_mask(groups, place.group_size, num_matching, device=index.device)
    if options.mask_padding:
        attn_mask = _hide_unused_slots(attn_mask, where, len(targets), meta.pad_size)
    return DenoisingQueries(content, boxes_unsigmoid, attn_mask, meta)


def add_noise(
    labels: Tensor,
    boxes: Tensor,
    num_classes: int,
    *,
    label_noise_scale: float,
    box_noise_scale: float,
    box_noise: str = "center",
) -> tuple[Tensor, Tensor]:
    """Noise labels and boxes of the known objects: the one random step of denoising training.

    A label is replaced, with probability `label_noise_scale`, by a class drawn from all K, its own included. Objects
    whose label is `num_classes` are the negatives of contrastive pairs: they keep it, and their corners move by one to
    two times the scale, with a random sign, so that a negative is always farther off than its positive can be.

    Args:
        labels: (N,) int64, the known objects repeated group after group.
        boxes: (N, 4) cxcywh in [0, 1], not changed in place.
        num_classes: K.
        label_noise_scale, box_noise_scale, box_noise: see `DenoisingOptions`.

    Returns:
        labels (N,) int64 and boxes (N, 4) cxcywh whose numbers ("center") or corners ("corner") lie in [0, 1].
    """
    negative = labels == num_classes
    flip = torch.rand(labels.shape, device=labels.device) < label_noise_scale
    replacement = torch.randint_like(labels, num_classes)
    labels = torch.where(flip & ~negative, replacement, labels)

    uniform = torch.rand_like(boxes) * 2 - 1
    if box_noise == "center":
        size = boxes[:, 2:]
        reach = torch.cat((size / 2, size), dim=1) * box_noise_scale
        return labels, (boxes + uniform * reach).clamp(0, 1)
    away = torch.where(uniform < 0, uniform - 1, uniform + 1)
    shift = torch.where(negative[:, None], away, uniform)
    reach = boxes[:, 2:].repeat(1, 2) / 2 * box_noise_scale
    corners = (box_cxcywh_to_xyxy(boxes) + shift * reach).clamp(0, 1)
    return labels, box_xyxy_to_cxcywh(corners)


def denoising_attn_mask(
    num_groups: int, group_size: int, num_matching: int, *, device: torch.device | str | None = None
) -> Tensor:
    """Build the attention mask of denoising and matching queries ("Attention Mask" in DN-DETR).

    Groups do not see each other and the matching part sees no group, so that no answer leaks; groups see the matching
    part.

    Returns:
        (Qd + Qm, Qd + Qm) bool with Qd = num_groups * group_size, True = may not attend.
    """
    group = torch.arange(num_groups, device=device).repeat_interleave(group_size)
    group = torch.cat((group, group.new_full((num_matching,), -1)))
    return (group[None, :] >= 0) & (group[None, :] != group[:, None])


def dn_post_process(
    logits: Tensor, boxes_cxcywh: Tensor, meta: DenoisingMeta
) -> tuple[Tensor, Tensor, DenoisingOutputs]:
    """Split predictions of all layers into the matching part and the denoising part.

    Args:
        logits: (N, B, Qd + Qm, K); boxes_cxcywh: (N, B, Qd + Qm, 4), N decoder layers; meta: from `prepare_for_dn`.

    Returns:
        matching logits (N, B, Qm, K), matching boxes (N, B, Qm, 4) and the DenoisingOutputs.
    """
    part = slice(0, meta.pad_size)
    denoising = DenoisingOutputs(logits[:, :, part], boxes_cxcywh[:, :, part], meta)
    return logits[:, :, meta.pad_size :], boxes_cxcywh[:, :, meta.pad_size :], denoising


def compute_dn_loss(
    outputs: DenoisingOutputs, *, focal_alpha: float = 0.25, num_known: Tensor | float | None = None
) -> dict[str, Tensor]:
    """Compute the reconstruction losses of the denoising part for all layers at once.

    No matching is needed: every slot knows its object. Negatives of contrastive pairs only learn "no object".

    Args:
        outputs: from `dn_post_process`.
        focal_alpha: weight of the positive class in the focal loss; negative = no weighting.
        num_known: normaliser; by default `meta.num_positive`, this batch's own count, as official. Pass the mean over
            processes to make two processes equal one.

    Returns:
        `tgt_loss_ce`, `tgt_class_error`, `tgt_loss_bbox`, `tgt_loss_giou` of the last layer and the same with suffixes
        `_0`, `_1`, ... for the earlier ones; 0-d float32 tensors, zeros when there is no object.
    """
    meta = outputs.meta
    where = (meta.image_index, meta.slot_index)
    logits = outputs.logits[:, where[0], where[1]].float()
    boxes = outputs.boxes_cxcywh[:, where[0], where[1]].float()
    num_layers, known, num_classes = logits.shape
    if num_known is None:
        num_known = max(meta.num_positive, 1)

    is_positive = meta.labels < num_classes
    row = torch.arange(known, device=logits.device) * num_classes
    positives = (row + meta.labels.clamp(max=num_classes - 1)).expand(num_layers, -1)
    focal = focal_loss_sums(logits, positives, alpha=focal_alpha, counted=is_positive)
    l1, giou = elementwise_box_losses(boxes, meta.boxes_cxcywh)
    sums = torch.stack((focal, (l1.sum(-1) * is_positive).sum(1), (giou * is_positive).sum(1))) / num_known
    losses = {
        "tgt_loss_ce": sums[0],
        "tgt_class_error": class_error(logits, meta.labels) * min(known, 1),  # 0 without objects, as official
        "tgt_loss_bbox": sums[1],
        "tgt_loss_giou": sums[2],
    }
    return name_layers(losses, num_layers)


def name_layers(losses: dict[str, Tensor], num_layers: int) -> dict[str, Tensor]:
    """Spread (N,) losses over official names: the last layer plain, earlier layers with the suffix `_i`."""
    suffixes = [*(f"_{i}" for i in range(num_layers - 1)), ""]
    columns = {name: values.unbind(0) for name, values in losses.items()}
    order = [num_layers - 1, *range(num_layers - 1)]
    return {name + suffixes[i]: layers[i] for i in order for name, layers in columns.items()}


class _Placement(NamedTuple):
    rows: np.ndarray[Any, Any]  # (4, T) int64: image, slot within the group, source object, negative or not
    group_size: int
    num_groups: int


def _place_objects(counts: list[int], options: DenoisingOptions) -> _Placement:
    # Per image positives first, then its own negatives. Differs from official: there the first half of the whole
    # batch is positive, which pairs objects of different images as soon as a batch has more than one.
    copies = 2 if options.contrastive else 1
    per_image = np.asarray(counts, dtype=np.int64) * copies
    image = np.repeat(np.arange(len(counts)), per_image)
    slot = np.arange(per_image.sum()) - np.repeat(np.cumsum(per_image) - per_image, per_image)
    own_count = np.repeat(np.asarray(counts, dtype=np.int64), per_image)
    first = np.repeat(np.cumsum(counts) - np.asarray(counts), per_image)
    negative = slot >= own_count
    source = first + np.where(negative, slot - own_count, slot)
    group_size = int(per_image.max(initial=0))
    groups = options.num_groups
    if options.query_budget > 0:
        groups = max(1, options.query_budget // max(group_size, 1))
    return _Placement(np.stack((image, slot, source, negative)).astype(np.int64), group_size, groups)


def _fill_slots(
    embedding: Tensor, boxes: Tensor, where: tuple[Tensor, Tensor], batch_size: int, pad_size: int
) -> tuple[Tensor, Tensor]:
    with_indicator = torch.cat((embedding, embedding.new_ones((len(embedding), 1))), dim=1)
    content = with_indicator.new_zeros((batch_size, pad_size, with_indicator.shape[1]))
    boxes_unsigmoid = boxes.new_zeros((batch_size, pad_size, 4))
    return content.index_put(where, with_indicator), boxes_unsigmoid.index_put(where, inverse_sigmoid(boxes))


def _hide_unused_slots(attn_mask: Tensor, where: tuple[Tensor, Tensor], batch_size: int, pad_size: int) -> Tensor:
    unused = torch.zeros((batch_size, len(attn_mask)), dtype=torch.bool, device=attn_mask.device)
    unused[:, :pad_size] = True
    unused = unused.index_put(where, unused.new_zeros(()))
    # An unused slot still sees itself: a row without any visible key would give nan.
    itself = torch.eye(len(attn_mask), dtype=torch.bool, device=attn_mask.device)
    return (attn_mask | unused[:, None, :]) & ~itself
