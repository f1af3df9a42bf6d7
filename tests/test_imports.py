"""The rules of the source tree, from the imports of the code itself."""

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from models import METHODS

ROOT = Path(__file__).parents[1]
ALLOWED = {
    "utils": {"utils"},
    "models": {"models", "utils"},
    "data": {"data", "utils"},
    "main_pretrain": {"models", "data", "utils"},
    "transfer": {"transfer", "models", "data", "utils"},
    "viz_slots": {"transfer", "models", "data", "utils"},
    "scripts": {"scripts", "main_pretrain", "transfer", "models", "data", "utils"},
}
"""Which of these packages and modules each may import."""


def source_files(name: str) -> list[Path]:
    """List the modules of a package, or a single module of the top level."""
    return sorted((ROOT / name).rglob("*.py")) or [ROOT / f"{name}.py"]


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def imports(tree: ast.AST) -> Iterator[str]:
    """Yield the full name of everything that is imported anywhere below a node."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{name.name}" for name in node.names)


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_point_in_one_direction(package: str) -> None:
    for path in source_files(package):
        tree = parse(path)
        if package == "main_pretrain":  # which imports the probe inside of a function, where a flag asks for it
            tree.body = [node for node in tree.body if not isinstance(node, ast.FunctionDef | ast.If)]
        packages = {name.split(".")[0] for name in imports(tree)} & (ALLOWED.keys() | {"tests"})
        assert packages <= ALLOWED[package], path.relative_to(ROOT)


def test_tests_share_code_through_helper_modules_only() -> None:
    for path in source_files("tests"):
        for name in imports(parse(path)):
            module = name.split(".")[1] if name.startswith("tests.") else ""
            assert module != "conftest", path.name
            assert not module.startswith("test_"), path.name


def test_no_two_modules_have_the_same_name() -> None:
    paths = [path for package in ALLOWED for path in source_files(package) if path.name != "__init__.py"]
    assert len(paths) > 40
    assert [name for name, count in Counter(path.stem for path in paths).items() if count > 1] == []


def test_no_module_has_the_name_of_one_of_the_standard_library() -> None:
    paths = [path for package in ("models", "data", "utils") for path in source_files(package)]
    assert {path.stem for path in paths} & sys.stdlib_module_names == set()


def test_nothing_outside_of_models_asks_which_method_runs() -> None:
    """Neither a class of a method nor a comparison with the name of one; recipes and help texts may name them."""
    classes = {method.__name__ for method in METHODS.values()}
    for path in [file for package in ("main_pretrain", "data", "utils") for file in source_files(package)]:
        nodes = list(ast.walk(parse(path)))
        assert not {node.id for node in nodes if isinstance(node, ast.Name)} & classes, path.name
        compared = [value for node in nodes if isinstance(node, ast.Compare) for value in ast.walk(node)]
        assert not {v.value for v in compared if isinstance(v, ast.Constant)} & METHODS.keys(), path.name


def test_pretraining_loads_neither_evaluation_nor_its_libraries() -> None:
    """SciPy, scikit-learn and matplotlib serve probes and figures; timm is needed by ViTs alone."""
    code = "import sys, main_pretrain; print(*sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    loaded = {name.split(".")[0] for name in output.split()}
    assert "torch" in loaded
    assert not loaded & {"transfer", "scipy", "sklearn", "matplotlib", "timm", "tests"}
