"""Time attention, forward and backward, against explicit softmax attention, and count what both keep for backward.

Explicit attention writes the weights of every query and token down, as classic multi-head attention does. Encoder:
tokens among themselves, 8 heads of 32 channels. Decoder: 300 queries ask the tokens, 8 heads with keys of 64 channels
(content and position side by side) and values of 32. Without dropout.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.layers.attention import attend

from .classic_model import explicit_attention
from .compare import Ratio, add_common_arguments, compare, report

TOKENS = [850, 3400]  # stride 32 and 16 of an image of 800 x 1066
QUERIES, HEADS, HEAD_DIM = 300, 8, 32
PADDING = 5  # with padding, one token in so many of the last image
REQUIRED, AIM = 3.5, 5.0  # of the time, encoder
MEMORY_REQUIRED = 5.0
SIDES: dict[str, Callable[..., Tensor]] = {"explicit softmax": explicit_attention, "ours": attend}


class Inputs(NamedTuple):
    """One call.

    Attributes:
        query: (B, Q, H * Dk); key: (B, S, H * Dk); value: (B, S, H * Dv); grad_output: (B, Q, H * Dv).
        may_attend: (B, 1, 1, S), False on padding; None without padding.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    grad_output: Tensor
    may_attend: Tensor | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this measurement."""
    parser.description = __doc__
    parser.add_argument("--layers", nargs="+", choices=["encoder", "decoder"], default=["encoder", "decoder"])
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--padding", action="store_true", help="a fifth of the last image is padding")
    add_common_arguments(parser)


def main(args: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Measure, print the table, and return the exit code; `arguments` are what `args` was parsed from."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    ratios: list[Ratio] = []
    for layer in args.layers:
        for tokens in args.tokens:
            ratios += measure(layer, make_inputs(layer, tokens, args.batch, args.padding), args.rounds, args.clock)
    report(ratios, args.json)
    return 0


def make_inputs(layer: str, tokens: int, batch: int, padding: bool) -> Inputs:
    """Draw the inputs of an encoder's or a decoder's attention."""
    queries, key_dim = (tokens, HEAD_DIM) if layer == "encoder" else (QUERIES, 2 * HEAD_DIM)
    shapes = [(queries, key_dim), (tokens, key_dim), (tokens, HEAD_DIM), (queries, HEAD_DIM)]
    query, key, value, grad_output = (torch.randn(batch, rows, HEADS * dim) for rows, dim in shapes)
    may_attend = None
    if padding:
        may_attend = torch.ones(batch, 1, 1, tokens, dtype=torch.bool)
        may_attend[-1, ..., -(tokens // PADDING) :] = False
    return Inputs(query.requires_grad_(), key.requires_grad_(), value.requires_grad_(), grad_output, may_attend)


def measure(layer: str, inputs: Inputs, rounds: int, clock: str) -> list[Ratio]:
    """Assert equal outputs and gradients, then compare time and bytes kept."""
    results = {name: (run(side, inputs), *gradients(side, inputs)) for name, side in SIDES.items()}
    for mine, theirs in zip(results["ours"], results["explicit softmax"], strict=True):
        # Sums of up to some thousand float32 products in two orders.
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    padded = "" if inputs.may_attend is None else " with padding"
    what = f"{layer} attention, batch {len(inputs.key)}, {inputs.key.shape[1]} tokens{padded}, forward + backward"
    calls: dict[str, Callable[[], Any]] = {name: partial(gradients, side, inputs) for name, side in SIDES.items()}
    required, aim = (REQUIRED, AIM) if layer == "encoder" else (None, None)
    return [compare(what, calls, rounds=rounds, required=required, aim=aim, clock=clock), memory_ratio(layer, inputs)]


def run(function: Callable[..., Tensor], inputs: Inputs) -> Tensor:
    """Compute forward once."""
    return function(*inputs[:3], num_heads=HEADS, may_attend=inputs.may_attend)


def gradients(function: Callable[..., Tensor], inputs: Inputs) -> tuple[Tensor, ...]:
    """Compute forward and backward once; return the gradients of query, key and value."""
    return torch.autograd.grad(run(function, inputs), inputs[:3], inputs.grad_output)


def memory_ratio(layer: str, inputs: Inputs) -> Ratio:
    """Return how many times less ours keeps for backward; the numbers do not vary."""
    theirs, mine = (sum(saved_bytes(partial(run, side, inputs)).values()) for side in (explicit_attention, attend))
    ratio = theirs / mine
    return Ratio(
        name=f"{layer} attention, {inputs.key.shape[1]} tokens, kept for backward",
        ours="ours",
        baseline="explicit softmax",
        median=ratio,
        smallest=ratio,
        largest=ratio,
        ours_value=mine / 2**20,
        baseline_value=theirs / 2**20,
        unit="MiB",
        required=MEMORY_REQUIRED if layer == "encoder" else None,
        aim=MEMORY_REQUIRED if layer == "encoder" else None,
    )


def saved_bytes(forward: Callable[[], object]) -> dict[int, int]:
    """Run a forward pass and return the bytes of every storage it keeps for backward, by address.

    Tensors that share memory count once.
    """
    kept: dict[int, int] = {}
    alive = []  # so that no address is given out twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        alive.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return kept
