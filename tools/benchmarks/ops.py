"""Time the backends of multi-scale deformable attention side by side, at the shapes of DN-Deformable-DETR.

The backends take turns within every round, so that a busy machine slows all of them; what is compared is the median
over rounds of the ratio within a round. On the CPU everything is measured twice, in processes of their own: with the
default allocator, which returns large blocks to the system and pays for their page faults at every call, and with one
that keeps them, which takes page faults out of the comparison.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.ops import backends, ms_deform_attn, reference, use_backend
from models.ops.library import FOLDER
from tools.benchmarks import classic

SHAPES = [(100, 134), (50, 67), (25, 34), (13, 17)]  # strides 8 to 64 of an image of 800 x 1066
STARTS = [0, 13400, 16750, 17600]
HEADS, CHANNELS, POINTS = 8, 32, 4
OFFSET = 2.0  # standard deviation of the sampling offsets, in tokens
DECODER_QUERIES = 500  # 300 matching, 200 denoising
KEEP_MEMORY = "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184:glibc.malloc.top_pad=268435456"
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


class Inputs(NamedTuple):
    """One call: (B, S, H, D) value, (B, Q, H, L, P, 2) locations, (B, Q, H, L, P) weights, (B, Q, H * D) gradient."""

    value: Tensor
    locations: Tensor
    weights: Tensor
    grad_output: Tensor


class Setting(NamedTuple):
    """What is measured: encoder or decoder, images per batch, with the backward pass or not."""

    layer: str
    batch: int
    backward: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this measurement."""
    parser.description = __doc__
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: torch's)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds per setting; medians are reported")
    parser.add_argument("--dtype", choices=TYPES, default="float32", help="type of value; locations stay float32")
    parser.add_argument("--layers", nargs="+", choices=["encoder", "decoder"], default=["encoder", "decoder"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--json", type=Path, help="write the figures to this file, one JSON object per line")
    parser.add_argument("--one_process", action="store_true", help="measure in this process, with its allocator, only")


def main(args: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Measure, print the tables, and return the exit code.

    Args:
        args: the parsed options.
        arguments: the command line they were parsed from, to be repeated in processes with another allocator.
    """
    if args.json:
        args.json.write_text("")
    if args.one_process or args.device != "cpu":
        measure_here(args, os.environ.get("GLIBC_TUNABLES") or "default allocator")
        return 0
    codes = []
    for tunables in ("", KEEP_MEMORY):
        environment = os.environ | {"GLIBC_TUNABLES": tunables}
        command = [sys.executable, str(FOLDER.parents[1] / "tools/benchmark.py"), *arguments, "--one_process"]
        codes.append(subprocess.run(command, env=environment).returncode)
    return max(codes)


def measure_here(args: argparse.Namespace, allocator: str) -> None:
    """Measure every setting in this process and print a table."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = torch.device(args.device)
    print(f"\n{device_name(device)}, {args.threads} threads, {args.dtype}, torch {torch.__version__}, {allocator}")
    if device.type == "cuda":
        print(f"copy bandwidth {copy_bandwidth(device) / 1e9:.0f} GB/s")
    names = available(device.type)
    for layer in args.layers:
        for batch in args.batches:
            inputs = make_inputs(layer, batch, TYPES[args.dtype], device)
            for backward in (False, True):
                setting = Setting(layer, batch, backward)
                seconds = interleave({n: make_call(n, inputs, backward) for n in names}, args.rounds, device)
                report(setting, seconds, inputs, device, args, allocator)


def available(device_type: str) -> list[str]:
    """Return the backends for a device, plain PyTorch first."""
    fast = {"cpu": ["cpu"], "cuda": ["cuda", "triton"]}.get(device_type, [])
    missing = {name: backends._obstacle(name, device_type) for name in fast}
    for name, obstacle in missing.items():
        if obstacle:
            print(f"{name} is left out: {obstacle}")
    names = ["torch", *(name for name in fast if not missing[name])]
    if device_type == "cuda":  # the classic design, in float32 whatever is measured, is the baseline on GPUs
        if classic.obstacle():
            print(f"classic is left out: {classic.obstacle()}")
        else:
            names.append("classic")
    return names


def make_inputs(layer: str, batch: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Draw inputs: an encoder's queries sit on the tokens, a decoder's anywhere; both look a few tokens around."""
    tokens = sum(h * w for h, w in SHAPES)
    if layer == "encoder":
        points = torch.cat([grid_points(h, w) for h, w in SHAPES]).expand(batch, -1, -1)
    else:
        points = torch.rand(batch, DECODER_QUERIES, 2)
    queries = points.shape[1]
    sizes = torch.tensor([(w, h) for h, w in SHAPES], dtype=torch.float32)
    offsets = OFFSET * torch.randn(batch, queries, HEADS, len(SHAPES), POINTS, 2)
    locations = points[:, :, None, None, None] + offsets / sizes[:, None]
    weights = torch.rand(batch, queries, HEADS, len(SHAPES) * POINTS).softmax(-1).unflatten(-1, (len(SHAPES), POINTS))
    value = torch.randn(batch, tokens, HEADS, CHANNELS)
    grad_output = torch.randn(batch, queries, HEADS * CHANNELS)
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    return Inputs(
        value.to(device, dtype), locations.to(device, sums), weights.to(device, sums), grad_output.to(device, dtype)
    )


def grid_points(height: int, width: int) -> Tensor:
    """Return the centres (height * width, 2) of the tokens of a level as (x, y) in [0, 1]."""
    y, x = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
    return torch.stack([x, y], -1).flatten(0, 1)


def make_call(name: str, inputs: Inputs, backward: bool) -> Callable[[], None]:
    """Return a function that runs a backend once, gradients of all three inputs included if asked for."""
    grad_output = inputs.grad_output
    leaves = [t.detach().requires_grad_(backward) for t in inputs[:3]]
    if name == "classic":
        leaves = [t.detach().float().requires_grad_(backward) for t in inputs[:3]]
        grad_output = grad_output.float()
        levels = torch.tensor([(*shape, start) for shape, start in zip(SHAPES, STARTS, strict=True)])
        levels = levels.to(grad_output.device)

    def call() -> None:
        if name == "torch":  # plain PyTorch with its own autograd
            output = reference.forward(leaves[0], SHAPES, leaves[1], leaves[2])
        elif name == "classic":
            output = classic.ClassicAttention.apply(leaves[0], levels, leaves[1], leaves[2])
        else:
            output = ms_deform_attn(leaves[0], SHAPES, STARTS, leaves[1], leaves[2])
        if backward:
            torch.autograd.grad(output, leaves, grad_output)

    def call_with_backend() -> None:
        with use_backend(name if name in backends.NAMES else "auto"):
            call()

    return call_with_backend


def interleave(
    calls: Mapping[str, Callable[[], Any]],
    rounds: int,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Run all calls in turn and return seconds per call; the first round warms up and is dropped.

    Args:
        calls: by name; rounds: timed rounds; device: where they compute.
        clock: gives seconds; `time.process_time` leaves out what other programs take of a busy processor.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            took = time_call(call, device, clock)
            if number:
                seconds[name].append(took)
    return seconds


def time_call(call: Callable[[], Any], device: torch.device, clock: Callable[[], float] = time.perf_counter) -> float:
    """Return the seconds one call takes, repeated where it is too short for the clock."""
    repeats = 1
    while True:
        synchronize(device)
        start = clock()
        for _ in range(repeats):
            call()
        synchronize(device)
        took = clock() - start
        if took > 0.02 or repeats >= 64:
            return took / repeats
        repeats *= 4


def synchronize(device: torch.device) -> None:
    """Wait for the GPU, if it is one."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def report(
    setting: Setting,
    seconds: dict[str, list[float]],
    inputs: Inputs,
    device: torch.device,
    args: argparse.Namespace,
    allocator: str,
) -> None:
    """Print one line per backend: median, quartiles, ratio to plain PyTorch, and on a GPU the bytes per second."""
    what = "forward + backward" if setting.backward else "forward"
    print(f"{setting.layer}, batch {setting.batch}, {what}")
    for name, taken in seconds.items():
        low, median, high = quartiles(taken)
        ratio = statistics.median(plain / own for plain, own in zip(seconds["torch"], taken, strict=True))
        line = f"  {name:7s} {median * 1e3:9.2f} ms ({low * 1e3:.2f} to {high * 1e3:.2f}), {ratio:5.1f} x"
        if "classic" in seconds:
            gain = statistics.median(c / own for c, own in zip(seconds["classic"], taken, strict=True))
            line += f", {gain:.2f} x classic"
        if device.type == "cuda":
            line += f", {necessary_bytes(inputs, setting.backward) / median / 1e9:.0f} GB/s of necessary traffic"
        print(line)
        if args.json:
            record: dict[str, Any] = {**setting._asdict(), "backend": name, "dtype": args.dtype, "allocator": allocator}
            record |= {"threads": args.threads, "device": device_name(device), "seconds": taken, "ratio": ratio}
            with args.json.open("a") as file:
                file.write(json.dumps(record) + "\n")


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Return the lower quartile, the median and the upper quartile; of a single value, that value."""
    if len(values) == 1:
        return (values[0],) * 3
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def necessary_bytes(inputs: Inputs, backward: bool) -> int:
    """Count the bytes that have to move if every array is read or written once."""
    arrays = [*inputs[:3], inputs.grad_output]  # forward: three inputs, and the output is like grad_output
    total = sum(t.numel() * t.element_size() for t in arrays)
    if backward:  # the same four again, and the gradients of the three inputs
        total += total + sum(t.numel() * t.element_size() for t in inputs[:3])
    return total


def copy_bandwidth(device: torch.device) -> float:
    """Measure the bytes per second, read and written, of a copy of 1 GiB."""
    source = torch.empty(2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = [time_call(lambda: copy_into(target, source), device) for _ in range(5)]
    return 2 * source.numel() / statistics.median(seconds)


def device_name(device: torch.device) -> str:
    """Return the name of the GPU, or the instruction set of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU with {torch.backends.cpu.get_cpu_capability()}"


def copy_into(target: Tensor, source: Tensor) -> None:
    """Copy a tensor over another of the same size."""
    target.copy_(source)
