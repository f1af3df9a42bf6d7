"""Batch size and length of a fine-tuning on a custom dataset."""

import pytest

from transfer.custom_schedule import default_batch_size, default_iterations


@pytest.mark.parametrize(
    ("num_images", "processes", "expected"),
    [(1000, 1, 16), (1000, 8, 16), (1000, 3, 15), (1000, 32, 32), (16, 1, 16), (5, 1, 5), (5, 2, 4), (1, 1, 1)],
)
def test_batch_is_16_or_what_images_and_processes_allow(num_images: int, processes: int, expected: int) -> None:
    assert default_batch_size(num_images, processes) == expected


def test_length_grows_with_the_square_root_of_the_images() -> None:
    assert default_iterations(117_266, 16, 90_000, 117_266) == 90_000
    assert default_iterations(400, 16, 1000, 100) == 2000
    assert default_iterations(25, 16, 1000, 100) == 500


def test_smaller_batch_takes_more_iterations() -> None:
    assert default_iterations(100, 4, 1000, 100) == 4000
    assert default_iterations(100, 32, 1000, 100) == 500
