"""Check that a converted encoder computes the same features as its source, through the framework's own network."""

import io
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.demo import render_scene
from transfer.encoders import EncoderWeights, build_frozen_encoder, infer_arch, read_encoder, read_provenance
from utils import checkpoint
from utils.batch import MEAN, STD
from utils.checkpoint import Weights
from utils.errors import UsageError

TOLERANCE = 1e-5
"""The largest accepted difference between two features, as a fraction of the largest feature."""

_IMAGE_SIZE = 224
_DEPTHS = {"resnet18": 18, "resnet34": 34, "resnet50": 50, "resnet101": 101, "resnet152": 152}
"""The ResNets that detectron2 and mmseg build from a depth."""

FeatureFunction = Callable[[Tensor], Tensor]
"""Normalized images (B, 3, H, W) -> the last feature map, or a ViT's tokens."""


def verify(
    source: Path,
    converted: Path,
    which: str | None,
    pixels: Tensor,
    target: str | None = None,
    flags: tuple[str, str] = ("checkpoint", "converted"),
) -> str:
    """Compare the last feature maps of two encoders, each with the normalization that its provenance names.

    All tensors are compared as well, because some, such as the counters of batch norm, do not change the features.

    Args:
        source: the checkpoint that was converted.
        converted: the result.
        which: the encoder of `source`, as in `read_encoder`.
        pixels: an image, from `load_image`.
        target: the format that `converted` must have; None for any.
        flags: the arguments that name `source` and `converted`, for messages about files that cannot be read.

    Returns:
        A line with the largest difference, as a fraction of the largest feature, and with the network that was used.

    Raises:
        UsageError: the difference exceeds TOLERANCE; the message names the cause if it is recognized.
    """
    encoder = read_encoder(source, which, flags[0])
    weights, provenance = _read_converted(converted, flags[1])
    if target and (made_for := provenance.get("format", target)) != target:
        raise UsageError(f"{converted}: is made for {made_for}, not for {target}; use convert.py with --to {made_for}")
    arch = infer_arch(weights, str(converted))
    if arch != encoder.arch:
        raise UsageError(f"{converted}: a {arch}, and {source} is a {encoder.arch}; convert it again")
    network, description = _converted_network(converted, weights, arch, provenance.get("format", ""))
    with torch.inference_mode():
        features = network(_normalize(pixels, provenance))
        difference = _max_difference(features, _compute_features(encoder, pixels))
        if not difference <= TOLERANCE:  # also if it is not a number
            cause = _diagnose(source, encoder, pixels, features)
            raise UsageError(f"{converted}: its features differ from {source}'s by {difference:.1g}{cause}")
    _check_tensors(source, converted, encoder, weights, provenance)
    return f"features differ by {difference:.1g} of the largest, in {description}"


def _check_tensors(
    source: Path, converted: Path, encoder: EncoderWeights, weights: Weights, provenance: dict[str, Any]
) -> None:
    """Compare all tensors; the first layer is left out if the two networks expect different inputs."""
    same_input = all(
        provenance.get(name, encoder.provenance[name]) == encoder.provenance[name]
        for name in ("color_order", "mean", "std")
    )
    for name, value in encoder.weights.items():
        compared = same_input or name != _first_layer(weights)
        if compared and not torch.equal(value, weights[name].to(value.dtype)):
            raise UsageError(f"{converted}: {name} differs from {source}'s; convert it again")


def _read_converted(path: Path, flag: str) -> tuple[Weights, dict[str, Any]]:
    """Return a converted file's weights, by torchvision's or timm's names, and its provenance."""
    state = checkpoint.load(path, flag)
    _, weights = checkpoint.find_encoder(checkpoint.extract_weights(state, f"{flag} {path}"))
    return weights, read_provenance(state)


def load_image(image: Path | None = None) -> Tensor:
    """Return an image, or a rendered scene if None, as RGB values in [0, 1]: (1, 3, 224, 224).

    Raises:
        UsageError: the file cannot be read.
    """
    if image is None:
        pixels, _ = render_scene(0, "val", 0, _IMAGE_SIZE, _IMAGE_SIZE)
    else:
        try:
            resized = Image.open(image).convert("RGB").resize((_IMAGE_SIZE, _IMAGE_SIZE), Image.Resampling.BICUBIC)
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UsageError(f"--verify {image}: cannot be read as an image ({reason})") from None
        pixels = np.array(resized)
    return torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255


