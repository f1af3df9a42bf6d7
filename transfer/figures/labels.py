"""Place the numbers of prototypes in a figure so that they do not overlap."""

import numpy as np

_DIGIT_WIDTH, _LINE_HEIGHT = 0.7, 1.0
"""Width of a digit and height of a line in DejaVu Sans Bold, as a share of the font size."""


class LabelPlacer:
    """Places numbers, one after the other, where they overlap none of those before."""

    def __init__(self, font_size: float, padding: float, points_per_unit: float):
        """Start without labels.

        Args:
            font_size: in points.
            padding: free space around a number, in points.
            points_per_unit: points for each unit of the positions.
        """
        self.font_size, self.padding, self.points_per_unit = font_size, padding, points_per_unit
        self.centers, self.sizes = np.empty((0, 2)), np.empty((0, 2))
        """(N, 2) each, x and y: of the labels placed so far."""

    def place(self, number: int, candidates: np.ndarray) -> np.ndarray | None:
        """Place a label at the first of the positions (M, 2) at which it is free, and return that position if any."""
        text_size = self.font_size * np.array([_DIGIT_WIDTH * len(str(number)), _LINE_HEIGHT])
        size = (text_size + 2 * self.padding) / self.points_per_unit
        is_free = np.ones(len(candidates), dtype=bool)
        for center, other in zip(self.centers, self.sizes):
            is_free &= (np.abs(candidates - center) >= (size + other) / 2).any(axis=1)
        if not is_free.any():
            return None
        position = candidates[is_free.argmax()]
        self.centers, self.sizes = np.vstack([self.centers, position]), np.vstack([self.sizes, size])
        return position
