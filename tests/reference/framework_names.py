"""The names of a network's tensors in detectron2, mmsegmentation, torchvision and timm, written down block by block."""

from typing import NamedTuple


class Row(NamedTuple):
    """The names and the shape of one tensor."""

    detectron2: str
    """The name below `backbone.bottom_up.`."""
    torchvision: str
    shape: tuple[int, ...]


BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


def resnet_rows(depth: int) -> list[Row]:
    """Return all tensors of a ResNet without its classifier, in detectron2's order.

    Args:
        depth: a key of BLOCKS.
    """
    rows: list[Row] = []

    def add(detectron2: str, convolution: str, norm: str, shape: tuple[int, int, int, int]) -> None:
        rows.append(Row(f"{detectron2}.weight", f"{convolution}.weight", shape))
        for name in ("weight", "bias", "running_mean", "running_var"):
            rows.append(Row(f"{detectron2}.norm.{name}", f"{norm}.{name}", (shape[0],)))
        rows.append(Row(f"{detectron2}.norm.num_batches_tracked", f"{norm}.num_batches_tracked", ()))

    add("stem.conv1", "conv1", "bn1", (64, 3, 7, 7))
    channels = 64
    for stage in range(4):
        narrow = 64 * 2**stage
        wide = narrow if depth < 50 else 4 * narrow
        for block in range(BLOCKS[depth][stage]):
            detectron2, torchvision = f"res{stage + 2}.{block}", f"layer{stage + 1}.{block}"
            if channels != wide:
                add(
                    f"{detectron2}.shortcut",
                    f"{torchvision}.downsample.0",
                    f"{torchvision}.downsample.1",
                    (wide, channels, 1, 1),
                )
            if depth < 50:
                shapes = [(narrow, channels, 3, 3), (narrow, narrow, 3, 3)]
            else:
                shapes = [(narrow, channels, 1, 1), (narrow, narrow, 3, 3), (wide, narrow, 1, 1)]
            for number, shape in enumerate(shapes, 1):
                add(f"{detectron2}.conv{number}", f"{torchvision}.conv{number}", f"{torchvision}.bn{number}", shape)
            channels = wide
    return rows


class ViTRow(NamedTuple):
    """The names and the shape of one tensor of a ViT."""

    timm: str
    mmseg: str
    detectron2: str | None
    """None where detectron2's ViT has no such tensor."""
    shape: tuple[int, ...]


def vit_rows(width: int, depth: int, patch_size: int) -> list[ViTRow]:
    """Return all tensors of a ViT for images of 224 px, without its classifier."""
    positions = (224 // patch_size) ** 2 + 1
    rows = [
        ViTRow("cls_token", "cls_token", None, (1, 1, width)),
        ViTRow("pos_embed", "pos_embed", "backbone.net.pos_embed", (1, positions, width)),
    ]

    def add(timm: str, mmseg: str, shape: tuple[int, ...], in_detectron2: bool = True) -> None:
        for name, of_tensor in (("weight", shape), ("bias", shape[:1])):
            detectron2 = f"backbone.net.{timm}.{name}" if in_detectron2 else None
            separator = "_" if mmseg.endswith("in_proj") else "."
            rows.append(ViTRow(f"{timm}.{name}", f"{mmseg}{separator}{name}", detectron2, of_tensor))

    add("patch_embed.proj", "patch_embed.projection", (width, 3, patch_size, patch_size))
    for block in range(depth):
        add(f"blocks.{block}.norm1", f"layers.{block}.ln1", (width,))
        add(f"blocks.{block}.attn.qkv", f"layers.{block}.attn.attn.in_proj", (3 * width, width))
        add(f"blocks.{block}.attn.proj", f"layers.{block}.attn.attn.out_proj", (width, width))
        add(f"blocks.{block}.norm2", f"layers.{block}.ln2", (width,))
        add(f"blocks.{block}.mlp.fc1", f"layers.{block}.ffn.layers.0.0", (4 * width, width))
        add(f"blocks.{block}.mlp.fc2", f"layers.{block}.ffn.layers.1", (width, 4 * width))
    add("norm", "ln1", (width,), in_detectron2=False)
    return rows
