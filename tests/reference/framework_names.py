"""Every tensor of a ResNet by detectron2's name and by torchvision's, in the order in which detectron2 builds them."""

from typing import NamedTuple


class Row(NamedTuple):
    """One tensor."""

    detectron2: str
    """Below `backbone.bottom_up.`."""
    torchvision: str
    shape: tuple[int, ...]


BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


def resnet_rows(depth: int) -> list[Row]:
    """The rows of a ResNet with batch norm behind every convolution and no classifier."""
    rows: list[Row] = []

    def add(theirs: str, convolution: str, norm: str, shape: tuple[int, int, int, int]) -> None:
        rows.append(Row(f"{theirs}.weight", f"{convolution}.weight", shape))
        for statistic in ("weight", "bias", "running_mean", "running_var"):
            rows.append(Row(f"{theirs}.norm.{statistic}", f"{norm}.{statistic}", (shape[0],)))
        rows.append(Row(f"{theirs}.norm.num_batches_tracked", f"{norm}.num_batches_tracked", ()))

    add("stem.conv1", "conv1", "bn1", (64, 3, 7, 7))
    channels = 64
    for stage in range(4):
        narrow = 64 * 2**stage
        wide = narrow if depth < 50 else 4 * narrow
        for block in range(BLOCKS[depth][stage]):
            theirs, ours = f"res{stage + 2}.{block}", f"layer{stage + 1}.{block}"
            if channels != wide:
                add(f"{theirs}.shortcut", f"{ours}.downsample.0", f"{ours}.downsample.1", (wide, channels, 1, 1))
            if depth < 50:
                shapes = [(narrow, channels, 3, 3), (narrow, narrow, 3, 3)]
            else:
                shapes = [(narrow, channels, 1, 1), (narrow, narrow, 3, 3), (wide, narrow, 1, 1)]
            for number, shape in enumerate(shapes, 1):
                add(f"{theirs}.conv{number}", f"{ours}.conv{number}", f"{ours}.bn{number}", shape)
            channels = wide
    return rows
