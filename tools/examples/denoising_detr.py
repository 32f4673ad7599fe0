"""A plain DETR of its own, with the denoising plugged in: `python -m tools.examples.denoising_detr --use_dn`.

The detector is torch's Transformer with learned queries and no anchors, as in DETR (ECCV 2020); pictures have one
size, so there is no padding mask. Five numbers mark what denoising adds; docs/plugin.md explains them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from datasets import build_data_loader, build_dataset, get_coco_api_from_dataset
from datasets.coco import CocoDetection
from datasets.coco_eval import CocoEvaluator
from datasets.samplers import EvalBatchSampler, TrainBatchSampler
from main import parse_args
from models.criterion import SetCriterion
from models.dn_components import DenoisingMeta, DenoisingOptions, compute_dn_loss, dn_post_process, prepare_for_dn
from models.layers.anchor_encoding import anchor_sine_embedding
from models.matcher import HungarianMatcher
from models.postprocess import PostProcess
from util.nested_tensor import NestedTensor
from util.pixels import normalize_batch

WEIGHTS = {"loss_ce": 1.0, "loss_bbox": 5.0, "loss_giou": 2.0}


class PlainDetr(nn.Module):
    """DETR with an optional denoising part.

    Args:
        num_classes: K; num_queries: Qm; d_model: C.
        denoising: noise of the denoising queries, None trains by matching alone.
    """

    def __init__(self, num_classes: int, num_queries: int, d_model: int, denoising: DenoisingOptions | None) -> None:
        super().__init__()
        backbone: Any = timm.create_model("test_resnet", features_only=True, out_indices=(2,))
        self.backbone, self.denoising = backbone, denoising
        self.project = nn.Conv2d(backbone.feature_info.channels()[0], d_model, kernel_size=1)
        self.encoder = nn.TransformerEncoderLayer(d_model, 8, 2 * d_model, dropout=0.0, batch_first=True)
        layers = [nn.TransformerDecoderLayer(d_model, 8, 2 * d_model, dropout=0.0, batch_first=True) for _ in range(3)]
        self.decoder = nn.ModuleList(layers)
        self.queries = nn.Embedding(num_queries, d_model)
        self.class_head = nn.Linear(d_model, num_classes)
        self.box_head = nn.Sequential(nn.Linear(d_model, d_model), nn.ReLU(), nn.Linear(d_model, 4))
        nn.init.constant_(self.class_head.bias, -4.6)  # a probability of 0.01, as the focal loss wants it
        # 1. What the denoising part learns: class embeddings (the last channel is the indicator), places of boxes.
        self.label_enc = nn.Embedding(num_classes + 1, d_model - 1)
        self.box_to_query = nn.Linear(4 * 64, d_model)

    def forward(self, samples: NestedTensor, targets: Sequence[dict[str, Tensor]] | None = None) -> dict[str, Any]:
        """Detect; with targets in training the denoising part is computed beside the queries."""
        features = self.project(self.backbone(normalize_batch(samples).tensors)[0])
        height, width = features.shape[-2:]
        y, x = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
        centres = torch.stack((x, y), dim=-1).flatten(0, 1).to(features)
        places = anchor_sine_embedding(centres, self.queries.embedding_dim // 2)
        memory = self.encoder(features.flatten(2).transpose(1, 2) + places)

        queries = self.queries.weight.expand(len(memory), -1, -1)
        attn_mask, meta = None, None
        if self.training and self.denoising is not None and targets is not None:
            # 2. Before the decoder: noised objects as queries in front of the learned ones.
            dn = prepare_for_dn(targets, self.label_enc, num_matching=queries.shape[1], options=self.denoising)
            noised = self.box_to_query(anchor_sine_embedding(dn.boxes_unsigmoid.sigmoid(), 64))
            queries = torch.cat((dn.content + noised, queries), dim=1)
            attn_mask, meta = dn.attn_mask, dn.meta
        return self.predict(queries, memory, attn_mask, meta)

    def predict(
        self, queries: Tensor, memory: Tensor, attn_mask: Tensor | None, meta: DenoisingMeta | None
    ) -> dict[str, Any]:
        """Run decoder and heads."""
        hidden = []
        for layer in self.decoder:
            # 3. The mask keeps the answers from the learned queries.
            queries = layer(queries, memory, tgt_mask=attn_mask)
            hidden.append(queries)
        stacked = torch.stack(hidden)
        logits, boxes = self.class_head(stacked), self.box_head(stacked).sigmoid()
        outputs: dict[str, Any] = {}
        if meta is not None:
            # 4. After the heads: split the two parts again.
            logits, boxes, outputs["denoised"] = dn_post_process(logits, boxes, meta)
        aux = [{"pred_logits": c, "pred_boxes": b} for c, b in zip(logits[:-1], boxes[:-1], strict=True)]
        return outputs | {"pred_logits": logits[-1], "pred_boxes": boxes[-1], "aux_outputs": aux}


def train(epochs: int, *, use_dn: bool, cache: Path | None = None, d_model: int = 128) -> list[list[float]]:
    """Train on the generated data set; return the 12 COCO figures after each epoch."""
    config = Path(__file__).parents[2] / "configs/demo.py"  # pictures of 128 pixels
    args = parse_args(["--config_file", str(config), *(["--cache_dir", str(cache)] if cache else [])])
    torch.manual_seed(0)
    data, val = build_dataset("train", args), build_dataset("val", args)
    model = PlainDetr(data.num_classes, 20, d_model, DenoisingOptions(label_noise_scale=0.5) if use_dn else None)
    criterion = SetCriterion(matcher=HungarianMatcher(cost_class=2, cost_bbox=5, cost_giou=2), weight_dict=WEIGHTS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    sampler = TrainBatchSampler(len(data), batch_size=8, seed=0)
    loader = build_data_loader(data, batch_sampler=sampler, num_workers=0, seed=0)
    figures = []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        model.train()
        for samples, targets in loader:
            outputs = model(samples, targets)
            losses = criterion(outputs, targets)
            if "denoised" in outputs:
                # 5. The denoising losses, weighted like the others.
                losses |= compute_dn_loss(outputs["denoised"])
            total = sum(weight * losses[key] for name, weight in WEIGHTS.items() for key in losses if name in key)
            optimizer.zero_grad()
            total.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
        figures.append(evaluate(model, val))
        print(f"epoch {epoch}: loss {total.item():.2f}, AP {figures[-1][0]:.3f}, AP50 {figures[-1][1]:.3f}")
    return figures


@torch.no_grad()
def evaluate(model: PlainDetr, data: CocoDetection) -> list[float]:
    """Return the 12 COCO figures: nothing of the denoising is left at inference."""
    model.eval()
    evaluator = CocoEvaluator(get_coco_api_from_dataset(data), ["bbox"])
    loader = build_data_loader(data, batch_sampler=EvalBatchSampler(len(data), batch_size=8), num_workers=0, seed=0)
    for samples, targets in loader:
        results = PostProcess(100)(model(samples), torch.stack([target["orig_size"] for target in targets]))
        for target, result in zip(targets, results, strict=True):
            result["labels"] = data.labels_to_categories(result["labels"])
            evaluator.update({int(target["image_id"]): result})
    evaluator.accumulate()
    evaluator.summarize()
    return [float(figure) for figure in evaluator.coco_eval["bbox"].stats]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--use_dn", action="store_true", help="denoising training")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--cache_dir", type=Path, help="folder of the generated data set")
    options = parser.parse_args()
    train(options.epochs, use_dn=options.use_dn, cache=options.cache_dir)
