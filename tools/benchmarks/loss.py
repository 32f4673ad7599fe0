"""Time matching and losses, forward and backward to logits and boxes, against layer by layer as classically done.

Six decoder layers, 91 classes, batch 2; queries and objects as in DN-DETR (300 and 7) and as in a crowded DINO
(900 and 50), each without denoising and with the denoising losses of five groups included.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models.criterion import SetCriterion
from models.dn_components import DenoisingMeta, DenoisingOptions, DenoisingOutputs, prepare_for_dn
from models.matcher import HungarianMatcher
from util.step import weighted_sum

from .classic_losses import ClassicCriterion
from .compare import Ratio, add_common_arguments, compare, report

LAYERS, CLASSES = 6, 91
# (queries, objects per image) -> required and aimed ratio.
CASES = {(300, 7): (3.0, 6.0), (900, 50): (4.0, 8.0)}
# The same sums in float32 in another order.
RTOL, ATOL = 1e-4, 1e-6


class Predictions(NamedTuple):
    """One leaf per layer, as the losses of a model meet them.

    Attributes:
        logits: N of (B, Q, K); boxes: N of (B, Q, 4) cxcywh.
        targets: B dicts; denoising: of all layers together, or None.
    """

    logits: list[Tensor]
    boxes: list[Tensor]
    targets: list[dict[str, Tensor]]
    denoising: DenoisingOutputs | None

    @property
    def leaves(self) -> list[Tensor]:
        """Everything that gets a gradient."""
        known = [] if self.denoising is None else [self.denoising.logits, self.denoising.boxes_cxcywh]
        return [*self.logits, *self.boxes, *known]

    def outputs(self) -> dict[str, Any]:
        """Lay the predictions out as a detector does."""
        layers = [{"pred_logits": a, "pred_boxes": b} for a, b in zip(self.logits, self.boxes, strict=True)]
        known = {} if self.denoising is None else {"dn_meta": self.denoising}
        return {**layers[-1], "aux_outputs": layers[:-1], **known}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this measurement."""
    parser.description = __doc__
    add_common_arguments(parser)
    parser.add_argument("--batch", type=int, default=2, help="images per batch")
    parser.add_argument("--device", default="cpu")


def main(args: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Measure, print the table, and return the exit code; `arguments` are what `args` was parsed from."""
    torch.set_num_threads(args.threads)
    ratios = []
    for (queries, objects), targets in CASES.items():
        for denoising in (False, True):
            ratios.append(measure(args, queries, objects, denoising, targets))
    report(ratios, args.json)
    return 0


def measure(
    args: argparse.Namespace, queries: int, objects: int, denoising: bool, targets: tuple[float, float]
) -> Ratio:
    """Compare the two ways in one case."""
    predictions = make_predictions(args.batch, queries, objects, denoising=denoising, device=args.device)
    classic, ours = make_criteria(denoising=denoising)
    assert_equal(classic, ours, predictions)
    name = f"{args.batch} x {queries} queries, {objects} objects" + (", denoising included" if denoising else "")
    calls = {"layer by layer": call_of(classic, predictions), "all layers": call_of(ours, predictions)}
    required, aim = targets
    device = torch.device(args.device)
    return compare(name, calls, rounds=args.rounds, device=device, required=required, aim=aim, clock=args.clock)


def make_predictions(
    batch: int, queries: int, objects: int, *, denoising: bool, device: str = "cpu", groups: int = 5
) -> Predictions:
    """Draw predictions near the beginning of training: low scores, boxes anywhere."""
    torch.manual_seed(0)

    def boxes(*shape: int) -> Tensor:
        return torch.cat((torch.rand(*shape, 2) * 0.8 + 0.1, torch.rand(*shape, 2) * 0.3 + 0.02), -1).to(device)

    def logits(*shape: int) -> Tensor:
        return (torch.randn(*shape, CLASSES) - 3).to(device)

    targets = [
        {"labels": torch.randint(0, CLASSES, (objects,)).to(device), "boxes": boxes(objects)} for _ in "x" * batch
    ]
    known = None
    if denoising:
        meta = denoising_meta(targets, queries, groups, device)
        shape = (LAYERS, batch, meta.pad_size)
        known = DenoisingOutputs(logits(*shape).requires_grad_(), boxes(*shape).requires_grad_(), meta)
    return Predictions(
        [logits(batch, queries).requires_grad_() for _ in range(LAYERS)],
        [boxes(batch, queries).requires_grad_() for _ in range(LAYERS)],
        targets,
        known,
    )


def denoising_meta(targets: list[dict[str, Tensor]], queries: int, groups: int, device: str) -> DenoisingMeta:
    """Return where the known objects of a batch stand."""
    label_enc = nn.Embedding(CLASSES + 1, 7, device=device)
    return prepare_for_dn(targets, label_enc, num_matching=queries, options=DenoisingOptions(num_groups=groups)).meta


def make_criteria(*, denoising: bool) -> tuple[nn.Module, nn.Module]:
    """Return the classic criterion and ours, with the weights of DN-DETR."""
    base = {"loss_ce": 1.0, "loss_bbox": 5.0, "loss_giou": 2.0}
    if denoising:
        base |= {f"tgt_{name}": weight for name, weight in base.items()}
    suffixes = ["", *(f"_{layer}" for layer in range(LAYERS - 1))]
    weights = {name + suffix: weight for name, weight in base.items() for suffix in suffixes}
    ours = SetCriterion(matcher=HungarianMatcher(), weight_dict=weights, denoising=denoising)
    return ClassicCriterion(weight_dict=weights), ours


def call_of(criterion: nn.Module, predictions: Predictions) -> Callable[[], None]:
    """Return a function that computes losses and gradients once."""
    return lambda: (gradients(criterion, predictions), None)[1]


def gradients(criterion: nn.Module, predictions: Predictions) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
    """Return the losses by name and the gradients of all leaves."""
    losses = criterion(predictions.outputs(), predictions.targets)
    weights: dict[str, float] = criterion.weight_dict  # type: ignore[assignment]
    return losses, torch.autograd.grad(weighted_sum(losses, weights), predictions.leaves)


def assert_equal(classic: nn.Module, ours: nn.Module, predictions: Predictions) -> None:
    """Check that both give the same losses and gradients.

    Raises:
        AssertionError: they do not.
    """
    wanted, wanted_gradients = gradients(classic, predictions)
    got, got_gradients = gradients(ours, predictions)
    torch.testing.assert_close(got, wanted, rtol=RTOL, atol=ATOL)
    torch.testing.assert_close(got_gradients, wanted_gradients, rtol=RTOL, atol=ATOL)
