"""A detector as one function of plain tensors, made of operators that every runtime knows."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.layers.ms_deform_attn import MSDeformAttn
from models.ops import reference
from models.postprocess import PostProcess
from util.nested_tensor import NestedTensor
from util.pixels import IMAGE_MEAN, IMAGE_STD

RAW_OUTPUTS = ("pred_logits", "pred_boxes")
DETECTIONS = ("scores", "labels", "boxes")


class PlainMSDeformAttn(nn.Module):
    """Multi-scale deformable attention on grid_sample, for levels whose sizes are known only when the model runs.

    Args:
        module: whose parameters are used.
    """

    def __init__(self, module: MSDeformAttn) -> None:
        super().__init__()
        self.n_levels, self.n_heads, self.n_points = module.n_levels, module.n_heads, module.n_points
        self.sampling_offsets, self.attention_weights = module.sampling_offsets, module.attention_weights
        self.value_proj, self.output_proj = module.value_proj, module.output_proj

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        value_tokens: Tensor,
        spatial_shapes: Sequence[tuple[int, int]],
        level_start_index: Sequence[int],
        padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend; arguments and result as of `MSDeformAttn`."""
        value = self.value_proj(value_tokens)
        if padding_mask is not None:
            value = value.masked_fill(padding_mask[..., None], 0)
        value = value.unflatten(-1, (self.n_heads, -1))
        per_head = (self.n_heads, self.n_levels, self.n_points)
        offsets = self.sampling_offsets(query).unflatten(-1, (*per_head, 2))
        logits = self.attention_weights(query).unflatten(-1, (self.n_heads, -1))
        weights = logits.softmax(-1).unflatten(-1, per_head[1:])
        anchors = reference_points[:, :, None, :, None]
        if reference_points.shape[-1] == 2:
            locations = anchors + offsets / level_sizes(spatial_shapes, offsets)[:, None]
        else:
            locations = anchors[..., :2] + offsets / self.n_points * anchors[..., 2:] * 0.5
        return self.output_proj(reference.forward(value, spatial_shapes, locations, weights))


def level_sizes(spatial_shapes: Sequence[tuple[int, int]], like: Tensor) -> Tensor:
    """Return (L, 2) widths and heights in tokens, in type and device of `like`."""
    # Filled, because a tensor made of a list would hold the numbers of the example instead of the variables.
    sizes = [like.new_full((1,), side) for height, width in spatial_shapes for side in (width, height)]
    return torch.cat(sizes).unflatten(0, (-1, 2))


def with_plain_attention(model: nn.Module) -> nn.Module:
    """Return a copy of a detector, in evaluation mode, whose deformable attention is `PlainMSDeformAttn`."""
    model = copy.deepcopy(model).eval().requires_grad_(False)
    for name, module in list(model.named_modules()):
        if isinstance(module, MSDeformAttn):
            model.set_submodule(name, PlainMSDeformAttn(module))
    return model


class ExportableDetector(nn.Module):
    """Pictures with values from 0 to 1 in, predictions out.

    Args:
        model: the detector; a copy is used.
        postprocess: select and scale the predictions too; None leaves them as they are.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, postprocess: PostProcess | None = None) -> None:
        super().__init__()
        self.model = with_plain_attention(model)
        self.postprocess = postprocess
        self.register_buffer("mean", torch.tensor(IMAGE_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(IMAGE_STD)[:, None, None], persistent=False)

    def forward(
        self, images: Tensor, padding_mask: Tensor | None = None, sizes: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Detect objects.

        Args:
            images: (B, 3, H, W) float32 RGB in [0, 1]; what lies under padding does not matter.
            padding_mask: (B, H, W) bool, True = padding, at the bottom and right only; None: no padding.
            sizes: (B, 2) height and width of the pictures that the boxes shall refer to; with post-processing only.

        Returns:
            `pred_logits` (B, Q, K) and `pred_boxes` (B, Q, 4) cxcywh in [0, 1] of the picture without padding; with
            post-processing `scores` (B, n) descending, `labels` (B, n) and `boxes` (B, n, 4) xyxy in pixels.
        """
        images = (images - self.mean) / self.std
        padded = padding_mask is not None
        if padding_mask is None:
            padding_mask = torch.zeros_like(images[:, 0], dtype=torch.bool)
        else:
            # Training pads after the normalisation, with zeros.
            images = images.masked_fill(padding_mask[:, None], 0)
        outputs = self.model(NestedTensor(images, padding_mask, padded))
        if self.postprocess is None:
            return {name: outputs[name] for name in RAW_OUTPUTS}
        assert sizes is not None  # the exported program has it as an input
        return dict(zip(DETECTIONS, self.postprocess.select(outputs, sizes), strict=True))
