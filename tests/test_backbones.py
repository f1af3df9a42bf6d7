"""Encoders: torchvision's and timm's networks and parameter names, as maps of known width and stride."""

import functools
from dataclasses import replace

import pytest
import timm
import torch
import torchvision
from torch import Tensor
from torchvision.models.feature_extraction import create_feature_extractor

from main_pretrain import parse_args
from models import METHODS, build_method
from models.backbones import RESNETS, VITS, build_encoder
from tests.helpers import make_batch, tiny_flags
from utils.errors import UsageError

SMALL_VIT = "vit_tiny_patch16_224"


def library_model(arch: str) -> torch.nn.Module:
    if arch in RESNETS:
        return torchvision.models.get_model(arch, weights=None)
    return timm.create_model(arch, num_classes=0, dynamic_img_size=True)


def images(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_all_architectures_exist_in_their_library() -> None:
    assert set(RESNETS) <= set(torchvision.models.list_models())
    assert set(VITS) <= set(timm.list_models())


@pytest.mark.parametrize(
    ("arch", "width", "stride"),
    [("resnet18", 512, 32), ("resnext50_32x4d", 2048, 32), (SMALL_VIT, 192, 16), ("vit_large_patch14_224", 1024, 14)],
)
def test_encoders_have_the_parameter_names_of_their_library_and_state_their_map(
    arch: str, width: int, stride: int
) -> None:
    with torch.device("meta"):
        encoder, model = build_encoder(arch), library_model(arch)
        features = encoder(torch.zeros(2, 3, 3 * stride, 5 * stride))
    expected = {name: value.shape for name, value in model.state_dict().items() if not name.startswith("fc.")}
    assert {name: value.shape for name, value in encoder.state_dict().items()} == expected
    assert (encoder.width, encoder.stride) == (width, stride)
    assert features.shape == (2, width, 3, 5)


@pytest.mark.parametrize(("patch_size", "grid"), [(32, 7), (14, 16), (20, 11)])
def test_the_patch_size_of_a_vit_is_in_its_name(patch_size: int, grid: int) -> None:
    with torch.device("meta"):
        encoder = build_encoder(f"vit_tiny_patch{patch_size}_224")
        features = encoder(torch.zeros(1, 3, 3 * patch_size, 2 * patch_size))
    assert encoder.state_dict()["patch_embed.proj.weight"].shape == (192, 3, patch_size, patch_size)
    assert encoder.state_dict()["pos_embed"].shape == (1, 1 + grid**2, 192)
    assert (encoder.stride, features.shape) == (patch_size, (1, 192, 3, 2))


def test_dilated_resnets_compute_the_same_features_at_more_positions() -> None:
    encoder = build_encoder("resnet50").double().eval()
    for name, parameter in encoder.named_parameters():
        if name.endswith("bn3.weight"):  # otherwise every residual block is the identity
            parameter.data.fill_(0.3)
    expected = encoder(images(1, 3, 64, 96))
    for output_stride, step in ((16, 2), (8, 4)):
        dilated = build_encoder("resnet50", output_stride).double().eval()
        dilated.load_state_dict(encoder.state_dict())
        features = dilated(images(1, 3, 64, 96))
        assert dilated.stride == output_stride
        assert features.shape == (1, 2048, 64 // output_stride, 96 // output_stride)
        torch.testing.assert_close(features[:, :, ::step, ::step], expected, rtol=1e-9, atol=1e-9)


def test_resnet_computes_the_last_map_of_torchvision() -> None:
    encoder, model = build_encoder("resnet18").double(), library_model("resnet18").double()
    model.load_state_dict(encoder.state_dict() | {f"fc.{name}": value for name, value in model.fc.state_dict().items()})
    expected = create_feature_extractor(model.train(), ["layer4"])(images(2, 3, 64, 96))["layer4"]
    torch.testing.assert_close(encoder.train()(images(2, 3, 64, 96)), expected, rtol=0, atol=1e-10)


def test_residual_blocks_start_as_the_identity() -> None:
    encoder = build_encoder("resnet18")
    assert all((value == 0).all() for name, value in encoder.named_parameters() if name.endswith("bn2.weight"))


@functools.cache
def small_vit() -> torch.nn.Module:
    return build_encoder(SMALL_VIT).double().eval()


def test_vit_returns_the_patch_tokens_of_timm_as_a_map() -> None:
    model = library_model(SMALL_VIT).double().eval()
    model.load_state_dict(small_vit().state_dict())
    with torch.no_grad():
        features = small_vit()(images(1, 3, 224, 224))
        tokens = model.forward_features(images(1, 3, 224, 224))
    assert features.shape == (1, 192, 14, 14)
    for row in range(14):
        for column in range(14):
            token = tokens[0, 1 + row * 14 + column]
            torch.testing.assert_close(features[0, :, row, column], token, rtol=0, atol=1e-10)


def test_vit_takes_images_of_any_multiple_of_the_patch_size() -> None:
    with torch.no_grad():
        assert small_vit()(images(1, 3, 64, 96)).shape == (1, 192, 4, 6)


def test_drop_path_grows_linearly_over_the_blocks_of_a_vit() -> None:
    with torch.device("meta"):
        blocks = build_encoder(SMALL_VIT, drop_path=0.1).blocks
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in blocks]
    assert rates == pytest.approx([0.1 * i / 11 for i in range(12)])


@pytest.mark.parametrize(
    ("arch", "options", "message"),
    [
        (SMALL_VIT, {"output_stride": 16}, "--output-stride 16: the stride of a vit_tiny_patch16_224 is its patch"),
        ("resnet18", {"output_stride": 8}, "--output-stride 8: resnet18 cannot be dilated"),
        ("resnet50", {"drop_path": 0.1}, "--drop-path 0.1: only ViTs have it"),
        ("resnet51", {}, "--arch resnet51: unknown"),
    ],
)
def test_impossible_encoders_are_refused_in_one_line(arch: str, options: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        build_encoder(arch, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_a_vit(name: str) -> None:
    torch.manual_seed(0)
    args = parse_args(tiny_flags("--method", name, "--arch", SMALL_VIT, "--drop-path", "0"))
    method = build_method(args).train()
    batch = make_batch(2, [recipe.size for recipe in method.view_recipes(args)])
    method(replace(batch, step=1))["loss"].backward()
    for parameter_name, parameter in method.encoder_q.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
    assert (method.encoder_q.patch_embed.proj.weight.grad != 0).any()
    assert all(parameter.grad is None for parameter in method.encoder_k.parameters())
