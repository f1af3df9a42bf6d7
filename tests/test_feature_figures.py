"""Figures, page and exports of encoders: PCA of patch features, attention of the class token, nearest patches."""

import argparse
import csv
import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

import main_pretrain
import utils.checkpoint
import viz_slots
from data.datasets import build_dataset
from models import build_method
from models.vit import ViTEncoder, build_vit
from tests.helpers import run_expecting_usage_error
from transfer.encoders import load_encoder
from transfer.figures import slot_outputs
from transfer.figures.extractor import CenterCrops, FeatureExtractor
from transfer.figures.nearest_patches import QueryCollector, find_matches, find_nearest, sample_position
from transfer.figures.patches import draw_patches
from transfer.figures.principal_components import PrincipalComponents
from transfer.figures.regions import resample
from transfer.figures.tiles import enlarge, mark_patch, to_pixels, weight_colors
from transfer.figures.vit_attention import EncodedImages, encode
from transfer.slot_model import load_slot_model
from utils.files import link_or_copy
from utils.visualization import normalize

Captured = pytest.CaptureFixture[str]

SIZE = 48
VIT = ["--arch", "vit_tiny_patch16_224", "--dim-hidden", "16", "--dim-out", "16", "--image-size", "32"]
RELEASED_NAMES = {"encoder_k.": "momentum_encoder.", "encoder_q.": "base_encoder."}


def save_checkpoint(path: Path, images: Path, *flags: str) -> dict[str, Tensor]:
    """Write the checkpoint of an untrained method with a ViT, whose teacher differs from its student."""
    args = main_pretrain.parse_args(["--dataset", "folder", "--data-dir", str(images), *VIT, *flags])
    torch.manual_seed(0)
    method: Any = build_method(args)
    with torch.no_grad():
        for parameter in method.encoder_k.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    torch.save({"args": vars(args), "model": method.state_dict(), "epoch": 1}, path)
    return method.state_dict()


