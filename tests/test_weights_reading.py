"""Checkpoints are read as data: what torch reads of them we read, and what a malicious one asks for
never happens.
"""

from __future__ import annotations

import io
import os
import pickle
import struct
import sys
import types
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from osdface_core.errors import OSDFaceError
from osdface_core.weights.reading import read_tensors


def state() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    book = torch.randn(6, 4, generator=g)
    return OrderedDict(
        {
            "vqvae_LQ.encoder.weight": torch.randn(3, 2, 3, 3, generator=g),
            "vqvae_LQ.book": book,
            "vqvae_LQ.book_turned": book.t()[1:],
            "vqvae_LQ.half": torch.randn(5, generator=g).half(),
            "vqvae_LQ.bfloat": torch.randn(5, generator=g).bfloat16(),
            "vqvae_LQ.steps": torch.tensor(7),
            "vqvae_LQ.none": torch.zeros(0, 4),
            "vqvae_LQ.parameter": torch.nn.Parameter(torch.randn(2, generator=g)),
            "vqvae.decoder": torch.randn(4, generator=g),
        }
    )


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before 1.6"])
def test_a_checkpoint_reads_as_torch_reads_it(legacy: bool, tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save({"state_dict": state(), "epoch": 3}, path, _use_new_zipfile_serialization=not legacy)
    wanted = torch.load(path, weights_only=True)["state_dict"]
    found = read_tensors(path)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)
    assert set(read_tensors(path, ("vqvae.",))) == {"vqvae.decoder"}


def test_the_real_detector_reads_as_torch_reads_it(data: Path) -> None:
    path = data / "weights" / "detection_mobilenet0.25_Final.pth"
    wanted = torch.load(path, weights_only=True, map_location="cpu")
    found = read_tensors(path)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_foreign_classes_of_lightning_are_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("pytorch_lightning_of_old")
    source = """
class ModelCheckpoint:
    def __init__(self): self.best = 1.0
class Config(dict):
    def __init__(self, **kw): super().__init__(**kw)
    def __setstate__(self, state): raise RuntimeError("ran")
    def __reduce__(self): return Config, (), {"x": 1}, None, iter(self.items())
"""
    exec(source, module.__dict__)  # noqa: S102
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for name in ("ModelCheckpoint", "Config"):
        getattr(module, name).__module__ = module.__name__
    import argparse
    import datetime

    checkpoint = {
        "callbacks": {
            module.ModelCheckpoint: {"best": torch.tensor(1.0), "path": Path("/some/where")}
        },
        "hyper_parameters": module.Config(
            lr=1e-4, args=argparse.Namespace(a={1, 2}, when=datetime.datetime(2024, 1, 1))
        ),
        "optimizer_states": [defaultdict(list, {"step": [torch.tensor(3)]})],
        "lr_schedulers": [module.ModelCheckpoint()],
        "state_dict": state(),
    }
    path = tmp_path / "associate.ckpt"
    torch.save(checkpoint, path)
    monkeypatch.delitem(sys.modules, module.__name__)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    found = read_tensors(path, ("vqvae_LQ.",))
    assert len(found) == 8
    torch.testing.assert_close(
        found["vqvae_LQ.book_turned"], state()["vqvae_LQ.book"].t()[1:], rtol=0, atol=0
    )


# What follows would leave a mark if any of it ran.


def mark() -> str:
    return f"open({os.environ['MARK']!r}, 'w')"


class Calls:
    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.reduced = function, args

    def __reduce__(self) -> Any:
        return self.reduced


def archive(
    path: Path,
    pickled: bytes,
    entries: dict[str, bytes] | None = None,
    compression: int = zipfile.ZIP_STORED,
) -> None:
    with zipfile.ZipFile(path, "w", compression) as out:
        out.writestr("archive/data.pkl", pickled)
        for name, content in (entries or {}).items():
            out.writestr(name, content)


def system(path: Path) -> None:
    torch.save(
        {"state_dict": state(), "callbacks": Calls(os.system, f"touch {os.environ['MARK']}")}, path
    )


