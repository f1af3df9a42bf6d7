"""GTSA: losses, heads and views against the float64 references."""

import copy
import itertools
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from data.datasets import Sample
from data.loader import collate
from data.views import draw_views, intersection_area, make_views
from main_pretrain import parse_args
from models import build_method
from models.gtsa import GTSA
from scripts.pairwise_gtsa import PairwiseGTSA
from tests.helpers import SmallEncoder
from tests.reference import gtsa as reference
from utils.batch import Batch

FLAGS = ["--method", "gtsa", "--image-size", "48", "--local-size", "32", "--local-views", "3", "--drop-path", "0"]
FLAGS += ["--dim-hidden", "12", "--dim-out", "7", "--device", "cpu"]


def small_gtsa(*flags: str) -> Any:
    """A method in float64 whose teacher lags behind; its encoder has a stride of 8, hence maps of 6 and 4 cells."""
    torch.manual_seed(0)
    with patch("models.gtsa.build_encoder", SmallEncoder):
        method = build_method(parse_args([*FLAGS, *flags])).eval()
    with torch.no_grad():
        for name, parameter in method.named_parameters():
            scale = 0.05 if "encoder" in name else 0.4
            parameter.add_(torch.randn_like(parameter) * (scale if "_k." in name else scale / 2))
    return method.double()


def random_batch(
    seed: int, num_images: int = 3, apart: bool = False, sizes: tuple[int, ...] = (48, 48, 32, 32, 32)
) -> Batch:
    """Views in random crops that overlap, with random rotations; with `apart`, the last view of image 1 meets none."""
    rng = np.random.default_rng(seed)
    center = rng.uniform(50, 60, (num_images, len(sizes), 2))
    reach = rng.uniform(12, 50, (num_images, len(sizes), 4))
    crops = np.concatenate([center - reach[..., :2], center + reach[..., 2:]], axis=-1)
    if apart:
        crops[1, -1] = 200, 200, 240, 250
    return Batch(
        views=[torch.from_numpy(rng.standard_normal((num_images, 3, size, size))) for size in sizes],
        crops=torch.from_numpy(crops),
        flips=torch.zeros(num_images, len(sizes), dtype=torch.bool),
        rotations=torch.from_numpy(rng.integers(4, size=(num_images, len(sizes)))),
        index=torch.arange(num_images),
        epoch=11.0,
    )


def maps_of(method: Any, batch: Batch) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
    """Compute predictions of all views, the teacher's projections of two, and logits, each view on its own."""
    with torch.no_grad():
        student = [method.encode_student(view) for view in batch.views]
        teacher = [method.encode_teacher(view).numpy() for view in batch.views[:2]]
    return [view.predictions.numpy() for view in student], teacher, torch.cat([view.logits for view in student]).numpy()


@pytest.mark.parametrize("apart", [False, True], ids=["all views meet", "one view meets no other"])
@pytest.mark.parametrize("seed", [0, 1])
def test_losses_match_reference(seed: int, apart: bool) -> None:
    method, batch = small_gtsa(), random_batch(seed, apart=apart)
    output = method(batch)
    student, teacher, logits = maps_of(method, batch)
    expected = {
        "loss/crop": reference.crop_loss(student, teacher, batch.crops.numpy(), batch.rotations.numpy()),
        "loss/correspondence": reference.correspondence_loss(student, teacher),
        "loss/rotation": reference.rotation_loss(logits, batch.rotations.T.flatten().numpy()),
    }
    for name, value in expected.items():
        assert float(output[name]) == pytest.approx(value, abs=1e-11), name
    weighted = expected["loss/crop"] + 0.5 * expected["loss/correspondence"] + 0.5 * expected["loss/rotation"]
    assert float(output["loss"].detach()) == pytest.approx(weighted, abs=1e-11)
    accuracy = (logits.argmax(axis=1) == batch.rotations.T.flatten().numpy()).mean()
    assert float(output["rotation/accuracy"]) == pytest.approx(accuracy, abs=1e-6)