@pytest.fixture(scope="module")
def checkpoints(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with checkpoints of GTSA, as ours and as released, and of SlotCon with a ViT."""
    folder = tmp_path_factory.mktemp("checkpoints")
    weights = save_checkpoint(folder / "gtsa.pth", images, "--method", "gtsa", "--local-size", "32")
    released = {
        f"module.{released}{name.removeprefix(prefix)}": value
        for prefix, released in RELEASED_NAMES.items()
        for name, value in weights.items()
        if name.startswith(prefix)
    }
    torch.save({"epoch": 100, "state_dict": released}, folder / "released.pth")
    save_checkpoint(folder / "slotcon.pth", images, "--method", "slotcon", "--num-prototypes", "8")
    return folder


def command(checkpoint: Path, images: Path, *flags: str) -> list[str]:
    data = ["--data-dir", str(images), "--dataset", "folder", "--max-images", "5", "--image-size", str(SIZE)]
    fast = ["--device", "cpu", "--num-workers", "0", "--dpi", "40", "--sampling", "3", "--topk", "2"]
    return ["--model-path", str(checkpoint), *data, *fast, *flags]


def crops_of(images: Path, size: int = SIZE) -> CenterCrops:
    dataset = build_dataset(argparse.Namespace(dataset="folder", data_dir=str(images), seed=0), recipes=())
    return CenterCrops(dataset, size)


def make_extractor(features: Tensor, images: Path) -> FeatureExtractor:
    """Return an extractor that gives features (N, C, h, w) to N images, in every pass over all of them."""
    rows = itertools.cycle(features)

    def model(inputs: Tensor) -> EncodedImages:
        return EncodedImages(torch.stack([next(rows) for _ in inputs]), None)

    return FeatureExtractor(model, crops_of(images), torch.device("cpu"), 3, 0)


# Principal components


def colors_by_svd(features: np.ndarray) -> np.ndarray:
    """Return the colors (N, h, w, 3) of features (N, C, h, w)."""
    rows = features.transpose(0, 2, 3, 1)
    centered = rows - rows.mean(axis=(0, 1, 2))
    flat = centered.reshape(-1, rows.shape[-1])
    _, _, axes = np.linalg.svd(flat, full_matrices=False)
    components = np.array([axis if axis[np.abs(axis).argmax()] > 0 else -axis for axis in axes[:3]])
    projected = centered @ components.T
    return 1 / (1 + np.exp(-2 * projected / (flat @ components.T).std(axis=0)))


def test_pca_colors_equal_those_of_a_singular_value_decomposition() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(5, 9, 3, 4)) * np.linspace(1, 3, 9)[:, None, None] + 7
    components = PrincipalComponents()
    for part in (slice(0, 2), slice(2, 5)):
        components.update(torch.from_numpy(features[part]))
    fitted = components.fit()
    colors = fitted.colors(torch.from_numpy(features)).permute(0, 2, 3, 1)
    np.testing.assert_allclose(colors.numpy(), colors_by_svd(features), atol=1e-6)
    rows = features.transpose(0, 2, 3, 1).reshape(-1, 9)
    eigenvalues = np.linalg.eigvalsh(np.cov(rows.T))[::-1]
    np.testing.assert_allclose(fitted.explained(), eigenvalues[:3] / eigenvalues.sum(), rtol=1e-9)


def test_pca_colors_of_equal_patches_are_gray() -> None:
    components = PrincipalComponents()
    components.update(torch.ones(2, 5, 3, 3))
    torch.testing.assert_close(components.fit().colors(torch.ones(1, 5, 3, 3)), torch.full((1, 3, 3, 3), 0.5))


# Attention


def attention_by_hand(vit: ViTEncoder, images: Tensor) -> Tensor:
    """Return the attention (B, heads, 1 + N, 1 + N) of all tokens in the last block."""
    tokens = vit._pos_embed(vit.patch_embed(images))
    *earlier, last = vit.blocks
    for block in earlier:
        tokens = block(tokens)
    layer: Any = last.attn
    qkv = last.norm1(tokens) @ layer.qkv.weight.T + layer.qkv.bias
    queries, keys, _ = (part.unflatten(2, (layer.num_heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=2))
    scores = layer.q_norm(queries) @ layer.k_norm(keys).transpose(2, 3) / queries.shape[-1] ** 0.5
    weights = scores.exp()
    return weights / weights.sum(dim=3, keepdim=True)


@pytest.mark.parametrize("normalized", [False, True])
@torch.no_grad()
def test_attention_of_the_class_token_equals_a_direct_computation(normalized: bool) -> None:
    torch.manual_seed(0)
    vit: Any = build_vit("vit_tiny_patch16_224").eval()
    vit.blocks = vit.blocks[-2:]
    layer = vit.blocks[-1].attn
    layer.qkv.weight.mul_(8)  # attention far from uniform
    if normalized:
        layer.q_norm, layer.k_norm = nn.LayerNorm(layer.head_dim), nn.LayerNorm(layer.head_dim)
        layer.q_norm.weight.normal_(), layer.k_norm.bias.normal_()
    images = torch.randn(2, 3, 32, 48)
    features, attention = encode(vit, images)
    torch.testing.assert_close(features, vit(images))
    assert attention is not None
    assert attention.shape == (2, 3, 2, 3)
    expected = attention_by_hand(vit, images)[:, :, 0]
    assert expected.std() > 0.02
    torch.testing.assert_close(attention.flatten(2), expected[:, :, 1:], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(attention.sum(dim=(2, 3)), 1 - expected[:, :, 0], rtol=1e-5, atol=1e-5)
    assert not layer.qkv._forward_hooks


# Nearest patches


def unit(row: np.ndarray) -> np.ndarray:
    return row / np.linalg.norm(row)


def nearest_by_loops(
    features: np.ndarray, query: tuple[int, int], images: Sequence[int], topk: int
) -> list[tuple[float, int, int]]:
    """Return cosine similarity, image and position of the best patch of each other image, the best first."""
    rows = features.transpose(0, 2, 3, 1).reshape(len(features), -1, features.shape[1])
    found = []
    for image in images:
        if image != query[0]:
            cosines = [float(unit(rows[query]) @ unit(patch)) for patch in rows[image]]
            found.append((max(cosines), image, int(np.argmax(cosines))))
    return sorted(found, reverse=True)[:topk]


def test_nearest_patches_equal_those_of_a_loop(images: Path) -> None:
    features = torch.randn(16, 6, 4, 4, generator=torch.Generator().manual_seed(0))
    indices = list(range(16))
    collector = QueryCollector(seed=3)
    for batch in make_extractor(features, images).extract(indices, ""):
        collector.update(batch)
    queries = collector.collect()
    assert queries.indices.tolist() == indices
    nearest = find_nearest(make_extractor(features, images), queries, indices, topk=4)
    found: dict[tuple[int, int], tuple[int, int]] = {}
    for batch, matches in find_matches(make_extractor(features, images), queries, nearest):
        for index, shown in zip(batch.indices.tolist(), matches):
            found |= {(query, rank): (index, position) for query, rank, position in shown}
    for query, position in enumerate(queries.positions.tolist()):
        assert position == sample_position(query, 4, 3)
        assert position in (5, 6, 9, 10)  # not at the border
        assert found[query, 0] == (query, position)
        expected = nearest_by_loops(features.double().numpy(), (query, position), indices, 4)
        scores = [score for _, score in nearest.ranking(query)]
        assert scores == pytest.approx([score for score, _, _ in expected], abs=1e-6)
        assert [found[query, rank] for rank in range(1, 5)] == [(image, patch) for _, image, patch in expected]
    assert len(found) == 5 * 16
    assert {sample_position(index, 4, 3) for index in range(30)} == {5, 6, 9, 10}


@pytest.mark.parametrize("map_side", [1, 2, 3])
def test_query_patch_of_a_small_map_lies_in_it(map_side: int) -> None:
    assert {sample_position(index, map_side, 0) for index in range(40)} == {1: {0}, 2: {0, 1, 2, 3}, 3: {4}}[map_side]


def test_query_patch_and_nearest_patches_are_drawn_in_order_of_similarity(images: Path) -> None:
    features = torch.randn(16, 6, 4, 4, generator=torch.Generator().manual_seed(1))
    figure = draw_patches(make_extractor(features, images), range(16), range(16), 3, 0, 40, "details")
    panels = panels_of(figure)
    assert [index for index, _ in panels] == list(range(16))
    photographs = [resample(pixels_of(crops_of(images), index), 52)[0] for index in range(16)]
    for index, axes in panels:
        query = index, sample_position(index, 4, 0)
        nearest = nearest_by_loops(features.double().numpy(), query, range(16), 3)
        assert [text.get_text() for text in axes.texts] == ["query", *(f"{score:.3f}" for score, _, _ in nearest)]
        patches = [query, *((image, position) for _, image, position in nearest)]
        for tile, (image, position) in zip(read_tiles(axes, 4), patches):
            np.testing.assert_array_equal(tile, to_pixels(mark_patch(photographs[image], position, 4)))


# Tiles


def test_patch_is_marked_by_a_box_around_it() -> None:
    image = torch.full((3, 40, 40), 0.5)
    marked = mark_patch(image, position=6, map_side=4)
    changed = (marked != image).any(dim=0)
    assert not changed[10:20, 20:30].any()
    assert changed[7:23, 17:33].sum() == 16 * 16 - 10 * 10
    assert changed.sum() == 16 * 16 - 10 * 10
    colored = (marked[0] == 1) & (marked[2] == 0)
    assert colored[8, 18:32].all()
    assert mark_patch(image, position=0, map_side=4).shape == image.shape


def test_weights_are_colored_from_the_smallest_to_the_largest() -> None:
    colors = weight_colors(torch.tensor([[[0.2, 0.2], [0.3, 0.4]], [[0.0, 1.0], [0.5, 0.25]]]))
    black, middle, yellow = colors[1, :, 0, 0], colors[1, :, 1, 0], colors[1, :, 0, 1]
    assert black.max() < 0.02
    assert yellow[:2].min() > 0.95
    expected = torch.stack([torch.stack([black, black]), torch.stack([middle, yellow])])
    torch.testing.assert_close(colors[0].permute(1, 2, 0), expected)
    torch.testing.assert_close(enlarge(colors, 6)[0, :, 3:, :3], middle[:, None, None].expand(3, 3, 3))


# The command


def test_checkpoint_without_prototypes_says_what_it_can_show_and_shows_it(
    checkpoints: Path, images: Path, tmp_path: Path, capsys: Captured
) -> None:
    path = tmp_path / "gtsa.pth"
    link_or_copy(path, checkpoints / "gtsa.pth")
    viz_slots.main(command(path, images))
    figure = tmp_path / "features_pca.png"
    assert capsys.readouterr().out.splitlines() == [
        f"{path} has no prototypes; figures: pca, attention, patches; --html shows images, --export writes features",
        f"figure: {figure}",
    ]
    assert figure.is_file()


def drawn_figure(module: Any, argv: list[str], monkeypatch: pytest.MonkeyPatch) -> Figure:
    """Run the command, and return the figure that `save_figure` of a module gets."""
    save = Mock()
    monkeypatch.setattr(module, "save_figure", save)
    viz_slots.main(argv)
    figure: Figure = save.call_args.args[2]
    return figure


def read_tiles(axes: Axes, count: int) -> list[np.ndarray]:
    """Return the images (side, side, 3) uint8 of a strip, without the gaps between them."""
    strip = np.asarray(axes.images[0].get_array())
    side, step = strip.shape[0], strip.shape[1] // count
    return [strip[:, number * step : number * step + side] for number in range(count)]


def panels_of(figure: Figure) -> list[tuple[int, Axes]]:
    """Return the panels and the numbers of their images, which their titles name."""
    return [(int(axes.get_title(loc="left")[:2]), axes) for axes in figure.axes if axes.images]


def pixels_of(crops: CenterCrops, index: int) -> Tensor:
    pixels = crops[index].pixels
    assert pixels is not None
    return pixels[None]


@torch.no_grad()
def encode_images(checkpoint: Path, images: Path, indices: Sequence[int]) -> EncodedImages:
    """Return the outputs of the encoder of a checkpoint for images."""
    crops = crops_of(images)
    return encode(load_encoder(checkpoint), normalize(torch.cat([pixels_of(crops, index) for index in indices]) / 255))


def test_figure_of_pca_shows_each_image_beside_the_colors_of_its_patches(
    checkpoints: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoints / "gtsa.pth"
    panels = panels_of(drawn_figure(viz_slots, command(path, images, "--save-path", str(tmp_path)), monkeypatch))
    shown = [index for index, _ in panels]
    assert len(shown) == 3
    features = encode_images(path, images, shown).features
    components = PrincipalComponents()
    components.update(features)
    for (index, axes), colors in zip(panels, components.fit().colors(features)):
        photograph, patches = read_tiles(axes, 2)
        np.testing.assert_array_equal(photograph, to_pixels(resample(pixels_of(crops_of(images), index), 51)[0]))
        np.testing.assert_allclose(patches, 255 * enlarge(colors, 51).permute(1, 2, 0).numpy(), atol=2)


def test_figure_of_attention_shows_the_mean_and_each_head(
    checkpoints: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoints / "slotcon.pth"
    argv = command(path, images, "--figure", "attention", "--save-path", str(tmp_path))
    panels = panels_of(drawn_figure(viz_slots, argv, monkeypatch))
    attention = encode_images(path, images, [index for index, _ in panels]).attention
    assert attention is not None
    for (index, axes), heads in zip(panels, attention, strict=True):
        assert [text.get_text() for text in axes.texts] == ["image", "mean", "head 0", "head 1", "head 2"]
        photograph, *maps = read_tiles(axes, 5)
        np.testing.assert_array_equal(photograph, to_pixels(resample(pixels_of(crops_of(images), index), 51)[0]))
        expected = enlarge(weight_colors(torch.cat([heads.mean(dim=0, keepdim=True), heads])), 51)
        np.testing.assert_allclose(maps, 255 * expected.permute(0, 2, 3, 1).numpy(), atol=8)


def test_page_and_export_of_a_released_checkpoint(checkpoints: Path, images: Path, tmp_path: Path) -> None:
    path, page, folder = checkpoints / "released.pth", tmp_path / "page.html", tmp_path / "out"
    viz_slots.main(command(path, images, "--html", str(page), "--export", str(folder)))
    data = json.loads(page.read_text().split('id="data">')[1].split("</script>")[0])
    assert data["views"] == ["image", "PCA", "attention"]
    assert [data["names"][card["image"]] for card in data["cards"]] == ["06.jpg", "09.jpg", "12.jpg"]
    assert all(len(card["nearest"]) == 2 and len(card["strips"]) == 2 for card in data["cards"])

    rows = list(csv.DictReader((folder / "images.csv").open()))
    assert [row["image"] for row in rows] == ["00.jpg", "03.jpg", "06.jpg", "09.jpg", "12.jpg"]
    crops = crops_of(images)
    inputs = normalize(torch.stack([crops[int(row["image"][:2])].pixels for row in rows]) / 255)
    with torch.no_grad():
        expected, attention = encode(load_encoder(checkpoints / "gtsa.pth"), inputs)
    assert attention is not None
    components = PrincipalComponents()
    components.update(expected)
    colors = components.fit().colors(expected)
    for row, features, weights, color in zip(rows, expected, attention, colors):
        with np.load(folder / row["features"]) as arrays:
            assert arrays["features"].dtype == np.float16
            np.testing.assert_allclose(arrays["features"], features.numpy(), rtol=1e-3, atol=1e-3)
            assert arrays["crop"].tolist() == [int(row[name]) for name in ("x0", "y0", "x1", "y1")] == [12, 0, 84, 72]
        with np.load(folder / row["attention"]) as arrays:
            np.testing.assert_allclose(arrays["attention"], weights.numpy(), rtol=1e-3, atol=1e-6)
        with Image.open(folder / row["pca"]) as image:
            pixels = np.array(image)
        assert pixels.shape == (SIZE, SIZE, 3)
        np.testing.assert_allclose(pixels, 255 * enlarge(color, SIZE).permute(1, 2, 0).numpy(), atol=2)
    check_nearest_patches(folder / "nearest_patches.csv", expected, [row["image"] for row in rows])
    metadata = json.loads((folder / "metadata.json").read_text())
    assert (metadata["arch"], metadata["encoder"]) == ("vit_tiny_patch16_224", "teacher")
    assert (metadata["image_size"], metadata["output_stride"]) == (SIZE, 16)
    readme = (folder / "README.txt").read_text()
    assert "released.pth in 5 images" in readme
    assert all(f"{name}/NAME" in readme for name in ("features", "pca", "attention"))
    assert "nearest_patches.csv for a query patch of each of 3 images" in readme


def check_nearest_patches(path: Path, features: Tensor, names: list[str]) -> None:
    """Compare a table of three queries and two ranks with a loop over the features of all images."""

    def patch_of(image: int, position: int) -> Tensor:
        return features[image].flatten(1)[:, position]

    rows = list(csv.DictReader(path.open()))
    queries = list(dict.fromkeys(row["query_image"] for row in rows))
    assert queries == ["06.jpg", "09.jpg", "12.jpg"]
    assert [row["query_image"] for row in rows] == [name for name in queries for _ in range(2)]
    assert [row["rank"] for row in rows] == ["1", "2"] * 3
    for name in queries:
        position = sample_position(int(name[:2]), 3, 0)
        query = names.index(name), position
        found = [row for row in rows if row["query_image"] == name]
        assert len({row["image"] for row in found} - {name}) == 2
        nearest = nearest_by_loops(features.double().numpy(), query, range(len(names)), 2)
        for row, (score, _, _) in zip(found, nearest):
            assert divmod(position, 3) == (int(row["query_row"]), int(row["query_column"]))
            patches = (
                patch_of(query[0], position),
                patch_of(names.index(row["image"]), 3 * int(row["row"]) + int(row["column"])),
            )
            assert float(row["score"]) == pytest.approx(score, abs=1e-4)
            assert F.cosine_similarity(*patches, dim=0).item() == pytest.approx(score, abs=1e-4)


def test_student_is_shown_where_it_is_named(checkpoints: Path, images: Path, tmp_path: Path) -> None:
    path, folder = checkpoints / "gtsa.pth", tmp_path / "out"
    viz_slots.main([*command(path, images, "--export", str(folder), "--encoder", "student"), "--max-images", "1"])
    with torch.no_grad():
        expected = load_encoder(path, "student")(normalize(crops_of(images)[0].pixels[None] / 255))
    with np.load(folder / "features/00.npz") as arrays:
        np.testing.assert_allclose(arrays["features"], expected[0].numpy(), rtol=1e-3, atol=1e-3)
    assert json.loads((folder / "metadata.json").read_text())["encoder"] == "student"


def test_slots_on_a_vit_are_shown_as_those_on_a_resnet(
    checkpoints: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, page, folder = checkpoints / "slotcon.pth", tmp_path / "page.html", tmp_path / "out"
    flags = ["--figure", "maps", "--save-path", str(tmp_path), "--html", str(page), "--export", str(folder)]
    figure = drawn_figure(slot_outputs, command(path, images, *flags), monkeypatch)
    assert len([axes for axes in figure.axes if axes.images]) == 3
    assert "Nearest images of each prototype" in page.read_text()
    with np.load(folder / "scores/00.npz") as arrays, torch.no_grad():
        _, expected = load_slot_model(path)(normalize(pixels_of(crops_of(images), 0) / 255))
        np.testing.assert_allclose(arrays["scores"], expected[0].numpy(), atol=1e-3)


@pytest.mark.parametrize(("train_size", "size"), [(32, 64), (28, 64), (44, 96), (224, 448), (7, 448)])
def test_default_image_size_is_the_multiple_of_the_patch_size_near_twice_that_of_training(
    train_size: int, size: int, checkpoints: Path
) -> None:
    path = checkpoints / "gtsa.pth"
    args = viz_slots.parse_args(["--model-path", str(path)])
    model = viz_slots.load_model(args, utils.checkpoint.load(path, "--model-path"))
    assert viz_slots.choose_image_size(args, {"image_size": train_size}, model) == size


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--figure", "neighbors"], "--figure neighbors: .* has no prototypes; use pca or attention or patches"),
        (["--figure", "usage"], "--figure usage: .* has no prototypes"),
        (["--image-size", "50"], "--image-size 50: not a multiple of the patch size 16; use 48 or 64"),
        (["--output-stride", "16"], "--output-stride 16: .* patch size"),
        (["--arch", "vit_tiny_patch32_224"], "--arch vit_tiny_patch32_224: .* has vit_tiny_patch16_224"),
        (["--num-prototypes", "8"], "--num-prototypes 8: .* has no prototypes; omit it"),
        (["--idxs", "3"], "--idxs 3: .*gtsa.pth has no prototypes; omit it"),
        (["--data-dir", "missing"], "--data-dir missing: no such folder"),
        (["--figure", "patches", "--max-images", "1"], "--figure patches: .* only one image"),
        (["--html", "page.html", "--max-images", "1"], "--html: there is only one image"),
    ],
)
def test_invalid_call_is_refused_in_one_line(
    flags: list[str], message: str, checkpoints: Path, images: Path, tmp_path: Path, capsys: Captured
) -> None:
    argv = command(checkpoints / "gtsa.pth", images, "--save-path", str(tmp_path), *flags)
    line = run_expecting_usage_error(viz_slots.main, argv, capsys)
    assert re.search(message, line), line
    assert not list(tmp_path.iterdir())
