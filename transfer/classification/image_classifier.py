"""A classifier from a pre-trained encoder, and its optimizer with layer-wise learning rate decay."""

from typing import Any

import timm
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.optim import Optimizer

from models.backbones import build_encoder, is_vit
from models.vit import ViTEncoder
from utils.checkpoint import Weights
from utils.errors import UsageError

_CLASSIFIERS = ("head.", "fc.")
_INITIAL_STD = 2e-5
"""Standard deviation of the classifier's initial weights, as in MAE: the first predictions are almost uniform."""


class ViTClassifier(ViTEncoder):
    """A ViT that returns the logits of its classifier; its position embeddings are those of `ViTEncoder`."""

    def forward(self, images: Tensor) -> Tensor:  # type: ignore[override]
        """Map images (B, 3, S, S) to logits (B, classes)."""
        return self.forward_head(self.forward_features(images))


def build_classifier(
    arch: str, num_classes: int, image_size: int, global_pool: str = "avg", drop_path: float = 0.0
) -> nn.Module:
    """Build a randomly initialized classifier, whose parameters have timm's names.

    Args:
        arch: the architecture of an encoder.
        image_size: side of the images in pixels.
        global_pool: `avg` for the mean of the patch tokens or of the feature map, `token` for the class token.
        drop_path: largest stochastic depth rate, which grows linearly from 0 over the blocks.

    Raises:
        UsageError: the encoder takes no images of this size, or has no class token.
    """
    if is_vit(arch):
        model: Any = build_encoder(arch, drop_path=drop_path)
        model.check_image_size(image_size)
        model.reset_classifier(num_classes, global_pool)
        model.__class__ = ViTClassifier
    elif global_pool == "token":
        raise UsageError(f"--global-pool token: a {arch} has no class token; use avg")
    else:
        model = timm.create_model(arch, num_classes=num_classes, drop_path_rate=drop_path)
    classifier = model.get_classifier()
    nn.init.trunc_normal_(classifier.weight, std=_INITIAL_STD)
    nn.init.zeros_(classifier.bias)
    return model


def load_encoder_weights(model: nn.Module, weights: Weights) -> None:
    """Load all weights of an encoder into a classifier, which keeps its last layer.

    Raises:
        RuntimeError: a tensor has no counterpart of the same name and shape.
    """
    last_layer = {name: value for name, value in model.state_dict().items() if name.startswith(_CLASSIFIERS)}
    model.load_state_dict({**weights, **last_layer}, strict=True)


def build_fine_tuning_optimizer(model: nn.Module, weight_decay: float, layer_decay: float) -> Optimizer:
    """Build AdamW for a classifier of timm.

    The learning rate of a layer is that of the classifier times `layer_decay` for each layer between them, by the
    key `lr_scale` of its groups. One-dimensional parameters, the class token and position embeddings have no weight
    decay. The learning rate is set before every step.
    """
    return create_optimizer_v2(model, "adamw", lr=0.0, weight_decay=weight_decay, layer_decay=layer_decay, fused=True)