def evaluation(path: Path) -> None:
    torch.save({"state_dict": {"a": torch.zeros(2), "b": Calls(eval, mark())}}, path)


def through_getattr(path: Path) -> None:
    """builtins.getattr(builtins, "exec")(...), written out so that no name is on any list."""
    pickled = (
        b"\x80\x02cbuiltins\ngetattr\ncbuiltins\n__import__\n"
        b"X\x02\x00\x00\x00os\x85RX\x06\x00\x00\x00system\x86R"
    )
    archive(path, pickled + pickle.dumps(f"touch {os.environ['MARK']}", 2)[2:-1] + b"\x85R.")


def nested(path: Path) -> None:
    torch.save(
        OrderedDict(a=torch.zeros(2), b=Calls(dict, [(Calls(eval, mark()), Calls(exec, mark()))])),
        path,
    )


def old_system(path: Path) -> None:
    torch.save(
        [Calls(os.system, f"touch {os.environ['MARK']}")],
        path,
        _use_new_zipfile_serialization=False,
    )


def bare(path: Path) -> None:
    path.write_bytes(pickle.dumps(Calls(os.system, f"touch {os.environ['MARK']}")))


def torch_itself(path: Path) -> None:
    """A function of torch that would load a second, unguarded pickle, in place of a tensor."""
    inner = pickle.dumps(Calls(os.system, f"touch {os.environ['MARK']}"))
    torch.save({"a": Calls(torch.storage._load_from_bytes, inner)}, path)


def view(
    sizes: tuple[int, ...], strides: tuple[int, ...], offset: int = 0, elements: int = 4
) -> bytes:
    """The pickle of a dict with one tensor, such a view of a storage of `elements` floats."""
    stream = io.BytesIO()

    class Pickler(pickle.Pickler):
        def persistent_id(self, item: Any) -> Any:
            return (
                ("storage", torch.FloatStorage, "0", "cpu", elements)
                if isinstance(item, Stand)
                else None
            )

    class Stand:
        pass

    Pickler(stream, 2).dump(
        {
            "a": Calls(
                torch._utils._rebuild_tensor_v2,
                Stand(),
                offset,
                sizes,
                strides,
                False,
                OrderedDict(),
            )
        }
    )
    return stream.getvalue()


def beyond_its_storage(path: Path) -> None:
    archive(path, view((1000,), (1,)), {"archive/data/0": bytes(16)})


def repeated_for_ever(path: Path) -> None:
    archive(path, view((10**12,), (0,)), {"archive/data/0": bytes(16)})


def larger_than_the_file(path: Path) -> None:
    archive(path, view((25 * 10**9,), (1,), elements=25 * 10**9), {"archive/data/0": bytes(16)})


def negative(path: Path) -> None:
    archive(path, view((4,), (1,), offset=-4), {"archive/data/0": bytes(16)})


def traversal(path: Path) -> None:
    archive(
        path,
        view((4,), (1,)),
        {"archive/data/0": bytes(16), "archive/../../../../tmp/escaped": b"x"},
    )


def packed_bomb(path: Path) -> None:
    """A storage that says it unpacks to 100 GB."""
    archive(path, view((4,), (1,)), {"archive/data/0": bytes(10**7)}, zipfile.ZIP_DEFLATED)
    content = path.read_bytes()
    path.write_bytes(content.replace(struct.pack("<I", 10**7), struct.pack("<I", 0xFFFFFFF0)))


def memo_bomb(path: Path) -> None:
    """A memo slot far away, for which Python's unpickler would allocate 32 GB."""
    archive(path, b"\x80\x02}r" + struct.pack("<I", 2**31 - 1) + b".")


def string_bomb(path: Path) -> None:
    archive(path, b"\x80\x04\x8d" + struct.pack("<Q", 10**11) + b"abc.")


def nested_without_end(path: Path) -> None:
    """A key whose hash would overflow the stack."""
    archive(path, b"\x80\x02})" + b"\x85" * 5_000_000 + b"K\x01s.")


