"""Render the nearest images of prototypes, with their regions highlighted, side by side in strips."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from transfer.figures.extractor import SlotExtractor
from transfer.figures.regions import highlight_region, region_side, resample
from utils.visualization import assign_pixels


def render_strips(
    extractor: SlotExtractor,
    rankings: Mapping[int, Sequence[tuple[int, float]]],
    target_side: int,
    alpha: float,
    gap_share: float = 0,
) -> Iterator[tuple[int, Tensor]]:
    """Yield each prototype that has images and its strip, as soon as it is complete; each image is extracted once.

    Args:
        extractor: gives the images and their scores.
        rankings: the nearest images of each prototype, best first: pairs of image index and score.
        target_side: about the side of an image in pixels; it becomes a near multiple of the feature map's side.
        alpha: how much the rest of each image is darkened.
        gap_share: white space after each image, as a share of its side.

    Yields:
        The prototype and (side, n (1 + gap_share) side, 3) uint8 for its n images.
    """
    requests = defaultdict(list)
    for prototype, ranking in rankings.items():
        for rank, (index, _) in enumerate(ranking):
            requests[index].append((prototype, rank))
    if not requests:
        return
    tiles: dict[int, dict[int, Tensor]] = defaultdict(dict)
    for batch in extractor.extract(sorted(requests), "rendering"):
        side = region_side(batch.scores.shape[2], min(target_side, batch.images.shape[2]))
        gap = round(gap_share * side)
        white = torch.full((side, gap, 3), 255, dtype=torch.uint8)
        for index, image, scores in zip(batch.indices.tolist(), resample(batch.images, side), batch.scores):
            assignment = assign_pixels(scores, side).cpu()
            for prototype, rank in requests[index]:
                tile = highlight_region(image, assignment == prototype, alpha)
                tiles[prototype][rank] = torch.cat([tile, white], dim=1)
                if len(tiles[prototype]) == len(rankings[prototype]):
                    yield prototype, torch.cat([tile for _, tile in sorted(tiles.pop(prototype).items())], dim=1)
