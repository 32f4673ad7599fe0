"""With --amp everything heavy runs in half precision; what needs float32 keeps it."""

from __future__ import annotations

import collections
import logging
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import main
from models import build_model
from util.nested_tensor import nested_tensor_from_tensor_list
from util.step import backward

SMALL = (
    "--backbone resnet18 --backbone_weights none --batch_norm_type BatchNorm2d --hidden_dim 32 --nheads 4 "
    "--enc_layers 2 --dec_layers 2 --dim_feedforward 32 --num_queries 9 --num_classes 5 --use_dn"
)
# Not bmm: where queries are wider than values, torch computes attention itself, on purpose in float32.
HEAVY = ("addmm", "mm", "convolution", "convolution_backward", "ms_deform_attn", "ms_deform_attn_backward")


class DtypesOf(TorchDispatchMode):
    """Collects the types of the first argument of the heavy operations."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, collections.Counter[torch.dtype]] = collections.defaultdict(collections.Counter)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note the type and run the operation."""
        name = func.overloadpacket.__name__
        if name in HEAVY:
            self.found[name][args[0].dtype] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["dn_dab_detr", "dn_dab_deformable_detr"])
def test_mixed_precision_runs_every_product_in_half(name: str) -> None:
    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    model, criterion, _ = build_model(main.parse_args(["-m", name, *SMALL.split()]))
    logging.disable(logging.NOTSET)
    samples = nested_tensor_from_tensor_list([torch.randn(3, 64, 64), torch.randn(3, 48, 80)])
    targets = [{"labels": torch.tensor([1, 3]), "boxes": torch.rand(2, 4) * 0.4 + 0.3} for _ in range(2)]
    with DtypesOf() as dtypes:
        losses = backward(model.train(), criterion, [(samples, targets)], amp=True, amp_dtype_name="bfloat16")
    assert dtypes.found["convolution"] and dtypes.found["mm"]
    assert ("ms_deform_attn_backward" in dtypes.found) == ("deformable" in name)
    for operation, found in dtypes.found.items():
        assert set(found) == {torch.bfloat16}, f"{operation}: {dict(found)}"
    assert {value.dtype for value in losses.values()} == {torch.float32}
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert {grad.dtype for grad in gradients} == {torch.float32}
