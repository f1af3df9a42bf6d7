"""Check that a converted encoder computes the same features as its source, through the framework's own network."""

import io
import warnings
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.demo import render_scene
from models.backbones import is_vit, vit_patch_size
from transfer.encoders import EncoderWeights, build_frozen_encoder, infer_arch, read_encoder, read_provenance
from transfer.framework_networks import FeatureFunction, has_network, load_network
from utils import checkpoint
from utils.batch import MEAN, STD
from utils.checkpoint import Weights
from utils.errors import UsageError
from utils.vit_names import detectron2_vit_name

TOLERANCE = 1e-5
"""The largest accepted difference between two features, as a fraction of the largest feature."""

_IMAGE_SIZE = 224


def verify(
    source: Path,
    converted: Path,
    which: str | None,
    pixels: Tensor,
    target: str | None = None,
    flags: tuple[str, str] = ("checkpoint", "converted"),
) -> str:
    """Compare the last feature maps of two encoders, each with the normalization that its provenance names.

    All tensors are compared as well, because some, such as the counters of batch norm, do not change the features. A
    ViT of detectron2 has no class token and no final norm, and is compared with the source without them.

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
    made_for = provenance.get("format", "")
    if target and made_for and made_for != target:
        raise UsageError(f"{converted}: is made for {made_for}, not for {target}; use convert.py with --to {made_for}")
    weights = _complete(source, converted, encoder, weights, made_for)
    pixels = _crop_to_patches(pixels, encoder.arch)
    network, description = _converted_network(converted, EncoderWeights(weights, encoder.arch, {}), made_for)
    with torch.inference_mode():
        features = network(_normalize(pixels, provenance))
        difference = _max_difference(features, _compute_features(encoder, pixels, made_for))
        if not difference <= TOLERANCE:  # also if it is not a number
            cause = _diagnose(source, encoder, pixels, features, made_for)
            raise UsageError(f"{converted}: its features differ from {source}'s by {difference:.1g}{cause}")
    _check_tensors(source, converted, encoder, weights, provenance)
    return f"features differ by {difference:.1g} of the largest, in {description}"


def _complete(source: Path, converted: Path, encoder: EncoderWeights, weights: Weights, target: str) -> Weights:
    """Return converted weights with those of the source that a ViT of detectron2 does not have.

    Raises:
        UsageError: the weights are incomplete or of another architecture than the source.
    """
    if _is_detectron2_vit(encoder.arch, target):
        expected = {name: value for name, value in encoder.weights.items() if detectron2_vit_name(name)}
        if mismatch := checkpoint.first_mismatch(weights, expected):
            raise UsageError(f"{converted}: not the {encoder.arch} of {source} ({mismatch}); convert it again")
        return encoder.weights | weights
    arch = infer_arch(weights, str(converted))
    if arch != encoder.arch:
        raise UsageError(f"{converted}: a {arch}, and {source} is a {encoder.arch}; convert it again")
    return weights


def _is_detectron2_vit(arch: str, target: str) -> bool:
    return target == "detectron2" and is_vit(arch)


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


def _crop_to_patches(pixels: Tensor, arch: str) -> Tensor:
    """Crop a square image to the whole patches that a ViT has position embeddings for."""
    patch_size = vit_patch_size(arch) if is_vit(arch) else 1
    size = pixels.shape[-1] // patch_size * patch_size
    return pixels[..., :size, :size]


def _normalize(pixels: Tensor, provenance: dict[str, Any]) -> Tensor:
    """Normalize RGB values (B, 3, H, W) as the provenance says; by default RGB with ImageNet's mean and deviation."""
    mean, std = (torch.tensor(provenance.get(name, default)) for name, default in (("mean", MEAN), ("std", STD)))
    ordered = pixels.flip(1) if provenance.get("color_order") == "BGR" else pixels
    return (ordered - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)


def _compute_features(encoder: EncoderWeights, pixels: Tensor, target: str) -> Tensor:
    return _own_network(encoder, target)(_normalize(pixels, encoder.provenance))


def _max_difference(features: Tensor, expected: Tensor) -> float:
    """Return the largest difference as a fraction of the largest expected feature; infinity if the shapes differ."""
    if expected.shape != features.shape:
        return float("inf")
    return float((expected - features).abs().max() / expected.abs().max())


def _first_layer(weights: Weights) -> str:
    """Return the name of the weights that are applied to the color channels."""
    return "conv1.weight" if "conv1.weight" in weights else "patch_embed.proj.weight"


def _diagnose(source: Path, encoder: EncoderWeights, pixels: Tensor, features: Tensor, target: str) -> str:
    """Return the cause of a difference: swapped color channels or the source's other encoder; else only an advice."""
    first = _first_layer(encoder.weights)
    swapped = encoder.weights | {first: encoder.weights[first].flip(1)}
    candidates = {"of swapped color channels (RGB and BGR)": replace(encoder, weights=swapped)}
    other = {"teacher": "student", "student": "teacher"}.get(encoder.provenance["encoder"])
    weights = checkpoint.load_weights(source, "checkpoint")
    if other and checkpoint.find_encoder(weights, other)[0] == other:
        candidates[f"of the {other}"] = read_encoder(source, other)
    for name, candidate in candidates.items():
        if _max_difference(features, _compute_features(candidate, pixels, target)) <= TOLERANCE:
            return f": they are those {name}; convert it again"
    return "; convert it again"


def _converted_network(path: Path, own: EncoderWeights, target: str) -> tuple[FeatureFunction, str]:
    """Return the framework's network, or this project's if the framework is not installed, and a description of it."""
    suffix = ", without class token and final norm" if _is_detectron2_vit(own.arch, target) else ""
    if has_network(target, own.arch):
        try:
            # The frameworks print, and warn about their own dependencies.
            with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
                warnings.simplefilter("ignore")
                return load_network(target, path, own.arch), f"{target}'s network{suffix}"
        except ImportError:
            return _own_network(own, target), f"this project's network ({target} is not installed){suffix}"
        except Exception as error:  # every framework raises its own
            raise UsageError(f"{path}: {target} cannot load it ({' '.join(str(error).split())[:200]})") from None
    return _own_network(own, target), "this project's network"


def _own_network(encoder: EncoderWeights, target: str) -> FeatureFunction:
    """Return this project's network as a function that computes what the network of the framework `target` does.

    For a ViT these are all tokens after the final norm; for detectron2's, the patch tokens of the last block, computed
    without a class token.
    """
    network: Any = build_frozen_encoder(encoder)
    if not is_vit(encoder.arch):
        return network
    if not _is_detectron2_vit(encoder.arch, target):
        return network.forward_features
    return lambda images: network.blocks(network._pos_embed(network.patch_embed(images))[:, 1:])
