"""The model benchmark: its counts against published figures and closed forms, its table and its record."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import main
from models.layers.attention import SelfAttention
from models.layers.ms_deform_attn import MSDeformAttn
from tools import benchmark
from tools.benchmarks import model as bench
from util.nested_tensor import NestedTensor

ENCODER_ONLY = "dn_dab_deformable_detr_deformable_encoder_only --num_patterns 3 --transformer_activation relu"
# G multiply-adds at 800 x 1199. The counter behind these figures leaves out the query-key products of a dense encoder
# and counts deformable attention.
PUBLISHED = {
    "dn_dab_detr": 95.3,
    "dn_dab_detr --dilation": 188.8,
    "dn_dab_detr --backbone resnet101": 166.4,
    "dn_dab_detr --num_patterns 3": 108.4,
    "dn_dab_deformable_detr": 250.1,
    ENCODER_ONLY: 360.4,
    "dn_dab_dino_deformable_detr --two_stage --num_queries 900": 264.3,
    "deformable_detr": 185.6,
}
TINY = [
    *("backbone=resnet18", "backbone_stages=3", "hidden_dim=64", "enc_layers=1", "dec_layers=2", "dim_feedforward=64"),
    "num_queries=10",
]


@pytest.mark.parametrize(("options", "published"), PUBLISHED.items(), ids=PUBLISHED)
def test_multiply_adds_equal_the_published_figure(options, published):
    args = main.parse_args(["-m", *options.split(), "--backbone_weights", "none"])
    _, counts = bench.count(args, (800, 1199), 1)
    figure = sum(each.total + each.operator - each.query_key for each in counts.values()) / 1e9
    # Half a per cent: the other counter knows norms, and counts 4 multiply-adds per sample instead of 5.
    assert figure == pytest.approx(published, rel=0.005)


def test_r50_counts_convolutions_and_products_by_hand():
    args = main.parse_args(["-m", "dn_dab_detr", "--backbone_weights", "none"])
    parameters, counts = bench.count(args, (800, 1199), 1)
    tokens, width = 25 * 38, 256
    assert counts["projection"].convolutions == tokens * 2048 * width
    # Six layers: four square projections, two products of attention, two of the feed-forward, and the query scale.
    layer = tokens * (4 * width**2 + 2 * tokens * width + 2 * 2048 * width + 2 * width**2)
    assert counts["encoder"].products == 6 * layer
    assert counts["encoder"].query_key == 6 * tokens**2 * width
    # A classic figure: ResNet-50 takes 4.09 G multiply-adds at 224 x 224, 0.002 of them in its classifier.
    assert counts["backbone"].convolutions / 1e9 == pytest.approx(4.087 * 800 * 1199 / 224**2, rel=0.005)
    assert sum(part["trainable"] for part in parameters.values()) == 43_472_577


def test_operator_counts_five_per_sample_and_channel():
    attention = MSDeformAttn(32, n_levels=2, n_heads=4, n_points=3).to("meta")
    queries, tokens = torch.zeros(2, 5, 32, device="meta"), torch.zeros(2, 26, 32, device="meta")
    references = torch.zeros(2, 5, 2, 2, device="meta")
    mapping = {torch.ops.dn_detr.ms_deform_attn: bench.operator_flops}
    with torch.no_grad(), bench.FlopCounterMode(display=False, custom_mapping=mapping) as mode:
        attention.requires_grad_(False)(queries, references, tokens, [(4, 5), (2, 3)], [0, 20])
    counts = bench.sort_counts(mode.get_flop_counts()["Global"])
    samples = 2 * 5 * 4 * 2 * 3  # batch, queries, heads, levels, points
    assert counts.operator == 5 * samples * 8
    projections = 2 * 26 * 32 * 32 + 2 * 5 * 32 * (4 * 2 * 3 * 3) + 2 * 5 * 32 * 32
    assert counts.products == projections and counts.convolutions == 0


class Small(nn.Module):
    """A detector's outline: one layer per part, heads outside."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.input_proj = nn.Conv2d(8, 4, 1)
        self.transformer = nn.Module()
        self.transformer.encoder = nn.Sequential(SelfAttention(4, 2))
        self.transformer.decoder = nn.Linear(4, 6)
        self.class_embed = nn.Linear(6, 3)

    def forward(self, images: NestedTensor) -> torch.Tensor:
        tokens = self.input_proj(self.backbone(images.tensors)).flatten(2).transpose(1, 2)
        return self.class_embed(self.transformer.decoder(self.transformer.encoder(tokens)))


def test_parts_are_told_apart():
    model = Small().requires_grad_(False)
    images = bench.make_batch((5, 7), 2, torch.device("cpu"))
    counts = bench.count_multiply_adds(model, images)
    tokens = 2 * 35
    assert counts["backbone"] == bench.Counts(convolutions=tokens * 3 * 8 * 9)
    assert counts["projection"] == bench.Counts(convolutions=tokens * 8 * 4)
    assert counts["encoder"].query_key == tokens * 35 * 4
    assert counts["decoder"] == bench.Counts(products=tokens * 4 * 6)
    assert counts[bench.REST] == bench.Counts(products=tokens * 6 * 3)
    sizes = bench.count_parameters(Small())
    assert {part: size["trainable"] for part, size in sizes.items()} == {
        "backbone": 216, "projection": 36, "encoder": 80, "decoder": 30, bench.REST: 21,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["dab_detr", "deformable_detr"])
def test_command_writes_a_record(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "figures.json"
    command = ["model", "-m", name, "--size", "64", "96", "--batch", "2", "--rounds", "2", "--device", "cpu"]
    assert benchmark.main([*command, "--options", *TINY, "--json", str(target)]) == 0
    record = json.loads(target.read_text())
    assert record["model"] == name and len(record["seconds"]) == 2
    assert set(record["part_seconds"]) == {*bench.PARTS, bench.REST} == set(record["multiply_adds"])
    assert all(seconds > 0 for part, seconds in record["part_seconds"].items() if part != bench.REST)
    assert (record["multiply_adds"]["encoder"]["operator"] > 0) == (name == "deformable_detr")
    output = capsys.readouterr().out
    assert "G multiply-adds" in output and "latency" in output and "resident in the process" in output


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_parts_have_their_own_peak_on_a_gpu() -> None:
    argv = ["-m", "dab_detr", "--backbone_weights", "none", "--options", *TINY]
    record = bench.measure(main.parse_args(argv), (64, 96), 2, torch.device("cuda"), "bfloat16", 2)
    assert set(record["part_peak_bytes"]) == {*bench.PARTS, bench.REST}
    assert record["peak_bytes"] == max(record["part_peak_bytes"].values()) > 0
