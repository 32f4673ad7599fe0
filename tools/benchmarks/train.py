"""Compare a training step with the classic one: the same model with the plain-PyTorch operator, float32, losses layer
by layer.

A step is what the program does for one batch: forward with denoising, matching, losses, backward, clipping, optimizer
and meters. Memory is what torch allocates at most during a step, above weights and optimizer state. Synchronisations
are counted on an imagined device where there is no GPU (`synchronisations.py`).
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .classic_model import classic_launches
from .compare import CLOCKS, Ratio, add_common_arguments, compare, report
from .synchronisations import counted
from .training_step import CountCalls, Step, build_step, peak_bytes

PARTS = ("float32", "bfloat16", "criterion", "calls", "synchronisations", "memory")
TARGETS = {"float32": (2.0, 3.0), "bfloat16": (3.0, 5.0), "calls": (2.0, 4.0), "memory": (1 / 0.7, 1 / 0.5)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this measurement."""
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_common_arguments(parser)
    parser.add_argument("-m", "--modelname", default="dn_dab_deformable_detr")
    parser.add_argument("--options", nargs="+", default=[], metavar="KEY=VALUE", help="options of main.py")
    parser.add_argument("--size", nargs=2, type=int, default=[480, 640], metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--batch", type=int, default=2, help="images per batch")
    parser.add_argument("--objects", type=int, default=7, help="objects per image")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))


