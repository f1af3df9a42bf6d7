"""Pickles that would run code, in every kind of file and through every reader: refused, and nothing runs."""

import argparse
import contextlib
import io
import pickle
import re
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import main_pretrain
import viz_slots
from tests.checkpoint_data import resnet18_weights
from tests.helpers import run_expecting_usage_error
from transfer import convert
from transfer.detection.d2_weights import WeightsFile, read_weights
from transfer.segmentation.mm_weights import read_fine_tuned
from utils import checkpoint
from utils.errors import UsageError
from utils.safe_pickle import load_arrays

ROOT = Path(__file__).parents[1]
CODE = "import os; os.mkdir('code_ran')"
"""What the attacks run: it leaves a mark in the working directory."""


# Pickles written by hand: protocol 4 resolves dotted names, and `GLOBAL` is understood by PyTorch's reader as well.


def name(module: str, attribute: str) -> bytes:
    return b"c" + f"{module}\n{attribute}\n".encode()


def value(content: object) -> bytes:
    return pickle.dumps(content, protocol=2, fix_imports=False)[2:-1]


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + b"(" + b"".join(arguments) + b"tR"


def with_state(instance: bytes, state: bytes) -> bytes:
    return instance + state + b"b"


def pickle_of(expression: bytes) -> bytes:
    """Return the pickle of a dict in which `expression` is a value."""
    return b"\x80\x04(" + value("model") + expression + value("x") + value(1) + b"d."


def nested(reader: bytes) -> bytes:
    return call(reader, value(pickle.dumps(RunsCode())))


class RunsCode:
    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return exec, (CODE,)


