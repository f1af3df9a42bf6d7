"""viz_slots.py: nearest images, usage, regions, figures, exported files, and the mistakes that its users make."""

import argparse
import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import main_pretrain
import viz_slots
from data.views import center_view
from models import build_method
from tests.helpers import TINY, run_expecting_usage_error
from transfer.trained_slots import load_slots
from transfer.figures.looking import Seen
from transfer.figures.page import build_page
from transfer.figures.pictures import lit_regions
from transfer.figures.regions import border, fine_side, light_up, middle, seams, winners
from transfer.figures.sheet import columns, shorten
from transfer.figures.survey import Nearest, Survey, draw_sample
from utils.visualization import normalize

K, WIDTH, SIZE = 8, 16, 96
UNUSED = (5, 7)
ROOT = Path(__file__).parents[1]
FLAGS = ["--image-size", str(SIZE), "--device", "cpu", "--num-workers", "0", "--dpi", "40"]


def pixels(path: Path) -> Tensor:
    """(3, SIZE, SIZE) uint8: an image's largest centered square."""
    with Image.open(path) as image:
        return center_view(image, SIZE)


@pytest.fixture(scope="session")
def state(images: Path) -> dict[str, Any]:
    """A checkpoint whose prototypes are features of the images, but for two that no image comes near."""
    flags = ["--dataset", "folder", "--data-dir", str(images), *TINY, "--image-size", str(SIZE // 2)]
    args = main_pretrain.parse_args(flags)
    torch.manual_seed(0)
    method: Any = build_method(args).eval()
    photos = torch.stack([pixels(path) for path in sorted(images.iterdir())]) / 255
    with torch.no_grad():
        for encoder in (method.encoder_q, method.encoder_k):
            for name, parameter in encoder.named_parameters():
                if name.endswith("bn2.weight"):
                    parameter.fill_(1)  # blocks start as the identity, which makes all cells alike
        for half in "qk":
            encoder, projector = getattr(method, f"encoder_{half}"), getattr(method, f"projector_{half}")
            cells = projector(encoder(normalize(photos))).transpose(0, 1).flatten(1).T
            projector.mlp[6].bias -= cells.mean(dim=0)
            cells = cells - cells.mean(dim=0)
            prototypes = getattr(method, f"grouping_{half}").slot_embed.weight
            prototypes.copy_(cells[torch.arange(K) * (17 if half == "k" else 16)])
            drawn = torch.randn(9000, WIDTH)
            score = F.normalize(cells, dim=1) @ F.normalize(torch.cat([prototypes, drawn]), dim=1).T
            best = score[:, [number for number in range(K) if number not in UNUSED]].amax(dim=1, keepdim=True)
            worst = (score - best).amax(dim=0)
            lonely = worst.argsort()[: len(UNUSED)]
            assert worst[lonely].max() < -0.02
            prototypes[list(UNUSED)] = torch.cat([prototypes, drawn])[lonely]
    return {"args": vars(args), "model": method.state_dict(), "epoch": 3}


@pytest.fixture
def model(state: dict[str, Any], tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    torch.save(state, folder / "current.pth")
    return folder / "current.pth"


def command(model: Path, *more: str) -> list[str]:
    return ["--model_path", str(model), *FLAGS, *more]


def look(model: Path, images: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Projections, scores and prototypes by the teacher, all images at once."""
    slots = load_slots(model)
    photos = torch.stack([pixels(path) for path in sorted(images.iterdir())]) / 255
    projections, scores = slots(normalize(photos))
    return projections, scores, slots.prototypes


# Nearest images


def nearest_by_sorting(scores: np.ndarray, k: int) -> list[list[tuple[int, float]]]:
    """The k best images (N, K) of each prototype, by sorting all of them; of equal ones the lower number first."""
    ranked = []
    for column in scores.T:
        order = sorted(
            (number for number in range(len(column)) if column[number] > -np.inf), key=lambda n: (-column[n], n)
        )
        ranked.append([(number, float(column[number])) for number in order[:k]])
    return ranked


@pytest.mark.parametrize("batch", [1, 7, 64, 200])
@pytest.mark.parametrize("shuffled", [False, True])
def test_the_running_top_k_is_that_of_all_images(batch: int, shuffled: bool) -> None:
    rng = np.random.default_rng(0)
    scores = np.round(rng.standard_normal((200, 12)), 1).astype(np.float32)  # rounded: many are equal
    scores[rng.random(scores.shape) < 0.3] = -np.inf
    scores[:, 4] = -np.inf
    scores[3:, 5] = -np.inf
    nearest = Nearest(12, 10)
    numbers = rng.permutation(200) if shuffled else np.arange(200)
    for start in range(0, 200, batch):
        some = numbers[start : start + batch]
        nearest.add(torch.from_numpy(some), torch.from_numpy(scores[some]))
        assert nearest.scores.untyped_storage().nbytes() == 12 * 10 * 4
        assert nearest.images.untyped_storage().nbytes() == 12 * 10 * 8
    assert [nearest.of(prototype) for prototype in range(12)] == nearest_by_sorting(scores, 10)
    assert nearest.of(4) == []
    assert len(nearest.of(5)) <= 3


def test_sampling_takes_used_prototypes_once_each_and_by_the_seed_alone() -> None:
    used = [3, 5, 8, 9, 20, 31, 40, 41, 60, 77]
    for count in (1, 4, 10, 50):
        drawn = draw_sample(used, count, seed=1)
        assert drawn == draw_sample(used, count, seed=1)
        assert len(set(drawn)) == len(drawn) == min(count, len(used))
        assert set(drawn) <= set(used)
    assert len({tuple(draw_sample(used, 4, seed)) for seed in range(20)}) > 10


def random_seen(images: int, rng: np.random.Generator) -> Seen:
    projections = torch.from_numpy(rng.standard_normal((images, 5, 3, 4)).astype(np.float32))
    prototypes = torch.from_numpy(rng.standard_normal((6, 5)).astype(np.float32))
    scores = torch.einsum("kd,bdhw->bkhw", F.normalize(prototypes, dim=1), F.normalize(projections, dim=1))
    blank = torch.zeros(images, 3, 8, 8, dtype=torch.uint8)
    return Seen(torch.arange(images), blank, torch.zeros(images, 4), projections, scores), prototypes  # type: ignore


def test_a_survey_counts_what_loops_count() -> None:
    seen, prototypes = random_seen(9, np.random.default_rng(3))  # type: ignore[misc]
    survey = Survey(prototypes, 0.05, topk=9)
    for part in (slice(0, 2), slice(2, 9)):
        survey.add(Seen(*(tensor[part] for tensor in seen)))
    z, s, p = (tensor.double().numpy() for tensor in (seen.projections, seen.scores, prototypes))
    using, area, histogram = [0] * 6, [0.0] * 6, [0] * 7
    similarity = np.full((9, 6), -np.inf)
    for image in range(9):
        there = set()
        weights, totals = np.zeros(6), np.zeros((6, 5))
        for row in range(3):
            for column in range(4):
                cell = s[image, :, row, column]
                there.add(int(cell.argmax()))
                area[int(cell.argmax())] += 1 / 12
                attention = np.exp(cell / 0.05) / np.exp(cell / 0.05).sum() + 1e-6
                weights += attention
                totals += attention[:, None] * z[image, :, row, column]
        for prototype in there:
            using[prototype] += 1
            slot = totals[prototype] / weights[prototype]
            similarity[image, prototype] = slot @ p[prototype] / np.linalg.norm(slot) / np.linalg.norm(p[prototype])
        histogram[len(there)] += 1
    assert survey.images == 9
    assert survey.images_using.tolist() == using
    assert survey.slots_histogram.tolist() == histogram
    np.testing.assert_allclose(survey.area.numpy(), area, rtol=1e-6)
    assert survey.slots_per_image == pytest.approx(sum(using) / 9)
    assert survey.used == [number for number in range(6) if using[number]]
    for prototype, ranked in enumerate(nearest_by_sorting(similarity, 9)):
        assert [image for image, _ in survey.nearest.of(prototype)] == [image for image, _ in ranked]
        np.testing.assert_allclose(
            [score for _, score in survey.nearest.of(prototype)], [score for _, score in ranked], atol=1e-5
        )


def test_the_area_is_divided_evenly_or_taken_by_one() -> None:
    survey = Survey(torch.eye(4), 0.07, topk=1)
    survey.area = torch.tensor([3.0, 3.0, 0.0, 3.0]).double()
    assert survey.effective == pytest.approx(3)
    survey.area = torch.tensor([0.0, 0.0, 0.0, 9.0]).double()
    assert survey.effective == pytest.approx(1)


# Regions


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("side", [3, 20, 35, 64])
def test_winners_are_the_arg_max_of_all_interpolated_scores(side: int, smooth: bool) -> None:
    scores = torch.randn(300, 5, 5, generator=torch.Generator().manual_seed(side))
    if smooth:
        scores = F.avg_pool2d(scores, 3, 1, 1)
    everything = F.interpolate(scores[None], (side, side), mode="bilinear", align_corners=False)[0]
    assert torch.equal(winners(scores, side), everything.argmax(dim=0))


@pytest.mark.parametrize(("cells", "about"), [(3, 100), (7, 210), (14, 98), (14, 5), (1, 64)])
def test_at_a_fine_side_every_slot_that_wins_a_cell_has_a_region(cells: int, about: int) -> None:
    side = fine_side(cells, about)
    assert side % cells == 0
    assert abs(side - about) <= cells or side == cells
    scores = torch.randn(500, cells, cells, generator=torch.Generator().manual_seed(0))
    assert set(scores.argmax(dim=0).unique().tolist()) <= set(winners(scores, side).unique().tolist())


def test_a_region_keeps_its_colors_and_the_rest_fades() -> None:
    picture = torch.rand(3, 40, 40, generator=torch.Generator().manual_seed(0))
    region = torch.zeros(40, 40, dtype=torch.bool)
    region[5:20, 10:] = True
    lit = light_up(picture, region, alpha=0.25).permute(2, 0, 1)
    inner = region & ~border(region, 1)
    as_bytes = (picture * 255).round()
    assert torch.equal(lit[:, inner].float(), as_bytes[:, inner])
    gray = (picture.mean(dim=0) * 0.75 * 255).round()
    for channel in lit.float():
        assert torch.equal(channel[~region], gray[~region])
    edge = border(region, 1)
    assert edge[5, 10:].all()
    assert edge[5:20, 10].all()
    assert not edge[6:19, 39].any()  # the rim of the picture is no border
    assert not edge[~region].any()


def test_seams_run_between_slots_and_the_middle_is_inside() -> None:
    won = torch.zeros(40, 40, dtype=torch.int64)
    won[:, 25:] = 3
    lines = seams(won, 2)
    assert lines[:, 25:27].all()
    assert lines.sum() == 80
    ring = torch.zeros(64, 64, dtype=torch.bool)
    ring[4:60, 4:60] = True
    ring[14:50, 14:] = False
    row, column = middle(ring)
    assert ring[row, column]
    row, column = middle(won == 0)
    assert 8 <= row <= 32
    assert 6 <= column <= 18


def test_pictures_show_the_region_in_the_image_asked_for(model: Path, images: Path) -> None:
    observer = observe(model, images)
    shown = list(lit_regions(observer, {2: [4, 0], 1: [4], 6: []}, about=33, alpha=1))
    assert sorted((lit.prototype, lit.rank) for lit in shown) == [(1, 0), (2, 0), (2, 1)]
    _, scores, _ = look(model, images)
    for lit in shown:
        image = {(2, 0): 4, (2, 1): 0, (1, 0): 4}[lit.prototype, lit.rank]
        fine = F.interpolate(scores[image][None], (33, 33), mode="bilinear", align_corners=False)[0]
        agree = lit.picture.any(dim=2) == (fine.argmax(dim=0) == lit.prototype)
        assert agree.float().mean() > 0.99  # but for pixels that are black in the image


def observe(model: Path, images: Path, **more: Any) -> Any:
    from transfer.figures.looking import Observer, Squares

    args = viz_slots.parse_args(command(model, "--data-dir", str(images), "--dataset", "folder"))
    squares = Squares(viz_slots.find_images(args, {}), SIZE)
    return Observer(load_slots(model), squares, torch.device("cpu"), more.get("batch_size", 16), 0)


def test_pages_are_filled_well() -> None:
    assert [columns(count, 1.0, 1.3) for count in (1, 2, 3)] == [1, 2, 3]
    assert columns(6, 1.77, 3.77) == 3
    assert shorten("abcdefghij", 10) == "abcdefghij"
    assert shorten("abcdefghijk", 7) == "abc…ijk"


# The command


@pytest.mark.parametrize("figure", viz_slots.FIGURES)
def test_each_figure_lies_beside_the_checkpoint_and_is_the_same_again(
    figure: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = model.parent / f"slots_{figure}.png"
    viz_slots.main(command(model, "--figure", figure, "--points", "100"))
    assert str(wanted) in capsys.readouterr().out
    with Image.open(wanted) as picture:
        assert min(picture.size) > 100
    before = wanted.read_bytes()
    viz_slots.main(command(model, "--figure", figure, "--points", "100", "--overwrite"))
    assert wanted.read_bytes() == before


def test_neighbors_is_the_default_and_flags_take_underscores_or_dashes(model: Path, tmp_path: Path) -> None:
    flags = ["--save{}path", "--num{}prototypes=8", "--dim{}hidden", "--dim{}out", "--batch{}size"]
    values = [[str(tmp_path)], [], ["32"], ["16"], ["3"]]
    drawn = []
    for mark in "_-":
        said = [word for flag, value in zip(flags, values) for word in (flag.format(mark), *value)]
        viz_slots.main(command(model, *said, "--topk", "2", "--arch", "resnet18", "--overwrite"))
        drawn.append((tmp_path / "slots_neighbors.png").read_bytes())
    assert drawn[0] == drawn[1]


def test_chosen_prototypes_may_be_unused_and_topk_larger_than_the_data_set(model: Path, tmp_path: Path) -> None:
    viz_slots.main(command(model, "--idxs", "7", "0", "5", "0", "--topk", "50", "--save-path", str(tmp_path / "a.pdf")))
    assert (tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")
    viz_slots.main(command(model, "--idxs", "7", "--save-path", str(tmp_path / "b.png")))
    viz_slots.main(
        command(model, "--figure", "maps", "--idxs", "1", "--sampling", "1", "--save-path", str(tmp_path / "c.svg"))
    )
    assert (tmp_path / "c.svg").read_bytes().startswith(b"<?xml")


def export(model: Path, folder: Path, *more: str) -> dict[str, np.ndarray]:
    viz_slots.main(command(model, "--export", str(folder), "--topk", "3", *more))
    with np.load(folder / "prototypes.npz") as arrays:
        return dict(arrays)


def test_exported_files_are_what_the_model_sees(model: Path, images: Path, tmp_path: Path) -> None:
    arrays = export(model, tmp_path / "out")
    _, scores, prototypes = look(model, images)
    files = sorted(images.iterdir())
    fine = F.interpolate(scores, (SIZE, SIZE), mode="bilinear", align_corners=False).argmax(dim=1)
    assert not (model.parent / "slots_neighbors.png").exists()
    rows = list(csv.DictReader((tmp_path / "out/images.csv").open()))
    assert [row["image"] for row in rows] == [file.name for file in files]
    for number, row in enumerate(rows):
        with Image.open(tmp_path / "out" / row["mask"]) as mask:
            assert mask.mode == "P"
            np.testing.assert_array_equal(np.array(mask), fine[number].numpy())
        with np.load(tmp_path / "out" / row["scores"]) as file:
            assert file["scores"].dtype == np.float16
            np.testing.assert_allclose(file["scores"], scores[number].numpy(), atol=6e-4)
            assert file["crop"].tolist() == [12, 0, 84, 72] == [int(row[name]) for name in ("x0", "y0", "x1", "y1")]
    np.testing.assert_array_equal(np.load(tmp_path / "out/prototypes.npy"), prototypes.numpy())
    used = [len(set(one.argmax(dim=0).flatten().tolist()) & {k}) for k in range(K) for one in scores]
    assert arrays["images_using"].tolist() == np.reshape(used, (K, -1)).sum(axis=1).tolist()
    assert [number for number in range(K) if not arrays["images_using"][number]] == list(UNUSED)
    assert json.loads((tmp_path / "out/facts.json").read_text())["model"] == "current.pth"
    assert "96 x 96" in (tmp_path / "out/README.txt").read_text()


@pytest.mark.parametrize("batch", [1, 5])
def test_the_batch_size_changes_nothing(batch: int, model: Path, tmp_path: Path) -> None:
    whole = export(model, tmp_path / "whole", "--batch-size", "16")
    parts = export(model, tmp_path / "parts", "--batch-size", str(batch))
    for name in ("images_using", "nearest"):
        np.testing.assert_array_equal(whole[name], parts[name])
    for name in ("area", "nearest_scores"):
        np.testing.assert_allclose(whole[name], parts[name], atol=1e-5)
    for mask in (tmp_path / "whole/masks").iterdir():
        assert mask.read_bytes() == (tmp_path / "parts/masks" / mask.name).read_bytes()


def test_workers_change_nothing(model: Path, tmp_path: Path) -> None:
    alone = export(model, tmp_path / "alone")
    helped = export(model, tmp_path / "helped", "--num-workers", "2", "--batch-size", "4")
    np.testing.assert_array_equal(alone["nearest"], helped["nearest"])


def test_masks_of_many_prototypes_have_16_bits(state: dict[str, Any], tmp_path: Path) -> None:
    many = {name: value for name, value in state["model"].items() if not name.startswith("grouping_k")}
    cells = state["model"]["grouping_k.slot_embed.weight"][:1]
    noise = torch.randn(300, WIDTH, generator=torch.Generator().manual_seed(0))
    many["grouping_k.slot_embed.weight"] = torch.cat([noise, cells])
    torch.save({"model": many, "args": state["args"]}, tmp_path / "many.pth")
    export(tmp_path / "many.pth", tmp_path / "out", "--max-images", "2")
    masks = sorted((tmp_path / "out/masks").iterdir())
    assert [mask.name for mask in masks] == ["00.png", "08.png"]
    with Image.open(masks[0]) as mask:
        assert mask.mode.startswith("I")
        assert 256 < np.array(mask).max() <= 300


def test_images_of_one_name_in_two_forms_do_not_overwrite_each_other(model: Path, images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    (folder / "deep").mkdir(parents=True)
    for source, name in (("00.jpg", "a.jpg"), ("01.jpg", "b.jpg"), ("02.jpg", "deep/a.jpg")):
        shutil.copy(images / source, folder / name)
    Image.open(images / "03.jpg").save(folder / "a.png")
    export(model, tmp_path / "out", "--data-dir", str(folder))
    masks = {str(mask.relative_to(tmp_path / "out/masks")) for mask in (tmp_path / "out/masks").rglob("*.png")}
    assert masks == {"a.jpg.png", "a.png.png", "b.png", "deep/a.png"}


def test_the_student_sees_otherwise(model: Path, tmp_path: Path) -> None:
    teacher, student = export(model, tmp_path / "k"), export(model, tmp_path / "q", "--encoder", "student")
    assert not np.array_equal(teacher["prototypes"], student["prototypes"])
    assert not np.array_equal(teacher["nearest_scores"], student["nearest_scores"])


def test_the_temperature_of_training_is_used(state: dict[str, Any], tmp_path: Path) -> None:
    scores = []
    for temperature in (0.01, 1.0):
        path = tmp_path / f"{temperature}.pth"
        torch.save({**state, "args": {**state["args"], "teacher_temp": temperature}}, path)
        scores.append(export(path, tmp_path / f"{temperature}")["nearest_scores"])
    assert not np.allclose(*scores, atol=0.01)


def test_a_released_checkpoint_gives_the_same(state: dict[str, Any], model: Path, images: Path, tmp_path: Path) -> None:
    weights = {f"module.{name}": value for name, value in state["model"].items()}
    told = argparse.Namespace(dataset="COCO", data_dir="/nowhere", arch="resnet18", teacher_temp=0.07, image_size=48)
    released = {"args": told, "model": weights, "optimizer": {}, "scheduler": {}, "epoch": 800}
    torch.save(released, tmp_path / "released.pth")
    ours = export(model, tmp_path / "ours")
    theirs = export(tmp_path / "released.pth", tmp_path / "theirs", "--data-dir", str(images), "--dataset", "folder")
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name])


@pytest.mark.parametrize("method", ["slotcon", "slotfa"])
def test_what_training_wrote_can_be_looked_at(method: str, tiny: Callable[..., list[str]], tmp_path: Path) -> None:
    main_pretrain.main(tiny("--method", method, "--epochs", "1", "--warmup-epoch", "0"))
    viz_slots.main(
        ["--model-path", str(tmp_path / "run/current.pth"), "--device", "cpu", "--html", str(tmp_path / "a.html")]
    )
    assert "16 images of folder, 128 px" in (tmp_path / "a.html").read_text()  # twice the side of training
    assert not (tmp_path / "run/slots_neighbors.png").exists()


def test_unreadable_images_are_named_once_and_skipped(
    model: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "images"
    shutil.copytree(images, folder)
    (folder / "00.jpg").write_bytes(b"no image")
    (folder / "07.jpg").write_bytes((images / "07.jpg").read_bytes()[:200])
    more = ["--data-dir", str(folder), "--dataset", "folder", "--batch-size", "1"]
    viz_slots.main(command(model, *more, "--html", str(tmp_path / "a.html"), "--export", str(tmp_path / "out")))
    said = capsys.readouterr().err.splitlines()
    assert [line.rpartition("/")[2] for line in said] == ["00.jpg", "07.jpg"]
    assert "14 images" in (tmp_path / "a.html").read_text()
    assert len(list((tmp_path / "out/masks").iterdir())) == 14


def test_a_page_is_self_contained_whatever_files_are_called(model: Path, images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "im$a_ges"
    (folder / "<").mkdir(parents=True)  # in it, a file's name closes the page's script
    for number, file in enumerate(sorted(images.iterdir())):
        shutil.copy(file, folder / "<" / f"script>{number} & $x_é'\".jpg")
    observer = observe(model, folder)
    slots = load_slots(model)
    survey = Survey(slots.prototypes, 0.07, 3)
    for seen in observer.look(range(16), "images"):
        survey.add(seen)
    page = build_page(observer, survey, 0.5, "</title><b>facts").decode()
    assert "</title><b>" not in page
    assert "http://" not in page
    assert "https://" not in page
    assert page.count("</script>") == 2
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert len(data["prototypes"]) == K
    assert [bool(prototype["strip"]) for prototype in data["prototypes"]] == [k not in UNUSED for k in range(K)]
    for k, prototype in enumerate(data["prototypes"]):
        named = [(data["names"][image], score) for image, score in prototype["nearest"]]
        expected = [(observer.squares.name(image), score) for image, score in survey.nearest.of(k)]
        assert named == [(name, pytest.approx(score, abs=6e-4)) for name, score in expected]


def test_the_command_line_on_photographs(photographs: Path, model: Path, tmp_path: Path) -> None:
    flags = ["--dataset", "COCOval", "--data_dir", str(photographs), "--max-images", "24", "--idxs", "0", "3"]
    where = ["--save_path", str(tmp_path / "figure.png"), "--html", str(tmp_path / "page.html")]
    run = [sys.executable, str(ROOT / "viz_slots.py"), *command(model, *flags, *where, "--dpi", "100")]
    done = subprocess.run(run, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.splitlines() == [f"figure: {tmp_path / 'figure.png'}", f"page: {tmp_path / 'page.html'}"]
    with Image.open(tmp_path / "figure.png") as picture:
        assert np.array(picture.convert("RGB")).std() > 20


# Mistakes


mistake = partial(run_expecting_usage_error, viz_slots.main)


@pytest.mark.parametrize(
    ("flags", "found", "wanted"),
    [
        (["--num_prototypes", "256"], "--num-prototypes 256", "has 8"),
        (["--dim_out", "256"], "--dim-out 256", "has 16"),
        (["--dim_hidden", "4096"], "--dim-hidden 4096", "has 32"),
        (["--arch", "resnet50"], "--arch resnet50", "has resnet18"),
        (["--arch", "resnet51"], "resnet51", "resnet50"),
        (["--figure", "umap"], "umap", "neighbors"),
        (["--idxs", "3", "8"], "--idxs 8", "0 to 7"),
        (["--idxs", "-1"], "-1", "at least 0"),
        (["--figure", "usage", "--idxs", "3"], "--idxs", "neighbors"),
        (["--data-dir", "nowhere"], "--data-dir nowhere", "no such folder"),
        (["--dataset", "COCO"], "--dataset COCO", "train2017"),
        (["--dataset", "VOC"], "VOC", "COCO"),
        (["--save-path", "nowhere/a.png"], "--save-path nowhere/a.png", "not there"),
        (["--save-path", "a.txt"], "--save-path a.txt", ".png"),
        (["--html", "nowhere/a.html"], "--html nowhere/a.html", "not there"),
        (["--html", "/"], "--html /", "a file"),
        (["--export", "nowhere/out"], "--export nowhere/out", "not there"),
        (["--topk", "0"], "--topk", "at least 1"),
        (["--topk", "101"], "--topk 101", "100"),
        (["--alpha", "2"], "--alpha", "0 to 1"),
        (["--output-stride", "16"], "--output-stride 16", "resnet50"),
        (["--dpi", "20000"], "pixels", "--dpi"),
        (["--samplings", "2"], "--samplings", "--help"),
        pytest.param(
            ["--device", "cuda"],
            "--device",
            "cpu",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there"),
        ),
    ],
)
def test_a_wrong_flag_is_one_line(
    flags: list[str],
    found: str,
    wanted: str,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    line = mistake(command(model, *flags), capsys)
    assert found in line
    assert wanted in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    assert [path.name for path in model.parent.iterdir()] == ["current.pth"]


def test_nothing_is_overwritten_unasked(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("run/slots_neighbors.png", "a.html", "b.png", "out/masks/x.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("mine")
    for flags in ([], ["--html", "a.html"], ["--save-path", "b.png"], ["--export", "out"]):
        there = [flag if flag.startswith("--") else str(tmp_path / flag) for flag in flags]
        line = mistake(command(model, *there), capsys)
        assert "--overwrite" in line
        assert (flags or ["--save-path"])[0] in line
    assert {path.read_text() for path in tmp_path.rglob("*.*") if path.is_file() and path.suffix != ".pth"} == {"mine"}


def test_a_checkpoint_without_slots(
    state: dict[str, Any], images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    without = {name: value for name, value in state["model"].items() if not name.startswith("grouping")}
    backbone = {name[10:]: value for name, value in state["model"].items() if name.startswith("encoder_k.")}
    for number, model in enumerate((without, backbone)):
        path = tmp_path / f"{number}.pth"
        torch.save({"model": model, "args": state["args"]}, path)
        line = mistake(command(path), capsys)
        assert str(path) in line
        assert "prototypes" in line
        assert "slotcon" in line
    nothing = tmp_path / "nothing.pth"
    assert "no such file" in mistake(command(nothing), capsys)
    nothing.write_bytes(b"nothing")
    assert str(nothing) in mistake(command(nothing), capsys)


def test_no_images(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    there = ["--data-dir", str(folder), "--dataset", "folder"]
    assert "no images" in mistake(command(model, *there), capsys)
    (folder / "a.jpg").write_bytes(b"no image")
    with pytest.raises(SystemExit):
        viz_slots.main(command(model, *there))
    assert "none of 1 images can be read" in capsys.readouterr().err.splitlines()[-1]
    assert "4" not in str(list(model.parent.glob("slots*")))


def test_where_the_images_lie_has_to_be_known(
    state: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for told, words in (({}, "names none"), ({"data_dir": "/away"}, "/away")):
        torch.save({"model": state["model"], "args": told}, tmp_path / "a.pth")
        line = mistake(command(tmp_path / "a.pth"), capsys)
        assert "--data-dir" in line
        assert words in line
