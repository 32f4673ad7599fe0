"""Compilation: torch.compile for the parts of a detector that do the work, with a bound on what is generated."""

from __future__ import annotations

import contextlib
import importlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from util.errors import OptionError
from util.nested_tensor import NestedTensor, as_nested_tensor

BODY = "backbone.0.body"
LAYERS = r"transformer\.(encoder|decoder)\.layers\.\d+"
# Graphs that one piece of code may need: with and without padding, gradients, training mode and the first layer's
# additional projection, for one image and for several. Torch's own limit is 8.
MOST_GRAPHS = 32


def compile_layers(model: nn.Module, *, backend: str = "inductor") -> list[str]:
    """Let a detector's backbone, encoder layers and decoder layers be compiled when they are first called, in place.

    Not the detector as a whole: layers of one kind share what is generated, so that six cost as much as one, and what
    differs from batch to batch (denoising, matching, losses) stays outside. Sizes are unknowns of the generated code:
    other pictures and other numbers of queries need no new one. Names of parameters stay as they are. A copy of the
    model is not compiled.

    Args:
        model: a detector.
        backend: of torch.compile.

    Returns:
        Names of the modules that will be compiled, inside `bounded_compilation`.

    Raises:
        OptionError: this machine cannot compile.
    """
    if backend == "inductor":
        require_compiler()
    names = [BODY, *(name for name, _ in model.named_modules() if re.fullmatch(LAYERS, name))]
    for name in names:
        model.get_submodule(name).compile(backend=backend, dynamic=True)
    return names


class CompiledForInference(nn.Module):
    """A detector whose parameters are constants of the code that is generated for it.

    The first call compiles for its size. A later one of another size compiles once more, with what changed as an
    unknown.

    Args:
        model: prepared for inference, on its device; its parameters must not change any more.
        backend: of torch.compile.

    Raises:
        OptionError: this machine cannot compile.
    """

    def __init__(self, model: nn.Module, *, backend: str = "inductor") -> None:
        super().__init__()
        if backend == "inductor":
            require_compiler()
        model.compile(backend=backend, fullgraph=True)
        self.model = model
        # Lays constants out for the CPU's convolutions and products. Never tried on a GPU, so not asked for there.
        self.freezing = backend == "inductor" and next(model.parameters()).device.type == "cpu"

    def forward(self, samples: NestedTensor | Sequence[Tensor], targets: None = None) -> dict[str, Any]:
        """Detect objects, as the detector itself; without gradients, or parameters would be no constants."""
        inductor: Any = importlib.import_module("torch._inductor.config")
        # As a setting, not an option of torch.compile: that would come too late to make parameters constants.
        with torch.no_grad(), bounded_compilation(), inductor.patch(freezing=self.freezing):
            return self.model(as_nested_tensor(samples))


@contextlib.contextmanager
def bounded_compilation() -> Iterator[None]:
    """Let compiled modules run inside the block; the settings of torch's compiler are put back afterwards.

    Torch alone would stop compiling after eight graphs and go on uncompiled, with one line in the log.

    Raises:
        OptionError: a piece of code asked for more than `MOST_GRAPHS` graphs.
    """
    dynamo: Any = importlib.import_module("torch._dynamo")
    shapes: Any = importlib.import_module("torch.fx.experimental._config")
    # A region is smaller than a bucket of DistributedDataParallel: cutting it along buckets would gain nothing.
    settings = {"recompile_limit": MOST_GRAPHS, "fail_on_recompile_limit_hit": True, "optimize_ddp": False}
    try:
        # Two sizes that happen to be equal stay two unknowns: square pictures need no graph of their own.
        with dynamo.config.patch(**settings), shapes.patch(use_duck_shape=False):
            yield
    except dynamo.exc.FailOnRecompileLimitHit as error:
        raise OptionError(
            f"--compile generated code {MOST_GRAPHS} times for one layer, as its inputs kept changing in other ways "
            "than size: go on without --compile (--resume auto takes the last checkpoint); TORCH_LOGS=recompiles says "
            "what changed"
        ) from error


def require_compiler() -> None:
    """Check that torch can turn generated code into machine code.

    Raises:
        OptionError: there is no C++ compiler.
    """
    builder: Any = importlib.import_module("torch._inductor.cpp_builder")
    failures: Any = importlib.import_module("torch._inductor.exc")
    try:
        builder.get_cpp_compiler()
    except failures.InvalidCxxCompiler as error:
        raise OptionError(
            "--compile needs a C++ compiler and found none: install g++ (or name one in the environment variable CXX), "
            "or leave the option out"
        ) from error