def torch_bytes(content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


_GETATTR = name("builtins", "getattr")
_BUILTINS = call(_GETATTR, call(_GETATTR, name("argparse", "Namespace"), value("__init__")), value("__builtins__"))
_IMPORT = call(name("torch._utils", "_rebuild_tensor_v2.__globals__.get"), value("_import_dotted_name"))

RUNS_CODE = {
    "exec": call(name("builtins", "exec"), value(CODE)),
    "mkdir": call(name("posix", "mkdir"), value("code_ran")),
    "subprocess": call(name("subprocess", "getoutput"), value("mkdir code_ran")),
    "dotted name of a tensor function": call(
        call(name("torch._utils", "_rebuild_tensor.__builtins__.get"), value("exec")), value(CODE)
    ),
    "globals of a tensor function": call(call(_IMPORT, value("os.mkdir")), value("code_ran")),
    "builtins of a module": call(call(name("torch._utils", "__builtins__.get"), value("exec")), value(CODE)),
    "dotted name of an allowed class": call(
        call(name("argparse", "Namespace.__init__.__builtins__.get"), value("exec")), value(CODE)
    ),
    "getattr": call(call(call(_GETATTR, _BUILTINS, value("get")), value("exec")), value(CODE)),
    "nested, pickle": nested(name("pickle", "loads")),
    "nested, _pickle": nested(name("_pickle", "loads")),
    "nested, torch": call(name("torch.storage", "_load_from_bytes"), value(torch_bytes(RunsCode()))),
    "nested, NumPy": call(name("numpy", "load"), value("objects.npy"), value(None), value(True)),
    "in an array of objects": value(np.array([RunsCode()], dtype=object)),
}
"""Expressions that run CODE where names are resolved as pickle does."""

_RECONSTRUCT, _NDARRAY = name("numpy.core.multiarray", "_reconstruct"), name("numpy", "ndarray")
_OBJECT_IN_8_BYTES = with_state(
    call(name("numpy", "dtype"), value("V8"), value(False), value(True)),
    b"(" + value(3) + value("|") + value(None) + value(("a",)) + b"(" + value("a")
    + b"(" + call(name("numpy", "dtype"), value("O8")) + value(0) + b"td" + value(8) + value(1) + value(0) + b"t",
)  # fmt: skip
MISUSES = {
    "dtype of addresses": with_state(
        call(_RECONSTRUCT, _NDARRAY, value((0,)), value("b")),
        b"(" + value(1) + value((4,)) + _OBJECT_IN_8_BYTES + value(False) + value("A" * 32) + b"t",
    ),
    "dtype of objects": call(name("numpy", "dtype"), value("O")),
    "dtype of no name": call(name("numpy", "dtype"), value({"names": ["a"], "formats": ["O"]})),
    "array of objects": value(np.array([1, "a"], dtype=object)),
    "array of another size": with_state(
        call(_RECONSTRUCT, _NDARRAY, value((0,)), value("b")),
        b"(" + value(1) + value((2**40,)) + call(name("numpy", "dtype"), value("f4")) + value(False) + value("") + b"t",
    ),
    "OrderedDict of a number": call(name("collections", "OrderedDict"), value(5)),
    "OrderedDict with its methods replaced": with_state(
        call(name("collections", "OrderedDict")), value({"items": 5, "get": 5, "keys": 5, "__class__": 5})
    ),
    "Namespace with arguments": call(name("argparse", "Namespace"), value(1)),
    "Namespace without a dict": with_state(name("argparse", "Namespace") + b")\x81", value([1])),
    "encoding to another object": call(name("_codecs", "encode"), value("a"), value("hex")),
    "attributes of a class": with_state(name("collections", "OrderedDict"), value((None, {"get": 5}))),
    "attributes of an array's class": with_state(_NDARRAY, value((None, {"__setstate__": None, "array": 5}))),
    "attributes of a function": with_state(_RECONSTRUCT, value((None, {"__call__": None, "_function": 5}))),
    "attributes of NumPy's dtype": with_state(name("numpy", "dtype"), value((None, {"__init__": None}))),
    "a persistent object": value("module") + b"Q",
    "a dict in itself": value({}) + b"q\x00" + value("a") + b"h\x00s",
}  # fmt: skip
"""Expressions that call what is allowed with arguments and states that nobody writes."""


def as_pickle(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def as_zip(path: Path, content: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")


def as_legacy(path: Path, content: bytes) -> None:
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    parts = [pickle.dumps(part, 2) for part in (torch.serialization.MAGIC_NUMBER, 1001, system)]
    path.write_bytes(b"".join((*parts, content, pickle.dumps([], 2))))


def as_legacy_header(path: Path, content: bytes) -> None:
    parts = [pickle.dumps(part, 2) for part in (torch.serialization.MAGIC_NUMBER, 1001)]
    path.write_bytes(b"".join((*parts, content, pickle.dumps({}, 2), pickle.dumps([], 2))))


def as_tar(path: Path, content: bytes) -> None:
    with tarfile.open(path, "w") as archive:
        for member in ("storages", "tensors", "pickle"):
            information = tarfile.TarInfo(member)
            information.size = len(content)
            archive.addfile(information, io.BytesIO(content))


CONTAINERS = [as_zip, as_legacy, as_legacy_header, as_tar, as_pickle]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a file of arrays that runs code."""
    monkeypatch.chdir(tmp_path)
    np.save("objects.npy", np.array([RunsCode()], dtype=object), allow_pickle=True)
    return tmp_path


def code_ran() -> bool:
    return Path("code_ran").exists()


@pytest.mark.parametrize("attack", RUNS_CODE)
def test_each_attack_would_work_without_the_allow_list(attack: str) -> None:
    pickle.loads(pickle_of(RUNS_CODE[attack]))
    assert code_ran()


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("attack", RUNS_CODE)
def test_pth_with_code_is_refused_and_runs_nothing(container: Callable[[Path, bytes], None], attack: str) -> None:
    container(Path("in.pth"), pickle_of(RUNS_CODE[attack]))
    with pytest.raises(UsageError, match=r"^--init in\.pth: ") as refusal:
        checkpoint.load("in.pth", "--init")
    assert "\n" not in str(refusal.value)
    assert not code_ran()


@pytest.mark.parametrize("attack", RUNS_CODE)
def test_pkl_with_code_is_refused_and_runs_nothing(attack: str) -> None:
    as_pickle(Path("in.pkl"), pickle_of(RUNS_CODE[attack]))
    with pytest.raises(UsageError, match=r"^IN in\.pkl: refused") as refusal:
        load_arrays(Path("in.pkl"), "IN")
    assert "\n" not in str(refusal.value)
    assert not code_ran()


@pytest.mark.parametrize("misuse", MISUSES)
def test_misuse_of_allowed_objects_leaves_plain_data_or_is_refused(misuse: str) -> None:
    as_pickle(Path("in.pkl"), pickle_of(MISUSES[misuse]))
    as_zip(Path("zip.pth"), pickle_of(MISUSES[misuse]))
    as_legacy(Path("legacy.pth"), pickle_of(MISUSES[misuse]))
    for read in (load_arrays, checkpoint.load):
        for file in ("in.pkl", "zip.pth", "legacy.pth"):
            with contextlib.suppress(UsageError):
                state = read(Path(file), "IN")
                assert type(state) is dict
                assert type(state["model"]) is not OrderedDict
    benign = {"array": np.arange(6.0).reshape(2, 3), "dict": OrderedDict(a=1)}
    as_pickle(Path("benign.pkl"), pickle.dumps(benign))
    assert np.array_equal(load_arrays(Path("benign.pkl"), "IN")["array"], benign["array"])


@pytest.mark.parametrize("misuse", ["dtype of addresses", "dtype of objects", "array of objects"])
def test_arrays_of_anything_but_numbers_are_refused(misuse: str) -> None:
    as_pickle(Path("in.pkl"), pickle_of(MISUSES[misuse]))
    with pytest.raises(UsageError, match="refused, it holds more than arrays and numbers"):
        load_arrays(Path("in.pkl"), "IN")


@pytest.mark.parametrize("opcode", [b"r\xff\xff\xff\x7f", b"\x96" + (2**36).to_bytes(8, "little")])
def test_declared_size_beyond_the_file_is_refused(opcode: bytes) -> None:
    """An entry of the memo, and a bytearray, of more gigabytes than the machine may have."""
    as_pickle(Path("in.pkl"), pickle_of(value(1) + opcode))
    with pytest.raises(UsageError, match=r"IN in\.pkl"):
        load_arrays(Path("in.pkl"), "IN")


def test_attributes_of_parameters_are_dropped() -> None:
    parameter = torch.nn.Parameter(torch.arange(3.0))
    parameter.clone = 5  # type: ignore[assignment,method-assign]
    torch.save({"model": {"weight": parameter}}, "in.pth")
    loaded = checkpoint.load_weights("in.pth")["weight"]
    assert type(loaded) is torch.Tensor
    assert torch.equal(loaded.clone(), torch.arange(3.0))


@pytest.mark.filterwarnings("ignore")  # PyTorch is going to remove quantized tensors
@pytest.mark.parametrize("kind", ["sparse", "meta", "quantized"])
def test_tensors_without_plain_values_are_refused(kind: str) -> None:
    tensor = torch.eye(2, device="meta") if kind == "meta" else torch.eye(2)
    tensor = tensor.to_sparse() if kind == "sparse" else tensor
    tensor = torch.quantize_per_tensor(tensor, 1.0, 0, torch.qint8) if kind == "quantized" else tensor
    torch.save({"model": {"conv1.weight": tensor}}, "in.pth")
    with pytest.raises(UsageError, match="refused"):
        checkpoint.load_weights("in.pth")


def test_what_other_libraries_allow_is_not_allowed_here() -> None:
    as_zip(Path("in.pth"), pickle_of(RUNS_CODE["exec"]))
    with torch.serialization.safe_globals([exec]):
        with pytest.raises(UsageError, match="refused"):
            checkpoint.load("in.pth", "--init")
        assert exec in torch.serialization.get_safe_globals()
    assert not code_ran()


# What has to be read all the same.


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_arrays_of_every_protocol_are_read(protocol: int) -> None:
    arrays = {
        "transposed": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "sliced": np.arange(24.0).reshape(2, 3, 4)[:, ::2],
        "permuted": np.arange(24).reshape(2, 3, 4).transpose(1, 0, 2),
        "big-endian": np.arange(3, dtype=">i4"),
        "empty": np.zeros((0, 3), dtype=np.float16),
        "counter": np.array(7),
        "mask": np.array([True, False]),
    }
    rest = {"number": np.float64(2.5), "text": "é", "bytes": b"\xff", "ordered": OrderedDict(a=[1, (2, None)])}
    Path("in.pkl").write_bytes(pickle.dumps(arrays | rest, protocol))
    loaded = load_arrays(Path("in.pkl"), "IN")
    for key, array in arrays.items():
        assert loaded[key].dtype == array.dtype.newbyteorder("=")
        assert np.array_equal(loaded.pop(key), array)
    assert loaded == rest


def test_arrays_of_python_2_and_old_numpy_are_read() -> None:
    """As in detectron2's published backbones: protocol 2, bytes as strings, NumPy's old module names."""
    values = np.array([1.5, -2.0], np.float32).tobytes()
    native = b"(" + value(3) + b"U\x01<NNN" + 2 * value(-1) + value(0) + b"t"
    dtype = with_state(call(name("numpy", "dtype"), b"U\x02f4", value(0), value(1)), native)
    state = b"(" + value(1) + value((2,)) + dtype + value(False) + b"U\x08" + values + b"t"
    array = with_state(call(_RECONSTRUCT, _NDARRAY, value((0,)), b"U\x01b"), state)
    Path("in.pkl").write_bytes(b"\x80\x02}" + b"U\x05conv1" + array + b"s.")
    assert load_arrays(Path("in.pkl"), "IN")["conv1"].tolist() == [1.5, -2.0]


def test_namespace_of_a_released_file_becomes_a_dict() -> None:
    torch.save({"args": argparse.Namespace(arch="resnet50", epochs=800), "epoch": 800}, "in.pth")
    state = checkpoint.load("in.pth", "--init")
    assert state == {"args": {"arch": "resnet50", "epochs": 800}, "epoch": 800}
    assert checkpoint.checkpoint_args(state)["arch"] == "resnet50"


def test_checkpoint_of_mmengine_is_read_without_its_histories() -> None:
    """What mmengine's Runner writes: a message hub of histories, whose pickle names `getattr` and NumPy's arrays."""
    history = pytest.importorskip("mmengine.logging").HistoryBuffer([0.5, 0.25], [1, 1])
    state = {
        "state_dict": OrderedDict({"backbone.conv1.weight": torch.ones(2)}),
        "meta": {"iter": 2, "cfg": "model = 1"},
        "message_hub": {"log_scalars": OrderedDict(loss=history), "runtime_info": {"lr": np.float64(0.1)}},
    }
    torch.save(state, "iter_2.pth")
    loaded = checkpoint.load("iter_2.pth", "CHECKPOINT")
    assert loaded["meta"] == state["meta"]
    assert torch.equal(loaded["state_dict"]["backbone.conv1.weight"], torch.ones(2))
    assert not isinstance(loaded["message_hub"]["log_scalars"]["loss"], type(history))


# Every command that reads a checkpoint.


@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
@pytest.mark.parametrize("command", ["--init", "--resume", "convert", "convert --verify", "viz_slots"])
def test_commands_refuse_code_in_one_line(
    command: str, suffix: str, tiny: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    path = f"in{suffix}"
    as_zip(Path(path), pickle_of(RUNS_CODE["dotted name of a tensor function"]))
    torch.save(resnet18_weights(1), "source.pth")
    main, argv = {
        "--init": (main_pretrain.main, tiny("--init", path)),
        "--resume": (main_pretrain.main, tiny("--resume", path)),
        "convert": (convert.main, [path, "out.pth"]),
        "convert --verify": (convert.main, ["source.pth", path, "--verify"]),
        "viz_slots": (viz_slots.main, ["--model-path", path]),
    }[command]
    assert path in run_expecting_usage_error(main, argv, capsys)
    assert not code_ran()


@pytest.mark.parametrize("attack", RUNS_CODE)
def test_fine_tuned_models_with_code_are_refused(attack: str) -> None:
    as_zip(Path("in.pth"), pickle_of(RUNS_CODE[attack]))
    with pytest.raises(UsageError, match=r"CHECKPOINT in\.pth: refused"):
        read_fine_tuned(Path("in.pth"), "CHECKPOINT")
    assert not code_ran()


@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
def test_weights_for_detectron2_with_code_are_refused(suffix: str) -> None:
    path = Path(f"in{suffix}")
    (as_zip if suffix == ".pth" else as_pickle)(path, pickle_of(RUNS_CODE["dotted name of a tensor function"]))
    with pytest.raises(UsageError, match=rf"MODEL.WEIGHTS in\{suffix}: refused"):
        read_weights(WeightsFile("MODEL.WEIGHTS", path, full_model=False))
    assert not code_ran()


def test_no_other_module_unpickles() -> None:
    unpickles = re.compile(r"torch\.load\(|torch\.hub|pickle\.loads?\(|Unpickler|allow_pickle|joblib|shelve|marshal")
    folders = (ROOT / folder for folder in ("models", "data", "utils", "transfer", "scripts"))
    files = [*ROOT.glob("*.py"), *(file for folder in folders for file in folder.rglob("*.py"))]
    assert [file.name for file in files if unpickles.search(file.read_text())] == ["safe_pickle.py"]
