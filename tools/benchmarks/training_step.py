"""One training step of a detector, ours and as classically done, for the measurements of training."""

from __future__ import annotations

import argparse
import collections
import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import main as program
from engine import train_one_epoch
from models import build_model
from util.nested_tensor import NestedTensor, nested_tensor_from_tensor_list
from util.step import Batch, Losses, backward

from .classic_losses import ClassicCriterion
from .classic_model import classic_arithmetic


@dataclass
class Step:
    """What a training step works with.

    Attributes:
        model, criterion, optimizer: the detector, what judges it, and what changes its weights.
        batch: images and targets.
        args: options of main.py.
        classic: compute as classic code does, see `classic_arithmetic`.
    """

    model: nn.Module
    criterion: nn.Module
    optimizer: torch.optim.Optimizer
    batch: Batch
    args: argparse.Namespace
    classic: bool = False

    def run(self) -> dict[str, float]:
        """Do what the program does for one batch: `engine.train_one_epoch` over a loader of one."""
        device = self.batch[0].tensors.device
        options = argparse.Namespace(**{**vars(self.args), "print_freq": 1, "output_dir": "", "debug": False})
        with self.arithmetic(), quiet():
            return train_one_epoch(self.model, self.criterion, [self.batch], self.optimizer, device, 0, args=options)

    def gradients(self, *, seed: int = 0) -> Losses:
        """Return the losses after computing the gradients; the noise is that of the seed."""
        torch.manual_seed(seed)
        self.optimizer.zero_grad(set_to_none=True)
        with self.arithmetic():
            return backward(self.model, self.criterion, [self.batch], amp=self.args.amp)

    def arithmetic(self) -> contextlib.AbstractContextManager[None]:
        """Return the context in which the layers compute."""
        return classic_arithmetic() if self.classic else contextlib.nullcontext()

    def classically(self) -> Step:
        """Return the baseline: the same model, plain operator, float32, losses layer by layer."""
        weights: Mapping[str, float] = self.criterion.weight_dict  # type: ignore[assignment]
        criterion = ClassicCriterion(weight_dict=dict(weights), box_parts=bool(self.criterion.box_parts))
        args = argparse.Namespace(**{**vars(self.args), "amp": False})
        return Step(self.model, criterion, self.optimizer, self.batch, args, classic=True)

    def in_half(self) -> Step:
        """Return the same step in mixed precision, bfloat16 on a CPU."""
        args = argparse.Namespace(**{**vars(self.args), "amp": True})
        return Step(self.model, self.criterion, self.optimizer, self.batch, args, self.classic)


def build_step(
    options: list[str], *, size: tuple[int, int], batch: int, objects: int, device: str = "cpu", seed: int = 0
) -> Step:
    """Build a detector with random weights and a batch without padding.

    Args:
        options: of main.py, `-m` among them.
        size: (height, width) of the images in pixels; batch: B; objects: per image.
        device: where to compute.
    """
    args = program.parse_args([*options, "--backbone_weights", "none"])
    torch.manual_seed(seed)
    with quiet():
        model, criterion, _ = build_model(args)
    model.to(device).train()
    # A rate of almost nothing: all steps see the same weights, and do the same work.
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-12, weight_decay=0.0, fused=True)
    return Step(model, criterion, optimizer, make_batch(size, batch, objects, device), args)


def make_batch(size: tuple[int, int], batch: int, objects: int, device: str = "cpu") -> Batch:
    """Draw images of noise with objects anywhere."""
    images: NestedTensor = nested_tensor_from_tensor_list([torch.randn(3, *size) for _ in range(batch)])
    targets = [
        {
            "labels": torch.randint(0, 90, (objects,)).to(device),
            "boxes": torch.cat((torch.rand(objects, 2) * 0.6 + 0.2, torch.rand(objects, 2) * 0.3 + 0.05), 1).to(device),
            "image_id": torch.tensor([number]),
        }
        for number in range(batch)
    ]
    return images.to(device), targets


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep progress lines and warnings about random weights out of the measurement."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


class CountCalls(TorchDispatchMode):
    """Counts the operations that reach a device, and those of them that only look at memory in another way."""

    VIEWS = frozenset(
        (
            *("view", "_unsafe_view", "t", "transpose", "permute", "detach", "alias", "expand", "slice", "select"),
            *("unsqueeze", "squeeze", "as_strided", "split", "split_with_sizes", "unbind", "chunk", "unfold"),
            *("diagonal", "_reshape_alias"),
        )
    )

    def __init__(self) -> None:
        super().__init__()
        self.calls: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count one call and run it."""
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))

    @property
    def all(self) -> int:
        """Calls in all."""
        return sum(self.calls.values())

    @property
    def computing(self) -> int:
        """Calls without those that only return a view."""
        return sum(count for name, count in self.calls.items() if name not in self.VIEWS)


def peak_bytes(call: Callable[[], Any]) -> int:
    """Return the most memory allocated at a time during a call, above what there was before it.

    Every allocation and release of torch's CPU allocator counts, to the byte; on a GPU its own statistics are read.
    """
    if torch.cuda.is_available() and torch.cuda.memory_allocated():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    results = profiler.profiler.kineto_results
    events = sorted((e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]")
    level = peak = 0
    for _, change in events:
        level += change
        peak = max(peak, level)
    return peak
