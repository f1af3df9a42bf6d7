"""The next batch is copied and colored while the networks work on this one."""

from collections.abc import Iterable, Iterator, Sequence

import torch

from data.decode import decode_views
from data.color import apply_color
from data.views import ViewRecipe
from utils.batch import Batch


def prefetch(batches: Iterable[Batch], device: torch.device, recipes: Sequence[ViewRecipe] = ()) -> Iterator[Batch]:
    """Batches from the workers -> batches for a method, on `device`.

    On a GPU one batch is under way on a stream of its own while another is worked on; the host waits for neither,
    but for a decoder on the GPU.

    Args:
        batches: with views, or with sources for `data.decode`.
        device: where the method is.
        recipes: of the views that are cut from sources.
    """
    if device.type == "cpu":
        for batch in batches:
            yield apply_color(decode_views(batch, recipes, device))
        return
    under_way = _on_a_side_stream(batches, device, recipes)
    following = next(under_way, None)
    while following is not None:
        batch, ready = following
        following = next(under_way, None)
        stream = torch.cuda.current_stream(device)
        stream.wait_event(ready)
        batch.record_stream(stream)
        yield batch


def _on_a_side_stream(
    batches: Iterable[Batch], device: torch.device, recipes: Sequence[ViewRecipe]
) -> Iterator[tuple[Batch, torch.cuda.Event]]:
    stream = torch.cuda.Stream(device)
    for batch in batches:
        with torch.cuda.stream(stream):
            batch = apply_color(decode_views(batch, recipes, device).to(device))
            ready = stream.record_event()
        yield batch, ready
