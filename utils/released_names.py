"""The names of a method's parts in released checkpoints that name them differently from this project."""

from collections.abc import Iterable

_PARTS = {
    "base_encoder": "encoder_q",
    "momentum_encoder": "encoder_k",
    "base_projector": "projector_q",
    "momentum_projector": "projector_k",
    "base_predictor": "predictor",
    "rot_predictor": "rotation_head",
}
"""The names of the parts in checkpoints of GTSA's authors, and those in `models/gtsa.py`."""


def rename_released(name: str) -> str:
    """Map the name of a tensor in a released checkpoint to this project's; other names stay as they are.

    `momentum_encoder.norm.bias` -> `encoder_k.norm.bias`.
    """
    part, dot, rest = name.partition(".")
    return f"{_PARTS.get(part, part)}{dot}{rest}" if dot else name


def has_released_parts(names: Iterable[str]) -> bool:
    """Return whether any tensor is of a part that `rename_released` renames."""
    return any(rename_released(name) != name for name in names)
