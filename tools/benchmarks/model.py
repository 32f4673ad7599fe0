"""Count parameters and multiply-adds of a detector, and measure its latency and memory, part by part.

Multiply-adds: one per product of two numbers that is added up, in convolutions, linears and matrix products, nothing
else; FLOPs in the strict sense are twice that. They are counted on shapes alone, for the inference of one batch without
padding. Multi-scale deformable attention is listed apart: it takes 5 per sample and channel, 4 for the interpolation
between tokens and 1 for the attention weight, all of its samples taken as lying inside the level.

Published figures of the family leave out the query-key products of the dense encoder, because the counter they come
from does not know the operation that adds the padding mask; that share is listed too.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import main as program
from models import build_model, list_models
from models.layers.attention import SelfAttention
from util.nested_tensor import NestedTensor

from .ops import device_name, quartiles, synchronize

# What a detector calls its parts; everything else is heads, proposals and preparation of the queries.
PARTS = {
    "backbone": "backbone",
    "projection": "input_proj",
    "encoder": "transformer.encoder",
    "decoder": "transformer.decoder",
}
REST = "heads, rest"
SAMPLE_COST = 5  # multiply-adds per sample and channel of deformable attention
TYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Counts(NamedTuple):
    """Multiply-adds of one part.

    Attributes:
        convolutions, products: of convolutions; of linears and matrix products.
        operator: of multi-scale deformable attention.
        query_key: share of `products` that published figures leave out.
    """

    convolutions: int = 0
    products: int = 0
    operator: int = 0
    query_key: int = 0

    @property
    def total(self) -> int:
        """Convolutions, linears and matrix products, without the operator."""
        return self.convolutions + self.products


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this measurement."""
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("-m", "--modelname", choices=list_models(), help="the model, unless --config_file names it")
    parser.add_argument("--config_file", metavar="FILE", help="options of the model, as for main.py")
    parser.add_argument("--options", nargs="+", default=[], metavar="KEY=VALUE", help="options of main.py")
    parser.add_argument("--size", nargs=2, type=int, default=[800, 1199], metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--batch", type=int, default=1, help="images per batch")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=TYPES, default="float32", help="half types run under autocast")
    parser.add_argument("--rounds", type=int, default=10, help="timed runs; 0 only counts")
    parser.add_argument("--json", type=Path, help="write the figures to this file")


def main(args: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Count, measure, print the table, and return the exit code; `arguments` are what `args` was parsed from."""
    device, size = torch.device(args.device), (args.size[0], args.size[1])
    argv = ["-m", args.modelname] if args.modelname else []
    argv += ["--config_file", args.config_file] if args.config_file else []
    argv += ["--options", *args.options] if args.options else []
    options = program.parse_args([*argv, "--backbone_weights", "none"])
    parameters, counts = count(options, size, args.batch)
    record: dict[str, Any] = {
        "model": options.modelname,
        "size": list(size),
        "batch": args.batch,
        "parameters": parameters,
        "multiply_adds": {part: each._asdict() for part, each in counts.items()},
    }
    print(f"{options.modelname}, {args.batch} x {size[0]} x {size[1]}")
    print_counts(parameters, counts)
    if args.rounds:
        record |= measure(options, size, args.batch, device, args.dtype, args.rounds)
        print_measurement(record)
    if args.json:
        args.json.write_text(json.dumps(record) + "\n")
    return 0


def count(
    options: argparse.Namespace, size: tuple[int, int], batch: int
) -> tuple[dict[str, dict[str, int]], dict[str, Counts]]:
    """Count a detector without computing anything.

    Args:
        options: of main.py; size: (height, width) of the images in pixels; batch: B.

    Returns:
        part -> {"trainable", "total"} parameters, and part -> Counts; parts as in `PARTS`, then `REST`.
    """
    with torch.device("meta"):
        model, _, _ = build_model(options)
        parameters = count_parameters(model)
        model.eval().requires_grad_(False)
        return parameters, count_multiply_adds(model, make_batch(size, batch, torch.device("meta")))


def count_parameters(model: nn.Module) -> dict[str, dict[str, int]]:
    """Count the parameters of every part, trainable and in all; heads that a decoder shares count as heads."""
    found = {part: {"trainable": 0, "total": 0} for part in (*PARTS, REST)}
    for name, parameter in model.named_parameters():
        inside = [p for p, path in PARTS.items() if name.startswith(f"{path}.")]
        shared = ".bbox_embed." in name or ".class_embed." in name
        part = inside[0] if inside and not shared else REST
        found[part]["total"] += parameter.numel()
        found[part]["trainable"] += parameter.numel() * int(parameter.requires_grad)
    return found


def count_multiply_adds(model: nn.Module, images: NestedTensor) -> dict[str, Counts]:
    """Count one inference; heads that a decoder calls to update its boxes count as decoder."""
    operator = torch.ops.dn_detr.ms_deform_attn
    query_key = 0

    def add_query_key(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal query_key
        batch, tokens, channels = inputs[0].shape
        query_key += batch * tokens**2 * channels

    with ExitStack() as stack:
        for module in model.get_submodule(PARTS["encoder"]).modules():
            if isinstance(module, SelfAttention):
                handle = module.register_forward_pre_hook(add_query_key)
                stack.callback(handle.remove)
        mode = stack.enter_context(FlopCounterMode(display=False, custom_mapping={operator: operator_flops}))
        model(images)
    by_module = mode.get_flop_counts()
    counts = {part: sort_counts(by_module[f"{type(model).__name__}.{path}"]) for part, path in PARTS.items()}
    counts["encoder"] = counts["encoder"]._replace(query_key=query_key)
    whole = sort_counts(by_module["Global"])
    known = [sum(column) for column in zip(*(each[:3] for each in counts.values()), strict=True)]
    return {**counts, REST: Counts(*(a - b for a, b in zip(whole[:3], known, strict=True)))}


def operator_flops(
    value_shape: Sequence[int],
    shapes_shape: Sequence[int],
    starts_shape: Sequence[int],
    locations_shape: Sequence[int],
    *_: Any,
    **__: Any,
) -> int:
    """Return the FLOPs of multi-scale deformable attention from the shapes of its inputs, two per multiply-add."""
    batch, queries, heads, levels, points, _coordinates = locations_shape
    return 2 * SAMPLE_COST * batch * queries * heads * levels * points * value_shape[-1]


def sort_counts(flops: dict[Any, int]) -> Counts:
    """Sort the FLOPs of operations by kind, as multiply-adds."""
    kinds = {"convolutions": 0, "products": 0, "operator": 0}
    for operation, value in flops.items():
        name = str(operation)
        kind = "operator" if "ms_deform_attn" in name else "convolutions" if "convolution" in name else "products"
        kinds[kind] += value // 2
    return Counts(**kinds)


def make_batch(size: tuple[int, int], batch: int, device: torch.device) -> NestedTensor:
    """Return a batch of noise without padding."""
    images = torch.randn((batch, 3, *size), device=device)
    return NestedTensor(images, torch.zeros((batch, *size), dtype=torch.bool, device=device))


def measure(
    options: argparse.Namespace, size: tuple[int, int], batch: int, device: torch.device, dtype: str, rounds: int
) -> dict[str, Any]:
    """Run a detector with random weights and return its latency and memory.

    Returns:
        `seconds` per inference, one number per round; `part_seconds`, medians, from runs of their own; `peak_bytes` of
        the GPU, or of the whole process on a CPU; `part_peak_bytes`, on a GPU only.
    """
    torch.manual_seed(0)
    model = build_model(options)[0].to(device).eval().requires_grad_(False)
    images = make_batch(size, batch, device)
    half = TYPES[dtype]
    autocast: AbstractContextManager[Any] = torch.autocast(device.type, half) if half else nullcontext()
    with autocast:
        whole = [timed(lambda: model(images), device) for _ in range(rounds + 1)][1:]  # the first warms up
        part_seconds, part_peaks = measure_parts(model, images, device, rounds)
    on_gpu = device.type == "cuda"
    peak = max(part_peaks.values()) if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "dtype": dtype,
        "torch": torch.__version__,
        "seconds": whole,
        "part_seconds": part_seconds,
        "peak_bytes": peak,
        "part_peak_bytes": part_peaks if on_gpu else {},
    }


def timed(call: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds of a call, until the device is idle."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def measure_parts(
    model: nn.Module, images: NestedTensor, device: torch.device, rounds: int
) -> tuple[dict[str, float], dict[str, int]]:
    """Return the median seconds of every part and, on a GPU, the most bytes allocated while it ran.

    The device is waited for around every part, so that the sum is a little more than the latency of the whole.
    """
    seconds: dict[str, list[float]] = {part: [] for part in (*PARTS, REST)}
    peaks: dict[str, int] = {}
    started: list[float] = []

    def note_peak(part: str) -> None:
        if device.type == "cuda":
            peaks[part] = max(peaks.get(part, 0), torch.cuda.max_memory_allocated(device))
            torch.cuda.reset_peak_memory_stats(device)

    def before(module: nn.Module, inputs: Any) -> None:
        synchronize(device)
        note_peak(REST)
        started.append(time.perf_counter())

    def after(part: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            synchronize(device)
            seconds[part].append(time.perf_counter() - started.pop())
            note_peak(part)

        return hook

    with ExitStack() as stack:
        for part, path in PARTS.items():
            module = model.get_submodule(path)
            stack.callback(module.register_forward_pre_hook(before).remove)
            stack.callback(module.register_forward_hook(after(part)).remove)
        for _ in range(rounds):
            whole = timed(lambda: model(images), device)
            seconds[REST].append(whole - sum(seconds[part][-1] for part in PARTS))
            note_peak(REST)
    return {part: statistics.median(values) for part, values in seconds.items()}, peaks


def print_counts(parameters: dict[str, dict[str, int]], counts: dict[str, Counts]) -> None:
    """Print parameters and multiply-adds of the parts and of the whole."""
    print(f"{'':12s} {'trainable':>12s} {'parameters':>12s} {'convolutions':>13s} {'products':>9s} {'operator':>9s}")
    total = Counts(*(sum(column) for column in zip(*counts.values(), strict=True)))
    sums = {kind: sum(each[kind] for each in parameters.values()) for kind in ("trainable", "total")}
    for part, each in {**counts, "all": total}.items():
        own = {**parameters, "all": sums}[part]
        print(
            f"{part:12s} {own['trainable']:12,d} {own['total']:12,d} "
            f"{each.convolutions / 1e9:13.2f} {each.products / 1e9:9.2f} {each.operator / 1e9:9.2f}"
        )
    print(f"{total.total / 1e9:.2f} G multiply-adds of convolutions, linears and matrix products;")
    print(f"{(total.total - total.query_key) / 1e9:.2f} G without the query-key products of a dense encoder;")
    print(f"{(total.total + total.operator) / 1e9:.2f} G with deformable attention")


def print_measurement(record: dict[str, Any]) -> None:
    """Print latency and memory of the whole and of the parts."""
    low, median, high = quartiles(record["seconds"])
    print(f"\n{record['device']}, {record['threads']} threads, {record['dtype']}, torch {record['torch']}")
    print(f"latency {median * 1e3:.1f} ms ({low * 1e3:.1f} to {high * 1e3:.1f}) per batch")
    where = "allocated on the GPU" if record["part_peak_bytes"] else "resident in the process"
    print(f"peak memory {record['peak_bytes'] / 2**20:.0f} MiB {where}")
    for part, seconds in record["part_seconds"].items():
        peak = record["part_peak_bytes"].get(part)
        print(f"  {part:12s} {seconds * 1e3:9.1f} ms" + (f" {peak / 2**20:8.0f} MiB" if peak is not None else ""))