def main(args: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Measure, print the table, and return the exit code; `arguments` are what `args` was parsed from."""
    torch.set_num_threads(args.threads)
    step = make_step(args)
    classic = step.classically()
    check_equal(classic, step)
    measures: dict[str, Callable[[], list[Ratio]]] = {
        "float32": lambda: [step_ratio(args, "float32", classic, step)],
        "bfloat16": lambda: [step_ratio(args, "bfloat16", classic, step.in_half())],
        "criterion": lambda: [criterion_share(args, step)],
        "calls": lambda: call_ratios(classic, step),
        "synchronisations": lambda: [synchronisation_ratio(classic, step)],
        "memory": lambda: memory_ratios(args, classic, step),
    }
    report([ratio for part in args.parts for ratio in measures[part]()], args.json)
    return 0


def make_step(args: argparse.Namespace, *more: str) -> Step:
    """Build the detector of the command line, with denoising where it has any."""
    denoising = ["--use_dn"] if args.modelname.startswith("dn_") else []
    options = ["-m", args.modelname, *denoising, *more]
    options += ["--options", *args.options] if args.options else []
    size = (args.size[0], args.size[1])
    return build_step(options, size=size, batch=args.batch, objects=args.objects, device=args.device)


def check_equal(classic: Step, ours: Step) -> None:
    """Check that both steps compute the same losses and a gradient of the same norm.

    Raises:
        AssertionError: they do not.
    """
    results = []
    for step in (classic, ours):
        losses = step.gradients()
        norm = torch.nn.utils.get_total_norm([p.grad for p in step.model.parameters() if p.grad is not None])
        results.append({**losses, "norm": norm})
    wanted, got = results
    # float32 sums in another order, through the whole depth of a network of random weights.
    torch.testing.assert_close({name: got[name] for name in wanted}, wanted, rtol=1e-2, atol=1e-3)


def step_ratio(args: argparse.Namespace, dtype: str, classic: Step, ours: Step) -> Ratio:
    """Compare the times of a step."""
    required, aim = TARGETS[dtype]
    calls: dict[str, Callable[[], Any]] = {"classic step": classic.run, f"ours, {dtype}": ours.run}
    name, device = f"training step, {args.modelname}", torch.device(args.device)
    return compare(name, calls, rounds=args.rounds, device=device, required=required, aim=aim, clock=args.clock)


def criterion_share(args: argparse.Namespace, step: Step) -> Ratio:
    """Compare a step with the part of it that matches and judges, backward to the predictions included."""
    samples, targets = step.batch
    with torch.no_grad():
        outputs = step.model(samples, targets)

    def leaves(thing: Any) -> Any:
        if isinstance(thing, torch.Tensor):
            return thing.detach().requires_grad_(thing.is_floating_point())
        if isinstance(thing, dict):
            return {name: leaves(value) for name, value in thing.items()}
        return [leaves(value) for value in thing] if isinstance(thing, list) else thing

    def judge() -> None:
        own = leaves({name: value for name, value in outputs.items() if name != "dn_meta"})
        if "dn_meta" in outputs:
            known = outputs["dn_meta"]
            own["dn_meta"] = known._replace(logits=leaves(known.logits), boxes_cxcywh=leaves(known.boxes_cxcywh))
        losses = step.criterion(own, targets)
        weights: dict[str, float] = step.criterion.weight_dict  # type: ignore[assignment]
        sum(weight * losses[name] for name, weight in weights.items() if name in losses).backward()

    calls: dict[str, Callable[[], Any]] = {"whole step": step.run, "matching and losses": judge}
    name = "share of matching and losses (a hundredth: 100)"
    return compare(
        name, calls, rounds=args.rounds, device=torch.device(args.device), required=100, aim=100, clock=args.clock
    )


def exactly(name: str, ours: str, own: float, baseline: float, unit: str, target: str = "") -> Ratio:
    """Return the ratio of two counts."""
    required, aim = TARGETS.get(target, (None, None))
    ratio = baseline / own
    return Ratio(name, ours, "classic", ratio, ratio, ratio, own, baseline, unit=unit, required=required, aim=aim)


def call_ratios(classic: Step, ours: Step) -> list[Ratio]:
    """Count the operations of forward, losses and backward."""
    counters = {}
    for step in (classic, ours):
        with classic_launches() if step.classic else contextlib.nullcontext(), CountCalls() as counter:
            step.gradients()
        counters[step.classic] = counter
    before, after = counters[True], counters[False]
    return [
        exactly("aten calls, forward + loss + backward", "ours", after.all, before.all, "calls", "calls"),
        exactly("the same without views", "ours", after.computing, before.computing, "calls", "calls"),
    ]


def synchronisation_ratio(classic: Step, ours: Step) -> Ratio:
    """Count how often the host waits in a step, the log line of this one step included."""
    found = {}
    for step in (classic, ours):
        with counted() as waits:
            waits.mark([*step.model.parameters(), *step.model.buffers()])
            step.run()
        found[step.classic] = len(waits.found)
    # The step writes a log line, for which nothing more is read.
    return exactly("synchronisations, log line of every step included", "ours", found[False], found[True], "")


def peak_of_step(step: Step) -> int:
    """Return the most memory of a step in bytes, gradients included, above weights and optimizer state."""
    step.run()  # now there is optimizer state
    step.optimizer.zero_grad(set_to_none=True)
    return peak_bytes(step.run)


def memory_ratios(args: argparse.Namespace, classic: Step, ours: Step) -> list[Ratio]:
    """Compare the peak memory of steps, with and without activation checkpointing."""
    small = make_step(args, "--checkpoint_activations")
    plain, kept, least = (peak_of_step(step) for step in (classic, ours, small))
    mib = 2**20
    return [
        exactly("peak memory of a step", "ours", kept / mib, plain / mib, "MiB"),
        exactly("peak memory of a step", "ours, --checkpoint_activations", least / mib, plain / mib, "MiB", "memory"),
        Ratio(
            name="peak memory of a step",
            ours="--checkpoint_activations",
            baseline="ours without",
            median=kept / least,
            smallest=kept / least,
            largest=kept / least,
            ours_value=least / mib,
            baseline_value=kept / mib,
            unit="MiB",
            required=TARGETS["memory"][0],
            aim=TARGETS["memory"][1],
        ),
        checkpointing_cost(args, ours, small),
    ]


def checkpointing_cost(args: argparse.Namespace, ours: Step, small: Step) -> Ratio:
    """Time one step with and one without activation checkpointing, after the ones that measured memory."""
    seconds = []
    for step in (ours, small):
        start = CLOCKS[args.clock]()
        step.run()
        seconds.append(CLOCKS[args.clock]() - start)
    ratio = seconds[0] / seconds[1]
    name = "time of one step"
    return Ratio(name, "--checkpoint_activations", "ours without", ratio, ratio, ratio, seconds[1], seconds[0])
