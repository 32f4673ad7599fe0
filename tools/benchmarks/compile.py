"""Compare eager detectors with compiled ones: inference, and training steps with denoising.

Results are compared first; both sides then take turns in one process. The first call, which compiles, is timed apart,
with an empty cache of generated code.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import nn

from models.compiling import bounded_compilation, compile_layers
from models.inference import prepare_for_inference

from .compare import CLOCKS, Ratio, add_common_arguments, ratio_of, report
from .ops import interleave
from .training_step import Step, build_step, quiet

INFERENCE = ("dab_detr", "deformable_detr")
TRAINING = ("dn_dab_deformable_detr", "dn_dab_detr")
# float32 sums in another order, through the whole depth of a network of random weights; bfloat16 has 8 bits, and
# compiled code rounds less often.
TOLERANCES = {"float32": (1e-3, 1e-3), "bfloat16": (0.1, 0.1)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this measurement."""
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_common_arguments(parser)
    parser.add_argument("--inference", nargs="*", default=list(INFERENCE), metavar="MODEL", help="one image each")
    parser.add_argument("--training", nargs="*", default=list(TRAINING), metavar="MODEL", help="batches of --batch")
    parser.add_argument("--dtypes", nargs="+", choices=list(TOLERANCES), default=list(TOLERANCES))
    parser.add_argument("--options", nargs="+", default=[], metavar="KEY=VALUE", help="options of main.py")
    parser.add_argument("--size", nargs=2, type=int, default=[480, 640], metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--batch", type=int, default=2, help="images per training batch")
    parser.add_argument("--objects", type=int, default=7, help="objects per training image")


def main(args: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Measure, print the table, and return the exit code; `arguments` are what `args` was parsed from."""
    torch.set_num_threads(args.threads)
    ratios: list[Ratio] = []
    with tempfile.TemporaryDirectory() as empty, mock.patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=empty):
        for measure, names in ((inference, args.inference), (training, args.training)):
            for name in names:
                for dtype in args.dtypes:
                    ratios += measure(name, dtype, args)
    report(ratios, args.json)
    return 0


def inference(name: str, dtype: str, args: argparse.Namespace) -> list[Ratio]:
    """Compare the inference of one image."""
    step = make_step(name, args, batch=1)
    eager, compiled = (prepare_for_inference(step.model, getattr(torch, dtype), compile=each) for each in (False, True))
    what = f"inference, {name}, {dtype}, {args.size[0]} x {args.size[1]}"
    with torch.no_grad():
        calls = {"eager": partial(eager, step.batch[0]), "compiled": partial(compiled, step.batch[0])}
        return compare_calls(what, dtype, calls, calls, args)


def training(name: str, dtype: str, args: argparse.Namespace) -> list[Ratio]:
    """Compare training steps."""
    eager, compiled = (make_step(name, args, batch=args.batch) for _ in range(2))
    if dtype == "bfloat16":
        eager, compiled = eager.in_half(), compiled.in_half()
    compile_layers(compiled.model)
    what = f"training step, {name}, {dtype}, {args.size[0]} x {args.size[1]}, batch {args.batch}"
    results = {"eager": partial(judge, eager), "compiled": partial(judge, compiled)}
    with bounded_compilation():
        return compare_calls(what, dtype, results, {"eager": eager.run, "compiled": compiled.run}, args)


def make_step(name: str, args: argparse.Namespace, *, batch: int) -> Step:
    """Build a detector, always with the same weights, whose backbone gives moderate numbers."""
    denoising = ["--use_dn"] if name.startswith("dn_") else []
    options = ["-m", name, *denoising, "--options", "dropout=0", *args.options]
    step = build_step(options, size=(args.size[0], args.size[1]), batch=batch, objects=args.objects)
    for parameter in step.model.backbone.parameters():  # type: ignore[union-attr]
        if parameter.ndim == 4:  # with frozen statistics of one, the sums of random residual blocks would explode
            nn.init.normal_(parameter, std=(2 / parameter[0].numel()) ** 0.5 / 2)
    return step


def judge(step: Step) -> dict[str, Any]:
    """Return losses and the norm of the gradient."""
    losses = step.gradients()
    norm = torch.nn.utils.get_total_norm([p.grad for p in step.model.parameters() if p.grad is not None])
    return {**losses, "norm": norm}


def compare_calls(
    what: str,
    dtype: str,
    results: Mapping[str, Callable[[], dict[str, Any]]],
    calls: Mapping[str, Callable[[], Any]],
    args: argparse.Namespace,
) -> list[Ratio]:
    """Time the first results of both sides and compare them, then time calls in turn.

    Args:
        what: what is measured; dtype: key of `TOLERANCES`.
        results: "eager" and "compiled", give dicts with tensors; calls: the same sides, are timed.

    Raises:
        AssertionError: the results differ.
    """
    firsts, found = {}, {}
    for side, result in results.items():
        start = time.perf_counter()
        found[side] = result()
        firsts[side] = [time.perf_counter() - start]
    wanted, got = ({k: v for k, v in found[side].items() if isinstance(v, torch.Tensor)} for side in results)
    worst = max(wanted, key=lambda name: float((got[name] - wanted[name]).abs().max()))
    print(f"{what}: largest difference {float((got[worst] - wanted[worst]).abs().max()):.2g} in {worst}", flush=True)
    rtol, atol = TOLERANCES[dtype]
    torch.testing.assert_close(got, wanted, rtol=rtol, atol=atol)
    with quiet():
        seconds = interleave(dict(calls), args.rounds, torch.device("cpu"), CLOCKS[args.clock])
    both = {what: seconds, "the first call": firsts}
    return [ratio_of(name, times, ours="compiled", baseline="eager") for name, times in both.items()]
