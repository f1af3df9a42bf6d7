"""The batch size and the length of a fine-tuning on a custom dataset, from its number of training images."""

import math


def default_batch_size(num_images: int, processes: int = 1) -> int:
    """Return the batch size over all processes: 16, or less if there are fewer images or if it does not divide evenly.

    It is a multiple of the number of processes, at least one image for each.
    """
    return max(min(16, num_images) // processes, 1) * processes


def default_iterations(num_images: int, batch_size: int, reference_iterations: int, reference_images: int) -> int:
    """Return the number of iterations, which grows with the square root of the number of images.

    Args:
        num_images: number of training images.
        batch_size: over all processes; a smaller one takes proportionally more iterations.
        reference_iterations: the published length, with batches of 16, on a dataset of `reference_images` images.
    """
    return math.ceil(reference_iterations * math.sqrt(num_images / reference_images) * 16 / batch_size)
