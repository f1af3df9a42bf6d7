"""Find the patches of many images that are most similar to query patches."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from transfer.figures.extractor import FeatureBatch, FeatureExtractor
from transfer.figures.nearest_images import NearestImages


class QueryPatches(NamedTuple):
    """One patch of each of Q images."""

    indices: Tensor
    """(Q,) int64, the images."""
    positions: Tensor
    """(Q,) int64, the patches in row-major order."""
    features: Tensor
    """(Q, C), of length 1."""


def unit_patches(features: Tensor) -> Tensor:
    """Return the features (B, C, h, w) as normalized rows (B, h w, C), float32."""
    return F.normalize(features.float(), dim=1).flatten(2).transpose(1, 2)


def sample_position(index: int, map_side: int, seed: int) -> int:
    """Sample the query patch of an image, in row-major order; the same arguments give the same patch.

    Patches at the border are left out if the map has others.
    """
    border = min(1, (map_side - 1) // 2)
    row, column = np.random.default_rng([seed, index]).integers(border, map_side - border, 2)
    return int(row) * map_side + int(column)


class QueryCollector:
    """Collects the features of the query patches of images, batch by batch."""

    def __init__(self, seed: int):
        self.seed = seed
        self.batches: list[QueryPatches] = []

    def update(self, batch: FeatureBatch) -> None:
        """Add a query patch of each image of a batch."""
        side = batch.features.shape[3]
        positions = torch.tensor([sample_position(index, side, self.seed) for index in batch.indices.tolist()])
        rows = torch.arange(len(positions), device=batch.features.device)
        features = unit_patches(batch.features)[rows, positions.to(rows.device)]
        self.batches.append(QueryPatches(batch.indices, positions, features))

    def collect(self) -> QueryPatches:
        """Return the query patches of all images."""
        return QueryPatches(*map(torch.cat, zip(*self.batches)))


def collect_queries(extractor: FeatureExtractor, indices: Sequence[int], seed: int) -> QueryPatches:
    """Return a query patch of each of the images."""
    collector = QueryCollector(seed)
    for batch in extractor.extract(indices, "extracting"):
        collector.update(batch)
    return collector.collect()


def find_nearest(
    extractor: FeatureExtractor, queries: QueryPatches, indices: Sequence[int], topk: int
) -> NearestImages:
    """Find the images whose best patch is most similar to each query patch; the image of the query is left out.

    Args:
        extractor: gives the features.
        queries: Q query patches.
        indices: the images to search.
        topk: number of images to find for each query.
    """
    nearest = NearestImages(len(queries.indices), topk, queries.features.device)
    for batch in extractor.extract(indices, "searching"):
        update_nearest(nearest, queries, batch)
    return nearest


def update_nearest(nearest: NearestImages, queries: QueryPatches, batch: FeatureBatch) -> None:
    """Add the best patch of each image of a batch to the nearest images of each query, except of its own image."""
    scores = torch.einsum("qc,bpc->bqp", queries.features, unit_patches(batch.features)).amax(dim=2)
    own = batch.indices[:, None] == queries.indices
    nearest.update(batch.indices, scores.masked_fill(own.to(scores.device), -torch.inf))


class Match(NamedTuple):
    """An image that shows a query patch or one of its nearest patches."""

    query: int
    """Number of the query."""
    rank: int
    """0 for the query patch itself, then 1, 2, ..."""
    position: int
    """The patch in row-major order."""


def find_matches(
    extractor: FeatureExtractor, queries: QueryPatches, nearest: NearestImages
) -> Iterator[tuple[FeatureBatch, list[list[Match]]]]:
    """Yield the images of all queries and of their nearest patches, each once, with the patches to show in each.

    Args:
        extractor: gives the images and their features.
        queries: Q query patches.
        nearest: the images with the nearest patches of each.
    """
    requests: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for query, index in enumerate(queries.indices.tolist()):
        requests[index].append((query, 0))
        for rank, (neighbor, _) in enumerate(nearest.ranking(query), start=1):
            requests[neighbor].append((query, rank))
    for batch in extractor.extract(sorted(requests), "rendering"):
        patches = unit_patches(batch.features)
        yield (
            batch,
            [
                [Match(query, rank, _position(queries, query, rank, rows)) for query, rank in requests[index]]
                for index, rows in zip(batch.indices.tolist(), patches)
            ],
        )


def _position(queries: QueryPatches, query: int, rank: int, patches: Tensor) -> int:
    """Return the patch of a query: its own one at rank 0, else the most similar one of the patches (h w, C)."""
    if rank == 0:
        return int(queries.positions[query])
    return int((patches @ queries.features[query]).argmax())
