"""The names of a ResNet's tensors in detectron2 and in torchvision, written down block by block."""

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
