"""The commands and the code of the READMEs."""

import re
import runpy
import shlex
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import main_pretrain
import models
from transfer.encoders import load_encoder

ROOT = Path(__file__).parents[1]
READMES = sorted(
    path for path in ROOT.rglob("README.md") if not {".venv", "output"} & set(path.relative_to(ROOT).parts)
)


def code_blocks(readme: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", readme.read_text(), flags=re.DOTALL)


def commands(readme: Path) -> list[list[str]]:
    """Return the commands of the bash blocks of a README as words."""
    text = "\n".join(code_blocks(readme, "bash")).replace("\\\n", " ")
    return [shlex.split(line, comments=True) for line in text.splitlines() if shlex.split(line, comments=True)]


def python_flags() -> dict[str, set[str]]:
    """Return the flags that the READMEs pass to each Python script of the project."""
    flags = defaultdict(set)
    for readme in READMES:
        for words in commands(readme):
            script = next((word for word in words if word.endswith(".py") and not word.startswith("-")), "")
            if "python" in words or "torchrun" in words:
                own = words[words.index(script) + 1 :]
                own = own[: own.index("--")] if "--" in own else own
                flags[script] |= {word.split("=")[0] for word in own if word.startswith("--")}
    return flags


@pytest.mark.parametrize("readme", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_readme_names_existing_scripts_and_files(readme: Path) -> None:
    scripts = {word for words in commands(readme) for word in words if word.startswith(("./scripts/", "transfer/"))}
    links = set(re.findall(r"\]\((?!http)([^)#]+)", readme.read_text()))
    for name in scripts - {word for word in scripts if "..." in word}:
        linked = ("transfer/detection/datasets", "transfer/segmentation/data", "transfer/classification/data")
        is_made = name.startswith(linked)
        assert is_made or (ROOT / name).exists(), name
    for name in links:
        assert (readme.parent / name).exists(), name


@pytest.mark.parametrize(("script", "flags"), sorted((name, sorted(flags)) for name, flags in python_flags().items()))
def test_readme_flags_exist(
    script: str, flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "path", [str((ROOT / script).parent), *sys.path])
    variants = {"benchmark.py": ("step", "loader", "end-to-end"), "main_pretrain.py": ("", "--method gtsa")}
    commands_of_script = variants.get(Path(script).name, ("",))
    text = ""
    for command in commands_of_script:
        monkeypatch.setattr(sys, "argv", [script, *command.split(), "--help"])
        with pytest.raises(SystemExit):
            runpy.run_path(str(ROOT / script), run_name="__main__")
        text += capsys.readouterr().out
    for flag in flags:
        assert flag in text, f"{script} has no {flag}"


def test_readme_method_trains_and_its_encoder_loads(
    tiny: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = next(block for block in code_blocks(ROOT / "README.md", "python") if "(Method)" in block)
    assert len(code.splitlines()) < 60
    namespace: dict[str, type] = {}
    exec(code, namespace)
    monkeypatch.setitem(models.METHODS, "pixel-byol", namespace["PixelBYOL"])
    argv = [*tiny(), "--method", "pixel-byol"]
    position = argv.index("--num-prototypes")  # it has none
    del argv[position : position + 2]
    assert main_pretrain.parse_args(["--method", "pixel-byol"]).epochs == 100
    main_pretrain.main(argv)
    state = torch.load(tmp_path / "run" / "current.pth", weights_only=True)
    assert state["step"] == 4
    features = load_encoder(tmp_path / "run" / "current.pth")(torch.zeros(1, 3, 64, 64))
    assert features.shape == (1, 512, 2, 2)
    torch.manual_seed(0)
    initial = main_pretrain.build_method(main_pretrain.parse_args(argv))
    weights = initial.encoder_q.state_dict()["conv1.weight"]
    assert not torch.equal(state["model"]["encoder_q.conv1.weight"], weights)
