"""Averages between two reports."""

import pytest
import torch

from utils.meter import Meter


def test_an_output_that_starts_between_two_reports_is_averaged_over_its_own_steps() -> None:
    meter, ok, norm = Meter(torch.device("cpu"), num_images=8), torch.tensor(1.0), torch.tensor(2.0)
    for step in range(4):
        output = {"loss": torch.tensor(1.0 + step)} | ({"loss/late": torch.tensor(5.0 + step)} if step > 1 else {})
        meter.record_step([output], norm, ok, torch.zeros(1))
    metrics, _messages = meter.read(4)
    assert (metrics["loss"], metrics["loss/late"]) == (pytest.approx(2.5), pytest.approx(7.5))
    assert (metrics["optim/gradient_norm"], metrics["optim/skipped_steps"]) == (pytest.approx(2.0), 0)


def test_skipped_steps_do_not_count() -> None:
    meter = Meter(torch.device("cpu"), num_images=8)
    for value, ok in ((1.0, 1.0), (float("nan"), 0.0), (4.0, 1.0)):
        meter.record_step([{"loss": torch.tensor(value)}], torch.tensor(value), torch.tensor(ok), torch.zeros(1))
    metrics, messages = meter.read(3)
    assert (metrics["loss"], metrics["optim/gradient_norm"], metrics["optim/skipped_steps"]) == (2.5, 2.5, 1)
    assert len(messages) == 1
