"""The first principal components of the patch features of many images, and colors from them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from transfer.figures.extractor import FeatureExtractor


class PrincipalComponents:
    """The first three principal components of features, accumulated over batches in memory for C x C values.

    The largest entry of a component, in absolute value, is positive, so that its sign does not depend on the solver.
    """

    def __init__(self) -> None:
        """Start without features."""
        self.count = 0
        self.total, self.products = torch.zeros(0), torch.zeros(0)
        """Sum of the features (C,) and of their outer products (C, C), float64."""

    def update(self, features: Tensor) -> None:
        """Add the features (B, C, h, w) of a batch."""
        rows = features.double().transpose(0, 1).flatten(1).T
        if not self.count:
            self.total, self.products = rows.new_zeros(rows.shape[1]), rows.new_zeros(rows.shape[1], rows.shape[1])
        self.count += len(rows)
        self.total += rows.sum(dim=0)
        self.products += rows.T @ rows

    def fit(self) -> "ComponentColors":
        """Return the colors by the components of all features that were added."""
        mean = self.total / self.count
        covariance = self.products / self.count - torch.outer(mean, mean)
        eigenvalues, eigenvectors = torch.linalg.eigh(covariance)  # ascending
        components = eigenvectors[:, -3:].flip(1).T
        largest = components.gather(1, components.abs().argmax(dim=1, keepdim=True))
        variances = eigenvalues[-3:].flip(0).clamp(min=0)
        return ComponentColors(mean, components * largest.sign(), variances, covariance.trace())


class ComponentColors:
    """Colors of features: the first three principal components as red, green and blue."""

    def __init__(self, mean: Tensor, components: Tensor, variances: Tensor, total_variance: Tensor):
        """Hold the components.

        Args:
            mean: (C,) of the features.
            components: (3, C), of length 1, that of the largest variance first.
            variances: (3,) of the features along the components.
            total_variance: of the features, a scalar.
        """
        self.mean, self.components = mean, components
        self.variances, self.total_variance = variances, total_variance

    def explained(self) -> list[float]:
        """Return the share of the variance along each component."""
        return (self.variances / self.total_variance.clamp(min=1e-30)).tolist()

    def colors(self, features: Tensor) -> Tensor:
        """Return colors (B, 3, h, w) in [0, 1] of features (B, C, h, w).

        A sigmoid brings the components, in half standard deviations, to this range: 0.5 is the mean, and 0.12 and 0.88
        are one standard deviation away from it.
        """
        centered = features.double() - self.mean[:, None, None]
        projected = torch.einsum("kc,bchw->bkhw", self.components, centered)
        deviations = self.variances.sqrt().clamp(min=1e-12)
        return (2 * projected / deviations[:, None, None]).sigmoid().float()


def fit_colors(extractor: FeatureExtractor, indices: Sequence[int]) -> ComponentColors:
    """Return the colors by the principal components of all patches of the images together."""
    components = PrincipalComponents()
    for batch in extractor.extract(indices, "extracting"):
        components.update(batch.features)
    return components.fit()