def repeated_within_itself(path: Path) -> None:
    """A key of two to the power of 60 items, each pair being the same tuple twice."""
    archive(path, b"\x80\x02})" + b"2\x86" * 60 + b"K\x01s.")


MALICIOUS = [
    system,
    evaluation,
    through_getattr,
    nested,
    old_system,
    bare,
    torch_itself,
    beyond_its_storage,
    repeated_for_ever,
    larger_than_the_file,
    negative,
    traversal,
    packed_bomb,
    memo_bomb,
    string_bomb,
    nested_without_end,
    repeated_within_itself,
]


@pytest.mark.parametrize("make", MALICIOUS, ids=lambda make: make.__name__)
def test_a_malicious_file_runs_nothing_and_gives_one_sentence(
    make: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resource = pytest.importorskip(
        "resource", reason="this system has no resource module to measure memory with"
    )
    monkeypatch.setenv("MARK", str(tmp_path / "mark"))
    path = tmp_path / "weights.pth"
    make(path)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = (
        int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        if Path("/proc/self/statm").exists()
        else 0
    )
    # A bomb that goes off ends in MemoryError instead of taking the machine with it.
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, hard))
    try:
        with pytest.raises(OSDFaceError) as raised:
            read_tensors(path)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert not (tmp_path / "mark").exists()
    message = str(raised.value)
    assert (
        path.name in message
        and "\n" not in message
        and message.endswith(".")
        and len(message) < 400
    )
    assert sorted(file.name for file in tmp_path.iterdir()) == [path.name]


@pytest.mark.parametrize(
    "make", [system, evaluation, nested, old_system], ids=lambda make: make.__name__
)
def test_the_malicious_files_would_have_run(
    make: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are armed: pickle itself, given the same bytes, runs them."""
    monkeypatch.setenv("MARK", str(tmp_path / "mark"))
    path = tmp_path / "weights.pth"
    make(path)
    stream = (
        io.BytesIO(zipfile.ZipFile(path).read("weights/data.pkl"))
        if zipfile.is_zipfile(path)
        else path.open("rb")
    )

    class Careless(pickle.Unpickler):
        def persistent_load(self, pid: Any) -> Any:
            return torch.FloatStorage(4096)

    with stream:
        try:
            for _ in range(5):
                Careless(stream).load()
        except (EOFError, RuntimeError, AttributeError, TypeError, pickle.UnpicklingError):
            pass
    assert (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html></html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "LFS"),
        (b"PK\x03\x04 and nothing", "cut off"),
        (bytes(100), "no torch checkpoint"),
        (b'\x40\x00\x00\x00\x00\x00\x00\x00{"a":1', "cut off"),
    ],
)
def test_what_is_no_checkpoint_is_named(content: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(OSDFaceError, match=reason):
        read_tensors(path)


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("kept", [0.2, 0.6, 0.999])
def test_a_cut_off_file_is_told(kind: str, kept: float, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    tensors = {"a": torch.randn(2000), "b": torch.randn(3000)}
    if kind == "safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=kind == "zip")
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    with pytest.raises(OSDFaceError, match=r"weights\.pth"):
        read_tensors(path)


def test_a_flipped_bit_is_told(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"a": torch.full((2000,), 1.5)}, path)
    content = bytearray(path.read_bytes())
    content[content.find(struct.pack("<f", 1.5) * 10) + 4000] ^= 1
    path.write_bytes(content)
    with pytest.raises(OSDFaceError, match="cannot be read"):
        read_tensors(path)


def test_a_missing_file_and_a_missing_prefix_are_told(tmp_path: Path) -> None:
    with pytest.raises(OSDFaceError, match=r"install\.py"):
        read_tensors(tmp_path / "none.pth")
    torch.save({"a": torch.zeros(2)}, tmp_path / "w.pth")
    with pytest.raises(OSDFaceError, match="vqvae_LQ"):
        read_tensors(tmp_path / "w.pth", ("vqvae_LQ.",))
