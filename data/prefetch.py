"""The next batch is copied and coloured while the networks work on this one."""

from collections.abc import Iterable, Iterator

import torch

from data.photometric import apply_colour
from utils.batch import Batch


def prefetch(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Batches from the workers -> batches for a method, on `device`.

    On a GPU one batch is under way on a stream of its own while another is worked on; the host waits for neither.
    """
    if device.type == "cpu":
        for batch in batches:
            yield apply_colour(batch)
        return
    under_way = _on_a_side_stream(batches, device)
    following = next(under_way, None)
    while following is not None:
        batch, ready = following
        following = next(under_way, None)
        stream = torch.cuda.current_stream(device)
        stream.wait_event(ready)
        batch.record_stream(stream)
        yield batch


def _on_a_side_stream(batches: Iterable[Batch], device: torch.device) -> Iterator[tuple[Batch, torch.cuda.Event]]:
    stream = torch.cuda.Stream(device)
    for batch in batches:
        with torch.cuda.stream(stream):
            batch = apply_colour(batch.to(device))
            ready = stream.record_event()
        yield batch, ready
