"""Compiled detectors compute what the others compute, with a bounded number of graphs, and say why they cannot."""

from __future__ import annotations

import copy
import functools
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
import torch._inductor.config
from torch import nn
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel

import main
import models
from models import build_model, compiling
from models.compiling import bounded_compilation, compile_layers
from models.inference import prepare_for_inference
from tests.runs import command, write_pictures
from tests.test_checkpoint_activations import MODELS, build
from util.checkpoint import load_checkpoint
from util.errors import OptionError
from util.nested_tensor import nested_tensor_from_tensor_list
from util.step import backward

# Sizes of two pictures, and the objects in each: padded and not, square, odd, without objects, with one.
BATCHES = (
    (((128, 128), (96, 160)), (2, 2)),
    (((128, 192), (128, 192)), (3, 1)),
    (((192, 128), (64, 256)), (0, 5)),
    (((160, 160), (160, 160)), (0, 0)),
    (((256, 320), (96, 64)), (7, 3)),
    (((192, 192), (192, 96)), (1, 0)),
)
SLOWER = [pytest.param(options, marks=pytest.mark.slow) for options in MODELS[2:]]


@pytest.fixture(autouse=True)
def _forget_graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Start and end without graphs of other tests; let all code compute as it does inside compiled code."""
    # Outside, frozen norms scale weights and large feed-forward blocks run in chunks, which rounds in another way.
    # Below, equal means to the bit.
    monkeypatch.setattr("models.backbones.resnet.frozen_affines", lambda pairs: {})
    monkeypatch.setattr("models.layers.feed_forward.CHUNK", sys.maxsize)
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def step(model: nn.Module, criterion: nn.Module, sizes: Any, objects: Any, *, amp: bool = False) -> tuple[Any, Any]:
    """Compute losses and gradients of one batch, always the same."""
    torch.manual_seed(1)
    samples = nested_tensor_from_tensor_list([torch.randn(3, *size) for size in sizes])
    targets = [{"labels": torch.randint(0, 5, (n,)), "boxes": torch.rand(n, 4) * 0.4 + 0.3} for n in objects]
    model.zero_grad(set_to_none=True)
    losses = backward(model, criterion, [(samples, targets)], amp=amp)
    return losses, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_steps(options: str, *, backend: str, batches: Any = BATCHES, rtol: float = 0.0, **how: Any) -> int:
    """Compare losses and gradients of both kinds; return how many graphs there are in the end."""
    eager, criterion = build(f"{options} --dropout 0")
    compiled, _ = build(f"{options} --dropout 0")
    compile_layers(compiled, backend=backend)
    with bounded_compilation():
        for sizes, objects in batches:
            losses, gradients = step(eager, criterion, sizes, objects, **how)
            got_losses, got_gradients = step(compiled, criterion, sizes, objects, **how)
            torch.testing.assert_close(got_losses, losses, rtol=rtol, atol=rtol)
            assert got_gradients.keys() == gradients.keys() and len(gradients) > 20
            for name, gradient in gradients.items():
                # Relative to the whole tensor: single entries may be nothing but rounding.
                assert (got_gradients[name] - gradient).norm() <= rtol * (gradient.norm() + 1), name
    return int(counters["stats"]["unique_graphs"])


@pytest.mark.parametrize("options", [*MODELS[:2], *SLOWER], ids=lambda options: options.split()[0])
def test_compiled_layers_compute_the_same_and_graphs_are_few(options: str) -> None:
    # Graphs as dynamo cuts them, run operation by operation: equal to the bit.
    graphs = assert_same_steps(options, backend="eager")
    # At most: the backbone; with and without padding, first and later layers of encoder and decoder (the first ones
    # get tokens in another layout, or have another projection).
    assert graphs <= 1 + 2 * (2 + 2)


@pytest.mark.slow
@pytest.mark.parametrize("options", MODELS, ids=lambda options: options.split()[0])
def test_differentiated_graphs_compute_the_same(options: str) -> None:
    # Forward and backward traced ahead: sums may be in another order.
    assert_same_steps(options, backend="aot_eager", batches=BATCHES[:3], rtol=1e-5)


@pytest.mark.parametrize("amp", [False, True])
def test_compiled_layers_work_with_checkpointed_activations(amp: bool) -> None:
    # Mixed precision: 8 bits, and gradients that are added in another order.
    rtol = 0.05 if amp else 1e-5
    options = f"{MODELS[1]} --checkpoint_activations --enc_layers 1 --dec_layers 1 --backbone_stages 3"
    assert_same_steps(options, backend="eager", batches=BATCHES[:2], rtol=rtol, amp=amp)


@pytest.mark.slow
def test_generated_code_trains_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    # The stem is frozen; rounding of float32 in fused operations.
    options = f"{MODELS[0]} --backbone_stages 1 --enc_layers 1 --dec_layers 1"
    assert_same_steps(options, backend="inductor", batches=BATCHES[:1], rtol=1e-4)


def test_generated_code_infers_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model, _ = build("dab_detr --backbone_stages 1 --enc_layers 1 --dec_layers 1")
    eager, compiled = (prepare_for_inference(model, compile=each) for each in (False, True))
    images = [torch.randn(3, 64, 96)]
    # With gradients recorded parameters would not become constants: the detector switches them off itself.
    outputs = compiled(images)
    assert not outputs["pred_boxes"].requires_grad
    for name, value in eager(images).items():
        if isinstance(value, torch.Tensor):
            # Rounding of float32 in fused operations.
            torch.testing.assert_close(outputs[name], value, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("options", MODELS, ids=lambda options: options.split()[0])
def test_whole_detector_is_one_graph_per_kind_of_batch(options: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = build(options)
    monkeypatch.setattr("models.inference.CompiledForInference", uncompiled_backend())
    eager, compiled = (prepare_for_inference(model, compile=each) for each in (False, True))
    for sizes in ((128, 192), (128, 192), (160, 192), (192, 256), (256, 160), (192, 192)):
        images = [torch.randn(3, *sizes)]
        torch.testing.assert_close(compiled(images), eager(images), rtol=0, atol=0)
    # The first size; height as an unknown; width too; a convolution of a very small map, which takes another kernel.
    assert counters["stats"]["unique_graphs"] <= 4


def uncompiled_backend() -> Any:
    """Return the compiled detector with graphs that run operation by operation."""
    return functools.partial(compiling.CompiledForInference, backend="eager")


def test_compiled_layers_keep_names_and_copies_stand_alone() -> None:
    plain, _ = build(MODELS[0])
    model, _ = build(MODELS[0])
    names = compile_layers(model, backend="eager")
    assert names[0] == "backbone.0.body" and len(names) == 1 + 2 + 2
    assert list(model.state_dict()) == list(plain.state_dict())
    copy.deepcopy(model).eval()([torch.randn(3, 64, 64)])
    assert not counters["stats"]


def test_compiled_layers_work_under_distributed_data_parallel(tmp_path: Path) -> None:
    eager, criterion = build(f"{MODELS[1]} --dropout 0 --enc_layers 1")
    model, _ = build(f"{MODELS[1]} --dropout 0 --enc_layers 1")
    compile_layers(model, backend="eager")
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        with bounded_compilation():
            losses, _ = step(DistributedDataParallel(model), criterion, *BATCHES[0])
    finally:
        torch.distributed.destroy_process_group()
    expected, gradients = step(eager, criterion, *BATCHES[0])
    torch.testing.assert_close(losses, expected, rtol=0, atol=0)
    for name, parameter in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=0, atol=0)
    assert counters["stats"]["unique_graphs"] >= 3


def test_too_many_graphs_are_an_error_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "MOST_GRAPHS", 1)
    model, criterion = build(f"{MODELS[1]} --dec_layers 1 --enc_layers 1 --backbone_stages 3")
    compile_layers(model, backend="eager")
    with pytest.raises(OptionError, match="--compile generated code 1 times"), bounded_compilation():
        for sizes, objects in BATCHES[:2]:  # with padding, then without
            step(model, criterion, sizes, objects)


def test_settings_of_the_compiler_are_put_back() -> None:
    before = torch._dynamo.config.recompile_limit, torch._dynamo.config.fail_on_recompile_limit_hit
    with bounded_compilation():
        assert torch._dynamo.config.recompile_limit == compiling.MOST_GRAPHS
    assert (torch._dynamo.config.recompile_limit, torch._dynamo.config.fail_on_recompile_limit_hit) == before


def test_missing_compiler_is_said_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-such-compiler",))
    data = write_pictures(tmp_path / "data", num_train=2, num_val=1)
    assert main.run_command_line(command(data, tmp_path / "out", "--compile")) == 1
    assert "error: --compile needs a C++ compiler" in capsys.readouterr().err.splitlines()[-1]


def test_program_trains_resumes_and_evaluates_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "compile_layers", functools.partial(compile_layers, backend="eager"))
    monkeypatch.setattr("models.inference.CompiledForInference", uncompiled_backend())
    data = write_pictures(tmp_path / "data", num_train=3)
    folders = {name: tmp_path / name for name in ("eager", "compiled")}
    for name, folder in folders.items():
        flags = ["--compile"] if name == "compiled" else []
        shared = [*flags, "--dropout", 0, "--ema", "--size_bucket", 32]
        for epochs in (1, 2):  # the second start resumes
            argv = command(data, folder, "--epochs", epochs, "--resume", "auto", *shared)
            assert main.run_command_line(argv) == 0
            assert bool(counters["stats"]) == bool(flags)
        argv = command(data, folder / "eval", "--eval", "--resume", folder / "checkpoint.pth", *flags)
        assert main.run_command_line(argv) == 0
    states = [load_checkpoint(folder / "checkpoint.pth")["model"] for folder in folders.values()]
    assert list(states[0]) == list(states[1])
    torch.testing.assert_close(states[1], states[0], rtol=0, atol=0)
    logs = [json.loads((folder / "eval" / "log.txt").read_text()) for folder in folders.values()]
    assert logs[0]["test_coco_eval_bbox"] == logs[1]["test_coco_eval_bbox"]


def test_build_model_leaves_layers_alone_for_an_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[nn.Module] = []
    monkeypatch.setattr(models, "compile_layers", called.append)
    logging.disable(logging.WARNING)
    for flags, count in ((["--eval", "--compile"], 0), ([], 0), (["--compile"], 1)):
        build_model(main.parse_args(["-m", "dab_detr", "--backbone", "resnet18", "--backbone_weights", "none", *flags]))
        assert len(called) == count
    logging.disable(logging.NOTSET)
