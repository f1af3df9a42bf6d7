"""Does a converted encoder compute what its source does: both see one image, through the framework's own network."""

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
from transfer.encoders import EncoderWeights, build_network, converted_from, infer_arch, read_encoder
from transfer.formats import read_detectron2, torchvision_name
from utils import checkpoint
from utils.batch import MEAN, STD
from utils.checkpoint import Weights
from utils.errors import UsageError

TOLERANCE = 1e-5
"""The largest difference between two features, as a share of the largest feature."""

_SIZE = 224
_DEPTHS = {"resnet18": 18, "resnet34": 34, "resnet50": 50, "resnet101": 101, "resnet152": 152}
"""The ResNets that detectron2 and mmseg build from a depth alone."""

Network = Callable[[Tensor], Tensor]


def verify(source: Path, converted: Path, which: str | None, pixels: Tensor, target: str | None = None) -> str:
    """Compare the last feature maps of `source`'s encoder and of `converted`, each fed as its provenance says.

    Then all tensors: in a young network a residual branch may have no part in the features yet.

    Args:
        which: the encoder of `source` to compare, as in `read_encoder`.
        pixels: an image, from `load_image`.
        target: the framework that `converted` has to be for; None for any.

    Returns:
        What was compared, and the largest difference as a share of the largest feature.

    Raises:
        UsageError: they differ by more than TOLERANCE; it says what `converted` holds instead, where that is found.
    """
    encoder = read_encoder(source, which)
    weights, provenance = _read_converted(converted)
    if target and (made := provenance.get("format", target)) != target:
        raise UsageError(f"{converted}: is made for {made}, not for {target}")
    arch = infer_arch(weights, str(converted))
    if arch != encoder.arch:
        raise UsageError(f"{converted}: a {arch}, and {source} is a {encoder.arch}; convert it again")
    inputs = _normalize(pixels, provenance.get("color_order"), provenance.get("mean"), provenance.get("std"))
    network, where = _converted_network(converted, weights, arch, provenance.get("format", ""))
    with torch.inference_mode():
        found = network(inputs)
        difference = _difference(_features(encoder, pixels), found)
        if not difference <= TOLERANCE:
            instead = _diagnose(source, encoder, pixels, found)
            raise UsageError(f"{converted}: its features differ from {source}'s by {difference:.1g}{instead}")
    facts = encoder.provenance
    other_input = any(provenance.get(name, facts[name]) != facts[name] for name in ("color_order", "mean", "std"))
    for name, value in encoder.weights.items():
        if not torch.equal(value, weights[name].to(value.dtype)) and not (other_input and name == _first(weights)):
            raise UsageError(f"{converted}: {name} differs from {source}'s; convert it again")
    return f"features differ by {difference:.1g} of the largest, in {where}"


def _read_converted(path: Path) -> tuple[Weights, dict[str, Any]]:
    """A converted file's weights under torchvision's or timm's names, and its provenance."""
    if path.suffix == ".pkl":
        state = read_detectron2(path)
        arrays = {torchvision_name(name): torch.from_numpy(np.array(value)) for name, value in state["model"].items()}
        return arrays, converted_from(state)
    state = checkpoint.load(path, "converted")
    _, weights = checkpoint.find_encoder(checkpoint.extract_weights(state, str(path)))
    return weights, converted_from(state)


def load_image(image: Path | None = None) -> Tensor:
    """A photograph, or a drawn scene: (1, 3, 224, 224) RGB levels 0..1.

    Raises:
        UsageError: it cannot be read.
    """
    if image is None:
        pixels, _ = render_scene(0, "val", 0, _SIZE, _SIZE)
    else:
        try:
            pixels = np.array(Image.open(image).convert("RGB").resize((_SIZE, _SIZE), Image.Resampling.BICUBIC))
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UsageError(f"--verify {image}: cannot be read as an image ({reason})") from None
    return torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255


