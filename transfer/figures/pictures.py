"""Small pictures of images with a slot of theirs lit up."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from transfer.figures.looking import Observer
from transfer.figures.regions import fine_side, light_up, shrink, winners


@dataclass(frozen=True)
class Lit:
    """The region of a prototype in one of its nearest images."""

    prototype: int
    rank: int
    """0 for the nearest image."""
    picture: Tensor
    """(side, side, 3) uint8."""


def lit_regions(
    observer: Observer, nearest: Mapping[int, Sequence[int]], about: int, alpha: float, what: str = "drawing"
) -> Iterator[Lit]:
    """The regions of prototypes in their nearest images, in no order; each image is looked at once.

    Args:
        nearest: image numbers of each prototype, best first.
        about: wanted side of a picture, pixels; it becomes a near multiple of the map's side.
    """
    wanted = defaultdict(list)
    for prototype, images in nearest.items():
        for rank, image in enumerate(images):
            wanted[image].append((prototype, rank))
    if not wanted:
        return
    for seen in observer.look(sorted(wanted), what):
        side = fine_side(seen.scores.shape[2], min(about, seen.images.shape[2]))
        small = shrink(seen.images, side)
        for number, picture, scores in zip(seen.numbers.tolist(), small, seen.scores):
            won = winners(scores, side).cpu()
            for prototype, rank in wanted[number]:
                yield Lit(prototype, rank, light_up(picture, won == prototype, alpha))