def test_gradient_is_the_slope_of_the_loss() -> None:
    method, batch = small_gtsa(), random_batch(2)
    method(batch)["loss"].backward()
    parameters = {name: p for name, p in method.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(0)
    direction = {name: torch.randn(p.shape, generator=generator, dtype=p.dtype) for name, p in parameters.items()}
    step, values = 1e-6, []
    for sign in (1, -1):
        moved = copy.deepcopy(method)
        with torch.no_grad():
            for name, parameter in moved.named_parameters():
                if name in direction:
                    parameter.add_(direction[name], alpha=sign * step)
            values.append(float(moved(batch)["loss"]))
    slope = sum(float((parameters[name].grad * direction[name]).sum()) for name in parameters)
    assert slope == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-6)
    assert all(p.grad is None for name, p in method.named_parameters() if "_k." in name)


def test_correspondence_starts_after_its_epochs_and_terms_without_weight_are_left_out() -> None:
    method, batch = small_gtsa(), random_batch(0)
    assert "loss/correspondence" not in method(replace(batch, epoch=10.99))
    assert "loss/correspondence" in method(batch)
    without = small_gtsa("--correspondence-weight", "0", "--rotation-weight", "0")(batch)
    assert {name for name in without if name.startswith("loss/")} == {"loss/crop"}
    assert float(without["loss"].detach()) == float(without["loss/crop"])


def test_loops_over_pairs_and_images_compute_the_same_losses_and_gradients() -> None:
    """The baseline of the benchmark samples with torchvision's RoIAlign."""
    batch = random_batch(4, apart=True)
    method, looped = small_gtsa(), small_gtsa()
    looped.__class__ = PairwiseGTSA
    output, expected = method(batch), looped(batch)
    assert expected.keys() | {"rotation/accuracy"} == output.keys()
    torch.testing.assert_close({name: output[name] for name in expected}, expected, rtol=0, atol=1e-12)
    output["loss"].backward()
    expected["loss"].backward()
    for (name, parameter), other in zip(method.named_parameters(), looped.parameters()):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=0, atol=1e-11, msg=name)