def _normalize(pixels: Tensor, color_order: str | None, mean: list[float] | None, std: list[float] | None) -> Tensor:
    """What a network that wants this color order, mean and deviation is fed; RGB and ImageNet's where it is silent."""
    center, scale = (torch.tensor(value).view(1, 3, 1, 1) for value in (mean or MEAN, std or STD))
    return ((pixels.flip(1) if color_order == "BGR" else pixels) - center) / scale


def _features(encoder: EncoderWeights, pixels: Tensor) -> Tensor:
    facts = encoder.provenance
    return _own_network(encoder.arch, encoder.weights)(
        _normalize(pixels, facts["color_order"], facts["mean"], facts["std"])
    )


def _difference(wanted: Tensor, found: Tensor) -> float:
    if wanted.shape != found.shape:
        return float("inf")
    return float((wanted - found).abs().max() / wanted.abs().max())


def _first(weights: Weights) -> str:
    """The layer that sees the colors."""
    return "conv1.weight" if "conv1.weight" in weights else "patch_embed.proj.weight"


def _diagnose(source: Path, encoder: EncoderWeights, pixels: Tensor, found: Tensor) -> str:
    """What else of the source gives these features."""
    first = _first(encoder.weights)
    swapped = encoder.weights | {first: encoder.weights[first].flip(1)}
    others = {"of swapped color channels (RGB and BGR)": replace(encoder, weights=swapped)}
    other = {"teacher": "student", "student": "teacher"}.get(encoder.provenance["encoder"])
    weights = checkpoint.load_weights(source, "checkpoint")
    if other and checkpoint.find_encoder(weights, other)[0] == other:
        others[f"of the {other}"] = read_encoder(source, other)
    for name, candidate in others.items():
        if _difference(_features(candidate, pixels), found) <= TOLERANCE:
            return f": they are those {name}; convert it again"
    return "; convert it again"


def _converted_network(path: Path, weights: Weights, arch: str, target: str) -> tuple[Network, str]:
    """The network that the framework `target` builds from `path`, or this project's where it is not installed."""
    frameworks: dict[str, Callable[[Path, str], Network]] = {
        "timm": _timm_network,
        "mmseg": _mmseg_network,
        "detectron2": _detectron2_network,
    }
    if target == "timm" or (target in frameworks and arch in _DEPTHS):
        try:
            # The frameworks print, and warn of what they stand on.
            with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
                warnings.simplefilter("ignore")
                return frameworks[target](path, arch), f"{target}'s network"
        except ImportError:
            return _own_network(arch, weights), f"this project's network ({target} is not installed)"
        except Exception as error:  # each framework has its own for what does not fit
            raise UsageError(f"{path}: {target} cannot load it ({' '.join(str(error).split())[:200]})") from None
    return _own_network(arch, weights), "this project's network"


def _own_network(arch: str, weights: Weights) -> Network:
    """torchvision's ResNet, or timm's ViT."""
    if arch.startswith("vit"):
        try:
            import timm
        except ImportError:
            raise UsageError(f"comparing a {arch} needs timm; pip install timm") from None
        vit: Any = timm.create_model(arch, num_classes=0)
        vit.load_state_dict(weights)
        return vit.eval().forward_features
    return build_network(EncoderWeights(weights, arch, {}))


def _timm_network(path: Path, arch: str) -> Network:
    import timm

    network: Any = timm.create_model(arch, num_classes=0, checkpoint_path=str(path))
    return network.eval().forward_features


def _mmseg_network(path: Path, arch: str) -> Network:
    import mmseg.models
    from mmengine.runner.checkpoint import load_checkpoint

    network = mmseg.models.ResNet(depth=_DEPTHS[arch], style="pytorch")
    load_checkpoint(network, str(path), map_location="cpu", strict=True)
    network.eval()
    return lambda inputs: network(inputs)[-1]


def _detectron2_network(path: Path, arch: str) -> Network:
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
