"""The names of a ResNet's tensors in torchvision and in detectron2."""

import re


def detectron2_name(name: str) -> str:
    """Map torchvision's name of a ResNet's tensor to detectron2's, below `backbone.bottom_up.`.

    `layer1.0.conv1.weight` -> `res2.0.conv1.weight`, `layer1.0.bn1.bias` -> `res2.0.conv1.norm.bias`,
    `layer1.0.downsample.0.weight` -> `res2.0.shortcut.weight`, `bn1.weight` -> `stem.conv1.norm.weight`.
    """
    stage = re.match(r"layer(\d)\.", name)
    name = f"res{int(stage[1]) + 1}.{name[stage.end() :]}" if stage else f"stem.{name}"
    name = name.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")
    return re.sub(r"bn(\d)\.", r"conv\1.norm.", name)


def torchvision_name(name: str) -> str:
    """Map detectron2's name of a ResNet's tensor to torchvision's; the inverse of `detectron2_name`."""
    name = name.removeprefix("stem.").replace("shortcut.norm.", "downsample.1.").replace("shortcut.", "downsample.0.")
    name = re.sub(r"conv(\d)\.norm\.", r"bn\1.", name)
    return re.sub(r"^res(\d)\.", lambda stage: f"layer{int(stage[1]) - 1}.", name)