def test_aligned_cells_of_all_views_show_the_same_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The values of an image are its coordinates; the cells that the crop loss compares agree within a patch."""
    method, patch_size, size = small_gtsa(), 8, (256, 240)
    ramp = np.zeros((size[1], size[0], 3), dtype=np.uint8)
    ramp[:, :, 0], ramp[:, :, 1] = np.arange(size[0]), np.arange(size[1])[:, None]
    recipes = [replace(recipe, size=2 * recipe.size) for recipe in method.view_recipes(parse_args(FLAGS))]
    batch = collate([Sample(**vars(make_views(Image.fromarray(ramp), recipes, 0, 0, n))) for n in range(60)])
    maps = [F.avg_pool2d(view.double(), patch_size)[:, :2] for view in batch.views]
    cells: list[tuple[Tensor, Tensor, Tensor]] = []

    def record(student: Tensor, teacher: Tensor, valid: Tensor) -> Tensor:
        cells.append((student, teacher, valid))
        return torch.zeros(student.shape[0], student.shape[2])

    monkeypatch.setattr("models.gtsa.aligned_cosine", record)
    method.crop_loss(batch, [torch.cat(maps[:2]), torch.cat(maps[2:])], torch.cat(maps[:2]))
    extent = (batch.crops[..., 2:] - batch.crops[..., :2]).double()
    patches = extent / torch.tensor([view.shape[3] // patch_size for view in batch.views])[:, None]
    for views, (student, teacher, valid) in zip(([0, 1], [2, 3, 4]), cells):
        assert valid.all()
        assert student.shape[3:] == teacher.shape[3:] == (2, *((10, 10) if views[0] == 0 else (4, 4)))
        angles = set()
        for (g, view), t in itertools.product(enumerate(views), range(2)):
            if view == t:
                continue
            # One patch of the coarser view, in pixels of the image.
            patch = torch.maximum(patches[:, view].amax(dim=1), patches[:, t].amax(dim=1))[:, None, None, None]
            assert ((student[g, :, t] - teacher[g, :, t]).abs() <= patch).all(), (view, t)
            angles |= set(zip(batch.rotations[:, view].tolist(), batch.rotations[:, t].tolist()))
        assert len(angles) == 16


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_rotating_a_map_and_its_view_together_changes_no_loss(quarters: int) -> None:
    method, batch = small_gtsa(), random_batch(3)
    student = [method.encode_student(view) for view in batch.views]
    teacher = method.encode_teacher(torch.cat(batch.views[:2]))
    grouped = [torch.cat([view.predictions for view in views]) for views in (student[:2], student[2:])]
    rotations = batch.rotations + quarters
    turned = [maps.rot90(quarters, (2, 3)) for maps in grouped]
    before = method.crop_loss(batch, grouped, teacher), method.correspondence_loss(3, grouped, teacher)
    rotated_batch, rotated_teacher = replace(batch, rotations=rotations), teacher.rot90(quarters, (2, 3))
    after = (
        method.crop_loss(rotated_batch, turned, rotated_teacher),
        method.correspondence_loss(3, turned, rotated_teacher),
    )
    torch.testing.assert_close(after, before, rtol=0, atol=1e-12)


def test_losses_change_neither_the_labels_nor_the_views() -> None:
    batch = random_batch(0)
    original = copy.deepcopy(batch)
    small_gtsa()(batch)["loss"].backward()
    for name in ("crops", "flips", "rotations", "index"):
        assert torch.equal(getattr(batch, name), getattr(original, name)), name
    assert all(torch.equal(a, b) for a, b in zip(batch.views, original.views))


def layers_of(head: torch.nn.Module) -> list[tuple[np.ndarray, np.ndarray]]:
    convolutions = [module for module in head.modules() if isinstance(module, torch.nn.Conv2d)]
    return [(module.weight.detach().numpy(), module.bias.detach().numpy()) for module in convolutions]


@pytest.mark.parametrize("dim_hidden", [12, 5], ids=["residual in both blocks", "residual in the second block"])
def test_heads_match_reference(dim_hidden: int) -> None:
    method = small_gtsa("--dim-hidden", str(dim_hidden))
    encoded = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 12, 4, 4)))
    with torch.no_grad():
        projection = method.projector_q(encoded)
        prediction = method.predictor(projection)
        logits = method.rotation_head(encoded.mean(dim=(2, 3)))
    expected = reference.conv_head(encoded[0].numpy(), layers_of(method.projector_q), residual=True)
    np.testing.assert_allclose(projection[0], expected, rtol=0, atol=1e-10)
    expected = reference.conv_head(projection[0].numpy(), layers_of(method.predictor), residual=False)
    np.testing.assert_allclose(prediction[0], expected, rtol=0, atol=1e-10)
    parameters = {name: value.detach().numpy() for name, value in method.rotation_head.named_parameters()}
    expected = reference.rotation_head(encoded.mean(dim=(2, 3)).numpy(), parameters)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-10)


def test_published_sizes_of_the_networks() -> None:
    with torch.device("meta"):
        method = build_method(parse_args(["--method", "gtsa"]))
        large = build_method(parse_args(["--method", "gtsa", "--arch", "vit_base_patch16_224"]))
    assert [tuple(m.weight.shape) for m in method.projector_q.modules() if isinstance(m, torch.nn.Conv2d)] == [
        (384, 384, 3, 3),
        (384, 384, 3, 3),
        (768, 384, 1, 1),
    ]
    assert [tuple(m.weight.shape) for m in method.predictor.modules() if isinstance(m, torch.nn.Conv2d)] == [
        (768, 768, 3, 3),
        (768, 768, 1, 1),
    ]
    rows = [m.out_features for m in method.rotation_head if isinstance(m, torch.nn.Linear)]
    assert rows == [768, 768, 128, 4]
    assert large.rotation_head[0].in_features == 768
    assert method.encoder_q.blocks[11].drop_path1.drop_prob == pytest.approx(0.1)
    assert not hasattr(method.encoder_k.blocks[11].drop_path1, "drop_prob")


def test_views_follow_the_published_recipe() -> None:
    args = parse_args(["--method", "gtsa"])
    recipes = GTSA.view_recipes(args)
    assert [recipe.size for recipe in recipes] == [224] * 2 + [96] * 8
    assert [recipe.scale for recipe in recipes] == [(0.3, 1.0)] * 2 + [(0.1, 0.3)] * 8
    for recipe in recipes:
        assert (recipe.ratio, recipe.flip_p, recipe.rotate, recipe.interpolation) == (
            (3 / 4, 4 / 3),
            0,
            True,
            "bilinear",
        )
        color = recipe.color
        assert (color.jitter, color.jitter_p, color.gray_p, color.blur_p) == ((0.8, 0.8, 0.8, 0.2), 0.8, 0.2, 0.2)
        assert (color.blur_sigma, color.solarize_p) == ((0.1, 2.0), 0.0)
    for index in range(40):
        record = draw_views((640, 480), recipes, 0, 0, index)
        boxes = [tuple(box) for box in record.crops.int().tolist()]
        for number, box in enumerate(boxes[1:], start=1):
            for other in boxes[: min(number, 2)]:
                share = 0.02 if number == 1 else 0.01
                assert intersection_area(box, other) > share * 640 * 480
    rotations = torch.cat([draw_views((640, 480), recipes, 0, 0, index).rotations for index in range(40)])
    assert sorted(set(rotations.tolist())) == [0, 1, 2, 3]


def test_published_recipe() -> None:
    args = parse_args(["--method", "gtsa"])
    published = {
        "arch": "vit_small_patch16_224",
        "epochs": 100,
        "batch_size": 512,
        "base_lr": 5e-4,
        "warmup_epoch": 10,
        "warmup_multiplier": float("inf"),
        "optimizer": "adamw",
        "weight_decay": 0.04,
        "weight_decay_end": 0.4,
        "clip_grad": 3.0,
        "clip_grad_per_parameter": True,
        "drop_path": 0.1,
        "teacher_momentum": 0.996,
        "correspondence_epoch": 11,
        "correspondence_weight": 0.5,
        "rotation_weight": 0.5,
    }
    assert {name: getattr(args, name) for name in published} == published


def position_embedding(positions: Tensor, count: int) -> Tensor:
    """Bicubic interpolation (a = -0.75) of (14, 14, D) to (count, count, D) with the factor (count + 0.1) / 14."""

    def weight(distance: float) -> float:
        d, a = abs(distance), -0.75
        if d <= 1:
            return (a + 2) * d**3 - (a + 3) * d**2 + 1
        return a * (d**3 - 5 * d**2 + 8 * d - 4) if d < 2 else 0.0

    side = len(positions)
    matrix = torch.zeros(count, side, dtype=torch.float64)
    for i in range(count):
        source = (i + 0.5) * side / (count + 0.1) - 0.5
        for tap in range(int(np.floor(source)) - 1, int(np.floor(source)) + 3):
            matrix[i, min(max(tap, 0), side - 1)] += weight(source - tap)
    return torch.einsum("iy,jx,yxd->ijd", matrix, matrix, positions)


@pytest.mark.parametrize("side", [6, 20])
def test_position_embeddings_follow_the_size_by_dinos_rule(side: int) -> None:
    torch.manual_seed(0)
    encoder: Any = build_method(parse_args(["--method", "gtsa", "--arch", "vit_tiny_patch16_224"])).encoder_k.double()
    patches = torch.zeros(1, side, side, 192, dtype=torch.float64)
    with torch.no_grad():
        tokens = encoder._pos_embed(patches)
    expected = position_embedding(encoder.pos_embed[0, 1:].detach().unflatten(0, (14, 14)), side)
    # The interpolation is computed in float32.
    torch.testing.assert_close(tokens[0, 1:].unflatten(0, (side, side)), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(tokens[0, 0], (encoder.cls_token + encoder.pos_embed[:, :1]).detach()[0, 0])