def _normalize(pixels: Tensor, provenance: dict[str, Any]) -> Tensor:
    """Normalize RGB values (B, 3, H, W) as the provenance says; by default RGB with ImageNet's mean and deviation."""
    mean, std = (torch.tensor(provenance.get(name, default)) for name, default in (("mean", MEAN), ("std", STD)))
    ordered = pixels.flip(1) if provenance.get("color_order") == "BGR" else pixels
    return (ordered - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)


def _compute_features(encoder: EncoderWeights, pixels: Tensor) -> Tensor:
    return _own_network(encoder)(_normalize(pixels, encoder.provenance))


def _max_difference(features: Tensor, expected: Tensor) -> float:
    """Return the largest difference as a fraction of the largest expected feature; infinity if the shapes differ."""
    if expected.shape != features.shape:
        return float("inf")
    return float((expected - features).abs().max() / expected.abs().max())


def _first_layer(weights: Weights) -> str:
    """Return the name of the weights that are applied to the color channels."""
    return "conv1.weight" if "conv1.weight" in weights else "patch_embed.proj.weight"


def _diagnose(source: Path, encoder: EncoderWeights, pixels: Tensor, features: Tensor) -> str:
    """Return the cause of a difference: swapped color channels or the source's other encoder; else only an advice."""
    first = _first_layer(encoder.weights)
    swapped = encoder.weights | {first: encoder.weights[first].flip(1)}
    candidates = {"of swapped color channels (RGB and BGR)": replace(encoder, weights=swapped)}
    other = {"teacher": "student", "student": "teacher"}.get(encoder.provenance["encoder"])
    weights = checkpoint.load_weights(source, "checkpoint")
    if other and checkpoint.find_encoder(weights, other)[0] == other:
        candidates[f"of the {other}"] = read_encoder(source, other)
    for name, candidate in candidates.items():
        if _max_difference(features, _compute_features(candidate, pixels)) <= TOLERANCE:
            return f": they are those {name}; convert it again"
    return "; convert it again"


def _converted_network(path: Path, weights: Weights, arch: str, target: str) -> tuple[FeatureFunction, str]:
    """Return the framework's network, or this project's if the framework is not installed, and a description of it."""
    own = EncoderWeights(weights, arch, {})
    frameworks: dict[str, Callable[[Path, str], FeatureFunction]] = {
        "timm": _timm_network,
        "mmseg": _mmseg_network,
        "detectron2": _detectron2_network,
    }
    if target == "timm" or (target in frameworks and arch in _DEPTHS):
        try:
            # The frameworks print, and warn about their own dependencies.
            with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
                warnings.simplefilter("ignore")
                return frameworks[target](path, arch), f"{target}'s network"
        except ImportError:
            return _own_network(own), f"this project's network ({target} is not installed)"
        except Exception as error:  # every framework raises its own
            raise UsageError(f"{path}: {target} cannot load it ({' '.join(str(error).split())[:200]})") from None
    return _own_network(own), "this project's network"


def _own_network(encoder: EncoderWeights) -> FeatureFunction:
    """Return this project's network as a function; for a ViT it returns all tokens, as timm's network does."""
    network: Any = build_frozen_encoder(encoder)
    return getattr(network, "forward_features", network)


def _timm_network(path: Path, arch: str) -> FeatureFunction:
    import timm

    network: Any = timm.create_model(arch, num_classes=0, checkpoint_path=str(path))
    return network.eval().forward_features


def _mmseg_network(path: Path, arch: str) -> FeatureFunction:
    import mmseg.models
    from mmengine.runner.checkpoint import load_checkpoint

    network = mmseg.models.ResNet(depth=_DEPTHS[arch], style="pytorch")
    load_checkpoint(network, str(path), map_location="cpu", strict=True)
    network.eval()
    return lambda inputs: network(inputs)[-1]


def _detectron2_network(path: Path, arch: str) -> FeatureFunction:
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.config import get_cfg
    from detectron2.layers import ShapeSpec
    from detectron2.modeling import build_backbone

    config = get_cfg()
    config.MODEL.DEVICE = "cpu"
    config.MODEL.BACKBONE.NAME = "build_resnet_backbone"
    config.MODEL.RESNETS.DEPTH = _DEPTHS[arch]
    config.MODEL.RESNETS.OUT_FEATURES = ["res5"]
    config.MODEL.RESNETS.NORM = "BN"
    config.MODEL.RESNETS.STRIDE_IN_1X1 = False
    config.MODEL.RESNETS.RES2_OUT_CHANNELS = 64 if arch in ("resnet18", "resnet34") else 256
    network = build_backbone(config, ShapeSpec(channels=3))
    DetectionCheckpointer(network).load(str(path))
    network.eval()
    return lambda inputs: network(inputs)["res5"]
