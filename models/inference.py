"""A detector made ready for inference: the same function in fewer and faster steps."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from util.nested_tensor import NestedTensor, as_nested_tensor

from .backbones.fusion import fold_batch_norms
from .backbones.resnet import ResNetBody
from .compiling import CompiledForInference

BOX_HEADS = "bbox_embed"


def prepare_for_inference(model: nn.Module, dtype: torch.dtype = torch.float32, *, compile: bool = False) -> nn.Module:
    """Return a copy of a detector that infers faster; the model itself stays as it is.

    In a ResNet batch norms are folded into the convolutions, and channels lie side by side in memory, as the fast
    convolutions want them. Other backbones are left alone.

    Args:
        model: a detector, on its device; its state dict no longer fits the copy.
        dtype: float32 keeps results up to rounding; bfloat16 or float16 compute convolutions, linears and attention in
            that type, boxes and outputs in float32.
        compile: generate code for the copy when it is first called, see `CompiledForInference`.

    Raises:
        OptionError: `compile` on a machine that cannot.
    """
    prepared = copy.deepcopy(model).eval().requires_grad_(False)
    for body in [module for module in prepared.modules() if isinstance(module, ResNetBody)]:
        fold_batch_norms(body)
        body.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if dtype != torch.float32:
        prepared = HalfPrecision(prepared, dtype)
    return CompiledForInference(prepared) if compile else prepared


class HalfPrecision(nn.Module):
    """A detector that computes in a half type, all but its boxes.

    Args:
        model: in float32, on its device; its weights are rounded in place.
        dtype: bfloat16 or float16.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype
        keep_box_heads(model)
        kept = {id(part) for island in model.modules() if isinstance(island, Float32) for part in island.modules()}
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)) and id(module) not in kept:
                module.to(dtype)  # autocast would do so at every call

    def forward(self, samples: NestedTensor | Sequence[Tensor], targets: None = None) -> dict[str, Any]:
        """Detect objects, as the detector itself; outputs are float32."""
        batch = as_nested_tensor(samples)
        with torch.autocast(batch.tensors.device.type, self.dtype):
            return as_float32(self.model(batch))


class Float32(nn.Module):
    """A module that computes in float32, whatever surrounds it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        """Apply the module to `x` as float32."""
        with torch.autocast(x.device.type, enabled=False):
            return self.module(x.float())


def keep_box_heads(model: nn.Module) -> None:
    """Let box heads compute in float32, in place: coordinates need more digits than a half type has.

    Heads that are registered in several places stay one module.
    """
    islands: dict[int, Float32] = {}
    for parent in list(model.modules()):
        heads = getattr(parent, BOX_HEADS, None)
        if isinstance(heads, nn.ModuleList):
            for index, head in enumerate(heads):
                if not isinstance(head, Float32):
                    heads[index] = islands.setdefault(id(head), Float32(head))
        elif isinstance(heads, nn.Module) and not isinstance(heads, Float32):
            setattr(parent, BOX_HEADS, islands.setdefault(id(heads), Float32(heads)))


def as_float32(outputs: Any) -> Any:
    """Return nested dicts and lists with their floating-point tensors as float32."""
    if isinstance(outputs, dict):
        return {name: as_float32(value) for name, value in outputs.items()}
    if isinstance(outputs, list):
        return [as_float32(value) for value in outputs]
    return outputs.float() if isinstance(outputs, Tensor) and outputs.is_floating_point() else outputs
