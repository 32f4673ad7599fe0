"""Backbones: reference features, official names, freezing, dilation, cut stages, weights from files, timm models."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from models.backbones import FrozenBatchNorm2d, Joiner, build_backbone
from models.backbones.frozen_batch_norm import freeze_batch_norm
from models.backbones.pretrained import fetch_once
from models.layers.position_encoding import build_position_encoding
from tests.golden_recipe import assert_probe, images_of, load_json, load_meta, load_npz, load_recipe_weights
from util.errors import CheckpointError, OptionError
from util.nested_tensor import nested_tensor_from_tensor_list


def build(name: str = "resnet18", **changes: Any) -> Joiner:
    options: dict[str, Any] = {
        "position_encoding": build_position_encoding("sine", 64),
        "weights": "none",
        "train": True,
        "norm": "BatchNorm2d",
        "dilation": False,
        "return_levels": 1,
    }
    return build_backbone(name=name, **{**options, **changes})


def body_of(joiner: Joiner) -> Any:
    return joiner[0].body


def random_images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 64, 96, generator=generator), torch.randn(3, 40, 70, generator=generator)]


def test_frozen_batch_norm_equals_reference() -> None:
    arrays = load_npz("functions.npz")
    names = ("weight", "bias", "running_mean", "running_var")
    norm = FrozenBatchNorm2d(4)
    norm.load_state_dict({name: torch.from_numpy(arrays[f"frozen_bn/{name}"]) for name in names})
    actual = norm(torch.from_numpy(arrays["frozen_bn/in"]))
    # Two float32 operations per value.
    torch.testing.assert_close(actual, torch.from_numpy(arrays["frozen_bn/out"]), rtol=1e-6, atol=1e-6)


def test_frozen_batch_norm_is_twin_of_evaluated_batch_norm() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(6, eps=1e-3)
    nn.init.uniform_(norm.weight)
    nn.init.uniform_(norm.bias)
    for _ in range(3):
        norm(torch.randn(4, 6, 5, 5) * 2 + 1)
    frozen = freeze_batch_norm(norm)
    assert list(frozen.state_dict()) == ["weight", "bias", "running_mean", "running_var"]
    assert not list(frozen.parameters())
    x = torch.randn(2, 6, 3, 4, requires_grad=True)
    expected = norm.eval()(x)
    # The same affine map with its factors multiplied in another order.
    torch.testing.assert_close(frozen(x), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (frozen(x), expected)))
    # A checkpoint of the trainable norm has a batch counter; frozen statistics take the rest.
    FrozenBatchNorm2d(6).load_state_dict(norm.state_dict(), strict=True)


def test_frozen_batch_norm_keeps_dtype_and_input() -> None:
    norm = FrozenBatchNorm2d(3)
    x = torch.ones(1, 3, 2, 2, dtype=torch.bfloat16)
    assert norm(x).dtype == torch.bfloat16
    assert torch.equal(x, torch.ones_like(x))


@pytest.mark.parametrize(
    ("stored", "options"),
    [
        ("dn_dab_detr_r18", {"name": "resnet18"}),
        ("deformable_detr_r50", {"name": "resnet50", "return_levels": 3}),
        ("deformable_detr_r50_single_scale_dc5", {"name": "resnet50", "dilation": True}),
    ],
)
def test_features_masks_and_encodings_equal_reference(stored: str, options: dict[str, Any]) -> None:
    arrays = load_npz(f"small/{stored}.npz")
    meta = load_meta(arrays)
    deformable = stored.startswith("deformable")
    encoding = build_position_encoding(
        "sine",
        64 if deformable else 256,
        temperature_h=10000 if deformable else 20,
        temperature_w=10000 if deformable else 20,
        half_pixel_shift=deformable,
    )
    joiner = build(norm="FrozenBatchNorm2d", position_encoding=encoding, **options).eval()
    load_recipe_weights(joiner, meta["salt"], prefix="backbone.")
    with torch.no_grad():
        features, positions = joiner(nested_tensor_from_tensor_list(images_of(meta)))
    assert len(features) == len(positions) == options.get("return_levels", 1)
    for index, (feature, position) in enumerate(zip(features, positions, strict=True)):
        # Values up to 8 after 50 float32 convolutions; another order of their sums moves them by about 5e-6.
        assert_probe(arrays, f"eval/probe/backbone_feature{index}", feature.tensors, rtol=1e-4, atol=2e-5)
        assert_probe(arrays, f"eval/probe/pos{index}", position, rtol=0, atol=1e-5)
        assert torch.equal(feature.mask, torch.from_numpy(arrays[f"eval/probe/mask{index}"]))


@pytest.mark.parametrize(
    ("stored", "name"),
    [("dn_dab_detr_r18", "resnet18"), ("dn_dab_detr_r50", "resnet50"), ("dn_dab_detr_r101_dc5_3pat", "resnet101")],
)
def test_resnet_has_official_names_and_order(stored: str, name: str) -> None:
    golden = load_json(f"state_dict/{stored}.json")
    expected = [(key, shape) for key, shape, _ in golden["state_dict"] if key.startswith("backbone.")]
    detector = nn.Module()
    detector.backbone = build(name, norm="FrozenBatchNorm2d")
    assert [(key, list(value.shape)) for key, value in detector.state_dict().items()] == expected


def test_pretrained_resnet_freezes_what_the_reference_freezes(tmp_path: Path) -> None:
    golden = load_json("state_dict/dn_dab_detr_r18.json")
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "weights.pth")
    detector = nn.Module()
    detector.backbone = build(norm="FrozenBatchNorm2d", weights=str(tmp_path / "weights.pth"))
    frozen = [name for name, parameter in detector.named_parameters() if not parameter.requires_grad]
    assert frozen == [name for name in golden["frozen_parameters"] if name.startswith("backbone.")]


@pytest.mark.parametrize("name", ["resnet18", "resnet34"])
def test_resnet_without_frozen_norm_equals_torchvision(name: str) -> None:
    torch.manual_seed(0)
    joiner = build(name, return_levels=4).eval()
    reference = torchvision.models.get_model(name, weights=None).eval()
    missing = reference.load_state_dict(body_of(joiner).state_dict(), strict=False)
    assert missing.missing_keys == ["fc.weight", "fc.bias"] and not missing.unexpected_keys
    images = torch.stack(random_images()[:1])
    x = reference.maxpool(reference.relu(reference.bn1(reference.conv1(images))))
    for stage, actual in zip(("layer1", "layer2", "layer3", "layer4"), body_of(joiner)(images), strict=True):
        x = reference.get_submodule(stage)(x)
        assert torch.equal(actual, x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_folding_frozen_norms_changes_no_feature_and_no_gradient(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    body = body_of(build(name, norm="FrozenBatchNorm2d", return_levels=4, train=True))
    for module in body.modules():
        if isinstance(module, FrozenBatchNorm2d):
            # Statistics that matter; weights that keep sums over many blocks small.
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
            module.weight.uniform_(0.1, 0.5)
            module.bias.normal_(std=0.1)
    body.to(torch.float64 if dtype == torch.float64 else torch.float32)
    images = torch.randn(2, 3, 40, 56, dtype=body.conv1.weight.dtype)
    parameters = [parameter for parameter in body.parameters() if parameter.requires_grad]

    def compute() -> tuple[list[Tensor], tuple[Tensor, ...]]:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            maps = body(images)
        assert all(each.dtype == dtype for each in maps)
        return maps, torch.autograd.grad(sum(each.double().square().mean() for each in maps), parameters)

    maps, gradients = compute()
    monkeypatch.setattr("models.backbones.resnet.frozen_affines", lambda pairs: {})
    expected_maps, expected_gradients = compute()
    # In float64 only the order of products differs. bfloat16 has 8 bits, and up to 53 layers round.
    share = 1e-10 if dtype == torch.float64 else 0.1
    for got, expected in zip((*maps, *gradients), (*expected_maps, *expected_gradients), strict=True):
        assert (got - expected).norm() <= share * expected.norm()


def test_dilation_of_bottlenecks_equals_torchvision() -> None:
    joiner = build("resnet50", dilation=True)
    reference = torchvision.models.resnet50(replace_stride_with_dilation=[False, False, True])
    for name, module in reference.named_modules():
        if isinstance(module, nn.Conv2d):
            own = body_of(joiner).get_submodule(name)
            assert (own.stride, own.dilation, own.padding) == (module.stride, module.dilation, module.padding), name
    assert joiner.strides == [16]


@pytest.mark.parametrize("name", ["resnet18", "resnet34"])
def test_dilation_of_basic_blocks_sees_the_same_pixels_more_densely(name: str) -> None:
    torch.manual_seed(0)
    plain, dilated = build(name).eval(), build(name, dilation=True).eval()
    dilated.load_state_dict(plain.state_dict())
    stage, dense_stage = body_of(plain).layer4, body_of(dilated).layer4
    x = torch.randn(1, 256, 12, 16)
    # Every other pixel reads what the strided stage reads, also at the border, because zero padding is as wide as the
    # dilation. Sums of 4,608 float32 products in another order.
    torch.testing.assert_close(dense_stage(x)[:, :, ::2, ::2], stage(x), rtol=1e-4, atol=1e-4)
    assert dense_stage(x).shape == (1, 512, 12, 16)


@pytest.mark.parametrize(("num_stages", "return_levels"), [(1, 1), (2, 1), (3, 1), (3, 3), (4, 2), (4, 4)])
def test_cut_stages_leave_no_parameters(num_stages: int, return_levels: int) -> None:
    joiner = build(num_stages=num_stages, return_levels=return_levels)
    stages = {name.split(".")[2] for name, _ in joiner.named_parameters() if ".layer" in name}
    assert stages == {f"layer{index}" for index in range(1, num_stages + 1)}
    kept = slice(num_stages - return_levels, num_stages)
    assert joiner.strides == [4, 8, 16, 32][kept]
    assert joiner.num_channels == [64, 128, 256, 512][kept]
    features, positions = joiner(nested_tensor_from_tensor_list(random_images()))
    for feature, position, channels, stride in zip(
        features, positions, joiner.num_channels, joiner.strides, strict=True
    ):
        assert feature.tensors.shape == (2, channels, 64 // stride, 96 // stride)
        assert position.shape == (2, 64, 64 // stride, 96 // stride)
        # The second image, 40 x 70 pixels, covers the feature pixels whose first pixel lies inside it.
        rows, columns = -(-40 // stride), -(-70 // stride)
        assert not feature.mask[1, :rows, :columns].any() and int((~feature.mask[1]).sum()) == rows * columns


def trainable_stages(joiner: Joiner) -> set[str]:
    return {name.split(".")[2] for name, parameter in joiner.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("norm", ["FrozenBatchNorm2d", "SyncBatchNorm", "BatchNorm2d"])
def test_pretrained_resnet_trains_from_second_stage(norm: str, tmp_path: Path) -> None:
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "weights.pth")
    pretrained = str(tmp_path / "weights.pth")
    assert trainable_stages(build(norm=norm, weights=pretrained)) == {"layer2", "layer3", "layer4"}
    assert trainable_stages(build(norm=norm, weights=pretrained, train=False)) == set()
    from_scratch = {"conv1", "bn1", "layer1", "layer2", "layer3", "layer4"}
    official = {"layer2", "layer3", "layer4"}
    assert trainable_stages(build(norm=norm)) == (official if norm == "FrozenBatchNorm2d" else from_scratch)
    assert trainable_stages(build(norm=norm, train=False)) == set()


def test_norm_type_decides_every_norm() -> None:
    for norm, kind in (("SyncBatchNorm", nn.SyncBatchNorm), ("BatchNorm2d", nn.BatchNorm2d)):
        kinds = {type(module) for module in build(norm=norm).modules() if "Norm" in type(module).__name__}
        assert kinds == {kind}


def test_frozen_norm_keeps_its_statistics_in_training(tmp_path: Path) -> None:
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "weights.pth")
    joiner = build(weights=str(tmp_path / "weights.pth"))
    before = {name: value.clone() for name, value in joiner.state_dict().items()}
    joiner(nested_tensor_from_tensor_list(random_images()))
    moved = {name.split(".")[2] for name, value in joiner.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"layer2", "layer3", "layer4"}


def test_freeze_keywords_stop_matching_parameters_only() -> None:
    joiner = build(freeze_keywords=("layer3", "bn1"))
    for name, parameter in joiner.named_parameters():
        assert parameter.requires_grad == ("layer3" not in name and "bn1" not in name), name
    with pytest.raises(OptionError, match=r"no backbone parameter has 'layer9'.*conv1\.weight"):
        build(freeze_keywords=("layer9",))


def test_frozen_random_norm_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        build(norm="BatchNorm2d")
        assert not caplog.records
        build(norm="FrozenBatchNorm2d")
    assert len(caplog.records) == 1 and "does not learn" in caplog.text


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_come_from_file(suffix: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    source = torchvision.models.resnet18().state_dict()
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save(source, path)
    else:
        save_file(source, path)
    for num_stages in (4, 3):
        for norm in ("FrozenBatchNorm2d", "BatchNorm2d"):
            body = body_of(build(weights=str(path), norm=norm, num_stages=num_stages))
            assert all(torch.equal(value, source[name]) for name, value in body.state_dict().items())


def test_unfit_weights_are_refused_with_a_reason(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"found no file: pass 'imagenet', 'none' or the path"):
        build(weights=str(tmp_path / "absent.pth"))
    source = torchvision.models.resnet18().state_dict()
    for content, problem in (
        ({name: value for name, value in source.items() if name != "conv1.weight"}, r"lacks 1 tensors.*conv1\.weight"),
        ({**source, "layer1.7.conv1.weight": torch.zeros(1)}, r"has unknown 1 tensors.*layer1\.7"),
        ({**source, "conv1.weight": torch.zeros(64, 4, 7, 7)}, r"has other shapes for 1 tensors.*conv1\.weight"),
        ({"model": source}, "flat dictionary of tensors"),
    ):
        torch.save(content, tmp_path / "weights.pth")
        with pytest.raises(CheckpointError, match=problem):
            build(weights=str(tmp_path / "weights.pth"))
    torch.save({"conv1.weight": Path("/")}, tmp_path / "pickle.pth")
    with pytest.raises(CheckpointError, match="arbitrary unpickling"):
        build(weights=str(tmp_path / "pickle.pth"))


def test_failed_download_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise URLError("no route")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)
    with pytest.raises(CheckpointError, match=r"resnet18.*no route.*checkpoints.*--backbone_weights FILE.*none"):
        build(weights="imagenet")


def test_imagenet_weights_are_read_from_hub_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    torch.manual_seed(2)
    source = torchvision.models.resnet18().state_dict()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    file_name = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url.rsplit("/", 1)[1]
    torch.save(source, cache / file_name)
    body = body_of(build(weights="imagenet", norm="FrozenBatchNorm2d"))
    assert all(torch.equal(value, source[name]) for name, value in body.state_dict().items())


@pytest.mark.parametrize("main_process", [True, False])
def test_first_process_fetches_before_the_others(main_process: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    def fetch() -> str:
        events.append("fetch")
        return "weights"

    def fail() -> str:
        raise OSError("disk full")

    monkeypatch.setattr("models.backbones.pretrained.is_main_process", lambda: main_process)
    monkeypatch.setattr("models.backbones.pretrained.barrier", lambda: events.append("barrier"))
    assert fetch_once(fetch, "weights") == "weights"
    assert events == (["fetch", "barrier"] if main_process else ["barrier", "fetch"])
    events.clear()
    with pytest.raises(CheckpointError, match="disk full"):
        fetch_once(fail, "weights")
    # The others must not wait for a process that gave up.
    assert events == ["barrier"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "resnet19"}, "use timm:NAME"),
        ({"norm": "LayerNorm"}, "expected a batch norm of"),
        ({"name": "timm:resnet18", "norm": "LayerNorm"}, "expected a batch norm of"),
        ({"num_stages": 2, "return_levels": 3}, "3 maps of 2 stages"),
        ({"num_stages": 5}, "stages <= 4"),
        ({"num_stages": 3, "dilation": True}, "--dilation changes the fourth stage"),
        ({"name": "timm:resnet18", "num_stages": 3, "dilation": True}, "--dilation changes the fourth stage"),
        ({"name": "timm:resnet9000"}, r"got 'resnet9000'"),
        ({"name": "timm:test_vit", "dilation": True}, "cannot dilate"),
        ({"name": "timm:resnet18", "num_stages": 1, "return_levels": 3}, "expected 3 feature maps of timm:resnet18"),
    ],
)
def test_options_that_cannot_be_honoured_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        build(**changes)


TIMM_CASES = [
    ("resnet18", {"return_levels": 3}, [8, 16, 32], [128, 256, 512]),
    ("resnet18", {"dilation": True}, [16], [512]),
    ("resnet18", {"num_stages": 3}, [16], [256]),
    ("test_efficientnet", {}, [32], None),
    ("test_vit", {}, [16], [64]),
    ("swin_tiny_patch4_window7_224", {"return_levels": 2, "num_stages": 2}, [4, 8], [96, 192]),
]


@pytest.mark.parametrize(("name", "options", "strides", "channels"), TIMM_CASES)
def test_timm_backbone_gives_stated_maps_and_trains(
    name: str, options: dict[str, Any], strides: list[int], channels: list[int] | None
) -> None:
    torch.manual_seed(0)
    joiner = build(f"timm:{name}", norm="FrozenBatchNorm2d", **options)
    assert joiner.strides == strides
    assert channels is None or joiner.num_channels == channels
    assert not any(isinstance(module, nn.BatchNorm2d) for module in joiner.modules())
    # Sizes that no model was trained with and that no stride divides.
    features, positions = joiner(nested_tensor_from_tensor_list([torch.randn(3, 72, 104), torch.randn(3, 40, 104)]))
    for feature, position, stride, width in zip(features, positions, strides, joiner.num_channels, strict=True):
        size = (-(-72 // stride), -(-104 // stride))
        assert feature.tensors.shape == (2, width, *size)
        assert feature.mask.shape == (2, *size) and position.shape == (2, 64, *size)
        assert feature.mask[1].any() and not feature.mask[0].any()
    sum(feature.tensors.square().mean() for feature in features).backward()
    assert [key for key, parameter in joiner.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("name", ["resnet18", "test_efficientnet"])
def test_timm_frozen_norm_computes_what_the_evaluated_model_computes(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = timm.create_model(name)
    source(torch.randn(4, 3, 64, 64))
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    joiner = build(f"timm:{name}", norm="FrozenBatchNorm2d", weights=str(tmp_path / "weights.pth")).eval()
    reference = timm.create_model(name, features_only=True, out_indices=(-1,))
    reference.load_state_dict(source.state_dict(), strict=False)
    images = torch.stack(random_images()[:1])
    expected = reference.eval()(images)[0]
    # Frozen norms multiply their factors in another order, a dozen layers deep.
    torch.testing.assert_close(body_of(joiner)(images)[0], expected, rtol=1e-4, atol=1e-5)


def test_timm_norm_types_and_freezing() -> None:
    synced = build("timm:resnet18", norm="SyncBatchNorm", train=False)
    norms = [module for module in synced.modules() if "Norm" in type(module).__name__]
    assert norms and all(isinstance(module, nn.SyncBatchNorm) for module in norms)
    assert not any(parameter.requires_grad for parameter in synced.parameters())


def test_timm_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=r"120 tensors of timm:resnet18 in .*weights\.pth.*'conv1\.weight'"):
        build("timm:resnet18", weights=str(tmp_path / "weights.pth"))


def test_mask_resizing_matches_float_interpolation_without_batch_mixing() -> None:
    joiner = build(num_stages=3)
    samples = nested_tensor_from_tensor_list([torch.zeros(3, 33, 70), torch.zeros(3, 64, 31)])
    mask = joiner(samples)[0][0].mask
    for index in range(2):
        alone = F.interpolate(samples.mask[index][None, None].float(), size=mask.shape[-2:])[0, 0].bool()
        assert torch.equal(mask[index], alone)
