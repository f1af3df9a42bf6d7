"""What happens during a run: non-finite losses, unreadable images, accumulation, other people's weights."""

import argparse
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor

import main_pretrain
from data.datasets import build_dataset
from data.loader import collate
from data.loader import prefetch
from models import build_method
from models.slotcon import SlotCon
from utils.batch import Batch
from utils.device import choose_device
from utils.errors import UsageError
from utils.finite import FiniteGuard, restore_unless_, zero_unless_
from utils.meter import Meter

Tiny = Callable[..., list[str]]


def state(path: Path) -> dict[str, Tensor]:
    return torch.load(path, weights_only=True)["model"]


def break_losses(monkeypatch: pytest.MonkeyPatch, bad: Callable[[int], bool]) -> None:
    """Make SlotCon's loss NaN in the steps that `bad` names."""
    forward = SlotCon.forward

    def broken(self: SlotCon, batch: Batch) -> dict[str, Tensor]:
        out = forward(self, batch)
        return {**out, "loss": out["loss"] * float("nan")} if bad(batch.step) else out

    monkeypatch.setattr(SlotCon, "forward", broken)


@pytest.mark.parametrize("optimizer", ["lars", "sgd", "adamw"])
@pytest.mark.parametrize("first_bad", [0, 2])
def test_a_step_with_a_non_finite_loss_changes_nothing_but_the_teacher(
    optimizer: str, first_bad: int, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 0 and 1 make epoch 1, steps 2 and 3 epoch 2; an epoch of bad steps leaves everything as it found it."""
    break_losses(monkeypatch, lambda step: step in (first_bad, first_bad + 1))
    flags = tiny("--optimizer", optimizer, "--save-freq", "1", "--teacher-momentum", "1")
    args = main_pretrain.parse_args(flags)
    torch.manual_seed(args.seed)
    initial = build_method(args).state_dict()
    main_pretrain.main(flags)
    first, second = state(tmp_path / "run/ckpt_epoch_1.pth"), state(tmp_path / "run/ckpt_epoch_2.pth")
    before, after = (initial, first) if first_bad == 0 else (first, second)
    assert [name for name in before if not torch.equal(before[name], after[name]) and "tracked" not in name] == []
    before, after = (first, second) if first_bad == 0 else (initial, first)
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert any("encoder_q" in name and "weight" in name for name in moved)
    assert any("running_mean" in name for name in moved)
    assert all(value.isfinite().all() for value in second.values())
    log = (tmp_path / "run/log.txt").read_text()
    assert f"step {first_bad}: the loss on rank 0 was not finite; step left out" in log
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [record["skipped_steps"] for record in records] == ([2, 0] if first_bad == 0 else [0, 2])


def test_a_finite_loss_with_a_gradient_that_is_not_leaves_the_step_out(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = SlotCon.forward

    def broken(self: SlotCon, batch: Batch) -> dict[str, Tensor]:
        out = forward(self, batch)
        root = (self.grouping_q.slot_embed.weight.sum() * 0).sqrt()  # 0, with an infinite slope
        return {**out, "loss": out["loss"] + root if batch.step == 2 else out["loss"]}

    monkeypatch.setattr(SlotCon, "forward", broken)
    main_pretrain.main(tiny())
    assert all(value.isfinite().all() for value in state(tmp_path / "run/current.pth").values())
    assert "step 2: the gradient was not finite; step left out" in (tmp_path / "run/log.txt").read_text()


def test_ten_non_finite_losses_in_a_row_stop_the_run(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    break_losses(monkeypatch, lambda step: step >= 2)
    with pytest.raises(SystemExit) as stopped:
        main_pretrain.main(tiny("--epochs", "9", "--save-freq", "1"))
    assert stopped.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "not finite, the last of 10 such steps in a row" in line
    assert "step 11" in line
    assert not (tmp_path / "run/ckpt_epoch_6.pth").exists()
    good, last = state(tmp_path / "run/ckpt_epoch_1.pth"), state(tmp_path / "run/current.pth")
    assert all(torch.equal(good[name], last[name]) for name in good if "_q" in name and "tracked" not in name)


def test_nine_in_a_row_do_not(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    break_losses(monkeypatch, lambda step: step not in (9, 19))
    main_pretrain.main(tiny("--epochs", "11"))
    assert (tmp_path / "run/ckpt_epoch_11.pth").exists()


def test_bits_are_selected_whatever_they_mean() -> None:
    odd = torch.tensor([float("nan"), float("inf"), -0.0, 1e-42, 3.0])
    for go in (0.0, 1.0):
        tensors, before = [odd.clone(), odd.flip(0).reshape(5, 1)], [torch.ones(5), torch.zeros(5, 1)]
        restore_unless_(torch.tensor(go), tensors, before)
        wanted = [odd, odd.flip(0).reshape(5, 1)] if go else before
        assert all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in zip(tensors, wanted))
        tensors = [odd.clone()]
        zero_unless_(torch.tensor(go), tensors)
        assert torch.equal(tensors[0].view(torch.int32), (odd * 1 if go else torch.zeros(5)).view(torch.int32))


def test_the_guard_makes_every_gradient_of_a_bad_loss_nan() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    guard = FiniteGuard(torch.nn.BatchNorm1d(3), torch.device("cpu"))
    guard.open_step()
    loss = weight.sum() + torch.inf
    (loss * guard.watch(loss)).backward()
    assert weight.grad is not None
    assert weight.grad.isnan().all()
    go, bad = guard.close_step(None)
    assert (go, bad.tolist()) == (0, [1.0])


@pytest.fixture
def many_images(images: Path, tmp_path: Path) -> Path:
    """A folder of 120 images."""
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(120):
        shutil.copy(images / f"{number % 16:02}.jpg", folder / f"{number:03}.jpg")
    return folder


def damage(path: Path) -> str:
    path.write_bytes(path.read_bytes()[:500])
    return str(path)


def test_an_unreadable_image_is_replaced_named_once_and_counted(many_images: Path, tiny: Tiny, tmp_path: Path) -> None:
    name = damage(many_images / "007.jpg")
    main_pretrain.main(tiny("--data-dir", str(many_images), "--batch-size", "40", "--print-freq", "1"))
    assert (tmp_path / "run/log.txt").read_text().count(name) == 1
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert records[-1]["unreadable_images"] == 1


def test_more_than_one_per_cent_unreadable_stop_the_run_with_a_list(
    many_images: Path, tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [damage(many_images / "007.jpg"), damage(many_images / "008.jpg")]
    with pytest.raises(SystemExit) as stopped:
        main_pretrain.main(tiny("--data-dir", str(many_images), "--batch-size", "40"))
    assert stopped.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "2 of 120 images cannot be read" in line
    assert all(name in line for name in names)
    assert not (tmp_path / "run/current.pth").exists()


def test_accumulated_batches_make_one_step_of_their_mean_gradient(tiny: Tiny) -> None:
    """SGD without momentum moves by the mean of what each of the batches alone would have moved."""
    flags = ["--optimizer", "sgd", "--momentum", "0", "--weight-decay", "0", "--warmup-epoch", "0", "--batch-size", "4"]
    args = main_pretrain.parse_args(tiny(*flags, "--accum-steps", "2"))
    dataset = build_dataset(args)
    batches = [collate([dataset[index] for index in range(first, first + 4)]) for first in (0, 4)]

    def moved(args: argparse.Namespace, *fed: Batch) -> Tensor:
        run = main_pretrain.build_run(args, choose_device(args), len(dataset))
        assert run.plan.peak_lr == run.plan.effective_batch / 256
        run.plan = dataclasses.replace(run.plan, peak_lr=1.0)
        before = run.method.encoder_q[0].weight.clone()  # type: ignore[index]
        guard, meter = FiniteGuard(run.method, run.device), Meter(run.device, len(dataset), run.plan.steps_per_epoch)
        main_pretrain.optimize(run, run.method, prefetch(fed, run.device), guard, meter, 0)
        return (run.method.encoder_q[0].weight - before).detach()  # type: ignore[index]

    alone = main_pretrain.parse_args(tiny(*flags))
    mean = (moved(alone, batches[0]) + moved(alone, batches[1])) / 2
    # The second batch meets a center that the first has moved, which the grouping loss feels a little.
    torch.testing.assert_close(moved(args, *batches), mean, rtol=0, atol=0.03 * float(mean.detach().abs().max()))


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_trains(amp: str, tiny: Tiny, tmp_path: Path) -> None:
    flags = ["--fp16"] if amp == "fp16" else ["--amp", amp]
    main_pretrain.main(tiny(*flags, "--clip-grad", "1"))
    assert json.loads((tmp_path / "run/config.json").read_text())["args"]["amp"] == amp
    checkpoint = torch.load(tmp_path / "run/current.pth", weights_only=True)
    assert all(value.dtype != torch.bfloat16 and value.isfinite().all() for value in checkpoint["model"].values())
    assert bool(checkpoint["scaler"]) == (amp == "fp16")


def test_the_gradient_is_clipped_to_the_norm_asked_for(tiny: Tiny, tmp_path: Path) -> None:
    """With SGD, no momentum and no decay one step moves the weights by lr times the clipped gradient."""
    flags = ["--optimizer", "sgd", "--momentum", "0", "--weight-decay", "0", "--clip-grad", "1e-3"]
    flags += ["--batch-size", "16", "--epochs", "1", "--warmup-epoch", "0", "--base-lr", "16"]
    argv = tiny(*flags)
    args = main_pretrain.parse_args(argv)
    torch.manual_seed(args.seed)
    before = build_method(args).state_dict()
    main_pretrain.main(argv)
    after = state(tmp_path / "run/current.pth")
    trained = [n for n, p in build_method(args).named_parameters() if p.requires_grad]
    moved = torch.stack([(after[name] - before[name]).norm() for name in trained]).norm()
    assert moved == pytest.approx(1e-3, rel=1e-2)


def released_checkpoint(args: argparse.Namespace, path: Path) -> dict[str, Tensor]:
    """A file as the authors released them: a Namespace, DDP's prefix, the optimizer's state."""
    torch.manual_seed(7)
    weights = build_method(args).state_dict()
    weights["center"] += 0.5
    entry = {f"module.{name}": value for name, value in weights.items()}
    torch.save({"args": args, "model": entry, "optimizer": {}, "scheduler": {}, "epoch": 800, "scaler": {}}, path)
    return weights


def test_the_weights_have_the_names_of_the_released_checkpoints(tiny_args: argparse.Namespace) -> None:
    resnet = [name for name in torchvision.models.resnet18().state_dict() if not name.startswith("fc.")]
    layers = {f"{layer}.{kind}" for layer in (0, 1, 3, 4, 6) for kind in ("weight", "bias")}
    layers |= {f"{layer}.{kind}" for layer in (1, 4) for kind in ("running_mean", "running_var", "num_batches_tracked")}
    expected = {"center", "grouping_q.slot_embed.weight", "grouping_k.slot_embed.weight"}
    expected |= {f"encoder_{side}.{name}" for side in "qk" for name in resnet}
    heads = ("projector_q", "projector_k", "predictor_slot")
    expected |= {f"{head}.mlp.{layer}" for head in heads for layer in layers}
    weights = build_method(tiny_args).state_dict()
    assert set(weights) == expected
    assert weights["center"].shape == (1, 8)
    assert weights["projector_q.mlp.0.weight"].shape == (32, 512, 1, 1)
    assert weights["predictor_slot.mlp.6.weight"].shape == (16, 32)


def initialized(argv: list[str]) -> dict[str, Tensor]:
    """The weights that a run starts from: it trains for one step at a learning rate of zero."""
    main_pretrain.main([*argv, "--base-lr", "0", "--batch-size", "16", "--epochs", "1", "--teacher-momentum", "1"])
    folder = Path(argv[argv.index("--output-dir") + 1])
    return state(folder / "current.pth")


def learned(name: str) -> bool:
    return not any(word in name for word in ("running", "tracked", "center"))


def test_init_takes_a_released_checkpoint_whole(tiny: Tiny, tiny_args: argparse.Namespace, tmp_path: Path) -> None:
    expected = released_checkpoint(tiny_args, tmp_path / "released.pth")
    found = initialized(tiny("--init", str(tmp_path / "released.pth")))
    assert set(found) == set(expected)
    for name in filter(learned, expected):
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=0, msg=name)


def test_init_with_another_number_of_prototypes_keeps_the_networks(
    tiny: Tiny, tiny_args: argparse.Namespace, tmp_path: Path
) -> None:
    expected = released_checkpoint(tiny_args, tmp_path / "released.pth")
    found = initialized(tiny("--init", str(tmp_path / "released.pth"), "--num-prototypes", "20"))
    assert found["grouping_k.slot_embed.weight"].shape == (20, 16)
    for name in filter(learned, expected):
        if "slot_embed" not in name:
            torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=0, msg=name)


@pytest.mark.parametrize("prefix", ["", "encoder_k.", "module.encoder_q.", "backbone."])
def test_init_takes_a_backbone_alone_for_student_and_teacher(prefix: str, tiny: Tiny, tmp_path: Path) -> None:
    torch.manual_seed(7)
    resnet = torchvision.models.resnet18().state_dict()
    torch.save({"state_dict": {f"{prefix}{name}": value for name, value in resnet.items()}}, tmp_path / "backbone.pth")
    found = initialized(tiny("--init", str(tmp_path / "backbone.pth")))
    for name in filter(learned, resnet):
        for encoder in ("encoder_q", "encoder_k") if not name.startswith("fc") else ():
            torch.testing.assert_close(found[f"{encoder}.{name}"], resnet[name], atol=1e-5, rtol=0, msg=name)


def test_init_refuses_a_file_without_an_encoder(tiny_args: argparse.Namespace, tmp_path: Path) -> None:
    from utils.checkpoint import initialize_from

    torch.save({"model": {"head.weight": torch.ones(2)}}, tmp_path / "head.pth")
    with pytest.raises(UsageError, match="no encoder"):
        initialize_from(build_method(tiny_args), tmp_path / "head.pth")


def test_a_dry_run_says_what_the_run_would_be_and_writes_nothing(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main_pretrain.main(tiny("--dry-run"))
    told = capsys.readouterr().out
    main_pretrain.main(tiny())
    size = (tmp_path / "run/current.pth").stat().st_size / 2**20
    assert "effective batch   8 = 8 over all processes x 1" in told
    assert "steps             4 = 2 epochs x 2" in told
    assert int(told.split("checkpoint size")[1].split()[0]) == pytest.approx(size, abs=1.5)


def test_the_help_is_grouped_and_tells_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main_pretrain.parse_args(["--method", "slotcon", "--help"])
    assert stopped.value.code == 0
    told = capsys.readouterr().out
    for group in ("data:", "encoder:", "method slotcon:", "optimization:", "run:"):
        assert f"\n{group}" in told
    assert "(default: 256)" in told
    assert "scenes (default: 0)" in told
    assert "None" not in told


def test_the_public_surface_is_there(tiny_args: argparse.Namespace) -> None:
    from data.loader import Batch, build_dataset
    from models import build_method
    from utils.checkpoint import load_weights
    from utils.optimizers import LARS

    assert callable(load_weights)
    assert callable(LARS)
    method = build_method(tiny_args)
    views = [torch.randn(2, 3, 64, 64) for _ in range(2)]
    crops, flips = torch.tensor([0.0, 0.0, 9.0, 9.0]).repeat(2, 2, 1), torch.zeros(2, 2, dtype=torch.bool)
    batch = Batch(views=views, crops=crops, flips=flips, turns=torch.zeros(2, 2).long(), index=torch.arange(2))
    method(batch)["loss"].backward()
    method.update_teacher(0.99)
    sample = build_dataset(tiny_args)[3]
    assert (sample.index, [view.shape for view in sample.views]) == (3, [(3, 64, 64)] * 2)


def test_the_published_recipe_is_the_default() -> None:
    args = main_pretrain.parse_args([])
    published = {"dataset": "COCO", "data_dir": "./data", "image_size": 224, "min_scale": 0.08, "arch": "resnet50"}
    published |= {"dim_hidden": 4096, "dim_out": 256, "num_prototypes": 256, "teacher_momentum": 0.99}
    published |= {"teacher_temp": 0.07, "student_temp": 0.1, "center_momentum": 0.9, "group_loss_weight": 0.5}
    published |= {"batch_size": 512, "base_lr": 1.0, "optimizer": "lars", "warmup_epoch": 5, "warmup_multiplier": 100}
    published |= {"weight_decay": 1e-5, "momentum": 0.9, "start_epoch": 1, "epochs": 800, "output_dir": "./output"}
    published |= {"auto_resume": False, "resume": "", "print_freq": 10, "save_freq": 50, "seed": 0, "num_workers": 8}
    published |= {"contrast_temp": 0.2, "output_stride": 32}
    assert {name: getattr(args, name) for name in published} == published
