"""Reads a pickled torch checkpoint as data: its tensors and where their bytes lie.

Nothing in it is ever called. Neither torch nor numpy is imported here, so that a conversion of
1.8 GB costs no more memory than the tensors it keeps. torch.load(weights_only=True) is not used
because it refuses the foreign classes that Lightning writes into callbacks and hyper-parameters;
here every class that a pickle names is only a record of its name.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import pickletools
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

from ..errors import OSDFaceError

# Bytes of an element, by the name of the storage class in the pickle.
ITEM_SIZES = {
    "FloatStorage": 4,
    "HalfStorage": 2,
    "BFloat16Storage": 2,
    "DoubleStorage": 8,
    "LongStorage": 8,
    "IntStorage": 4,
    "ShortStorage": 2,
    "CharStorage": 1,
    "ByteStorage": 1,
    "BoolStorage": 1,
}

# What a pickle may name of the standard library. Nothing is run here, so this protects nobody: it
# tells a user that a file which names os.system was made by somebody who meant it to be run.
_PLAIN_MODULES = {
    "collections",
    "typing",
    "argparse",
    "datetime",
    "pathlib",
    "decimal",
    "fractions",
    "uuid",
    "enum",
    "abc",
    "re",
}
_PLAIN_NAMES = {
    ("builtins", name)
    for name in (
        "set",
        "frozenset",
        "list",
        "dict",
        "tuple",
        "int",
        "float",
        "complex",
        "str",
        "bytes",
        "bytearray",
        "bool",
        "slice",
    )
} | {
    ("builtins", "object"),
    ("builtins", "range"),
    ("_codecs", "encode"),
    ("copyreg", "_reconstructor"),
    ("functools", "partial"),
    ("types", "SimpleNamespace"),
}
_PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_START = pickle.dumps(_LEGACY_MAGIC, protocol=2)
_LEGACY_PROTOCOL = 1001
_PICKLE_LIMIT = 16 * 2**20  # bytes without those of the tensors; real ones take less than 1 MiB
_DEEPEST_TUPLE = 100
_CHUNK = 2**20


class Storage(NamedTuple):
    """A run of elements of one type in the file.

    kind: a key of ITEM_SIZES.
    key: its name in the file.
    elements: how many.
    """

    kind: str
    key: str
    elements: int

    @property
    def size(self) -> int:
        """Bytes."""
        return self.elements * ITEM_SIZES[self.kind]


@dataclass(frozen=True)
class StoredTensor:
    """A view of a storage; offset and strides in elements.

    It lies within its storage and has no more elements than it.
    """

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Inert(dict[Any, Any]):
    """Stands for what a pickle makes of a class or function: name, arguments, items. Does nothing.

    A dict, because an OrderedDict arrives as a call followed by items.
    """

    path = ""
    args: tuple[Any, ...]

    def __new__(cls, *args: Any, **_: Any) -> _Inert:
        self = super().__new__(cls)
        self.args = args
        return self

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        """Ignored: an attribute could shadow what is recorded here."""

    def append(self, item: Any) -> None:
        """Ignored: no list of a foreign class holds weights."""

    extend = add = append

    # By identity: comparing nested records could take forever.
    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:  # type: ignore[override]
        return id(self)


class _Reader(pickle.Unpickler):
    """Unpickles into plain containers, Storage and _Inert."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        super().__init__(file, encoding="utf-8")
        self._name = name
        self.storages: dict[str, Storage] = {}

    def find_class(self, module: str, name: str) -> type[_Inert]:
        module = _PYTHON_2.get(module, module)
        root = module.partition(".")[0]
        if (
            root in sys.stdlib_module_names
            and module not in _PLAIN_MODULES
            and (module, name) not in _PLAIN_NAMES
        ):
            raise OSDFaceError(
                f"{self._name} is refused: it is made to run {module}.{name} when loaded, which "
                "weights have no use for; nothing of it "
                "was run, delete it and fetch the file from its official page."
            )
        return type("_Inert", (_Inert,), {"path": f"{module}.{name}"})

    def persistent_load(self, pid: Any) -> Storage:
        match pid:
            case ("storage", type() as kind, str() as key, str(), int() as elements) | (
                "storage",
                type() as kind,
                str() as key,
                str(),
                int() as elements,
                None,
            ) if issubclass(kind, _Inert) and elements >= 0:
                module, _, name = kind.path.rpartition(".")
                storage = Storage(name, key, elements)
                if (
                    module in ("torch", "torch.cuda")
                    and name in ITEM_SIZES
                    and self.storages.setdefault(key, storage) == storage
                ):
                    return storage
        raise pickle.UnpicklingError("a storage of an unknown kind")


def _damaged(name: str, why: str, cause: BaseException | None = None) -> NoReturn:
    raise OSDFaceError(
        f"{name} cannot be read as a checkpoint ({why}): fetch the file again."
    ) from cause


def _walk(data: io.BytesIO) -> None:
    """Reads a pickle's opcodes without running them, before the unpickler does.

    Raises UnpicklingError for what would hang or crash the unpickler: a memo slot far beyond what
    was written, for which it would allocate gigabytes; and tuples nested so deep, or repeated so
    often within one another, that hashing one as a key of a dict overflows the stack or takes
    forever.
    """
    stack: list[
        tuple[int, int] | None
    ] = []  # depth and items that hashing each value would visit; None for a mark
    memo: dict[object, tuple[int, int] | None] = {}
    for opcode, arg, _ in pickletools.genops(data):
        name = opcode.name
        if name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            slot = len(memo) if name == "MEMOIZE" else arg
            if isinstance(slot, int) and slot > data.tell():
                raise pickle.UnpicklingError("it asks for a memo larger than itself")
            memo[slot] = stack[-1]
            continue
        if name == "DUP" or name.endswith("GET"):
            stack.append(stack[-1] if name == "DUP" else memo[arg])
            continue
        taken = len(opcode.stack_before)
        items = []
        if pickletools.markobject in opcode.stack_before or (name == "POP" and stack[-1] is None):
            while (item := stack.pop()) is not None:
                items.append(item)
            taken = opcode.stack_before.index(pickletools.markobject) if name != "POP" else 0
        items += [stack.pop() or (0, 0) for _ in range(taken)]
        for left in opcode.stack_after:
            value = (0, 1)
            if name.startswith("TUPLE") or name == "FROZENSET":
                value = (
                    1 + max((depth for depth, _ in items), default=0),
                    1 + sum(count for _, count in items),
                )
                if value[0] > _DEEPEST_TUPLE or value[1] > _PICKLE_LIMIT:
                    raise pickle.UnpicklingError("it nests tuples without end")
            stack.append(None if left is pickletools.markobject else value)


def _unpickle(data: io.BytesIO, name: str) -> tuple[Any, dict[str, Storage]]:
    """The pickle that starts at the position of `data`, and the storages it names.

    Leaves `data` at the end of the pickle.
    """
    try:
        start = data.tell()
        _walk(data)
        end = data.tell()
        data.seek(start)
        reader = _Reader(data, name)
        top = reader.load()
        data.seek(end)
        return top, reader.storages
    except OSDFaceError:
        raise
    except (
        Exception
    ) as error:  # a damaged pickle may raise anything, as the pickle module documents
        _damaged(name, f"its pickle is damaged: {str(error) or type(error).__name__:.120}", error)


def _tensor(value: Any, name: str, key: str) -> StoredTensor | None:
    """The tensor that a record describes; None for a plain value.

    Raises OSDFaceError for a record of anything else, and for a view that leaves its storage or
    repeats its elements.
    """
    while isinstance(value, _Inert) and value.path in (
        "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_parameter_with_state",
    ):
        value = value.args[0] if value.args else None
    if not isinstance(value, _Inert):
        return None
    match (
        value.args
        if value.path in ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor")
        else ()
    ):
        case (Storage() as storage, int() as offset, shape, strides, *_):
            if isinstance(shape, _Inert) and shape.path == "torch.Size" and len(shape.args) == 1:
                shape = shape.args[0]
            if (
                _is_sizes(shape)
                and _is_sizes(strides)
                and len(shape) == len(strides)
                and offset >= 0
            ):
                elements = math.prod(shape)
                last = offset + sum(
                    (size - 1) * stride for size, stride in zip(shape, strides, strict=True)
                )
                if elements == 0 or (last < storage.elements and elements <= storage.elements):
                    return StoredTensor(storage, offset, tuple(shape), tuple(strides))
            _damaged(name, f"{key:.80} lies outside its storage")
    _damaged(name, f"{key:.80} is a {value.path:.80} and no tensor")


def _flat(top: dict[Any, Any]) -> Iterator[tuple[str, Any]]:
    """The named entries of a dict; those of a dict within it by both names, as `part.name`."""
    for key, value in top.items():
        if isinstance(key, str):
            is_plain = not isinstance(value, _Inert) or value.path == "collections.OrderedDict"
            if isinstance(value, dict) and is_plain:
                yield from ((f"{key}.{k}", v) for k, v in value.items() if isinstance(k, str))
            else:
                yield key, value


def _is_sizes(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and all(
        isinstance(size, int) and size >= 0 for size in value
    )


class Checkpoint:
    """An open checkpoint; close it by leaving its `with`.

    tensors: those of the state dict (the top level, or its "state_dict") whose name starts with one
        of `prefixes`; all if there are none. Those of a dict within it are `part.name`. Only their
        bytes are ever read, by `read`.
    """

    tensors: dict[str, StoredTensor]

    def __init__(self, path: Path, prefixes: tuple[str, ...] = ()) -> None:
        """Raises OSDFaceError for a file that is no checkpoint, damaged, or made to run code."""
        self._name = path.name
        self._file = path.open("rb")
        try:
            self._size = os.fstat(self._file.fileno()).st_size
            start = self._file.read(len(_LEGACY_START))
            top, self._copy_storage = (
                self._open_zip() if start.startswith(b"PK") else self._open_legacy(start)
            )
            self.tensors = dict(self._select(top, prefixes))
            used = {tensor.storage.key: tensor.storage.size for tensor in self.tensors.values()}
            if sum(used.values()) > self._size:
                _damaged(self._name, "its tensors are larger than the file")
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, storage: Storage) -> bytearray:
        """The storage's bytes, little-endian. Raises OSDFaceError if they are damaged."""
        buffer = bytearray(storage.size)
        self._copy_storage(storage, memoryview(buffer))
        return buffer

    def _select(self, top: Any, prefixes: tuple[str, ...]) -> Iterator[tuple[str, StoredTensor]]:
        if isinstance(top, dict) and isinstance(top.get("state_dict"), dict):
            top = top["state_dict"]
        if (
            isinstance(top, _Inert)
            and top.path == "collections.OrderedDict"
            and top.args
            and isinstance(top.args[0], list)
        ):
            # Python 2 wrote an OrderedDict as a list of pairs.
            top = {
                key: value
                for key, value in (
                    pair
                    for pair in top.args[0]
                    if isinstance(pair, list | tuple) and len(pair) == 2
                )
            }
        found = False
        for key, value in _flat(top) if isinstance(top, dict) else ():
            if key.startswith(prefixes or ""):
                tensor = _tensor(value, self._name, key)
                if tensor is not None:
                    found = True
                    yield key, tensor
        if not found:
            wanted = f" whose names start with {' or '.join(prefixes)}" if prefixes else ""
            raise OSDFaceError(
                f"{self._name} holds no tensors{wanted}: it is another file than the one wanted, "
                "fetch that one."
            )

    def _open_zip(self) -> tuple[Any, Callable[[Storage, memoryview], None]]:
        try:
            archive = zipfile.ZipFile(self._file)
            entries = {info.filename: info for info in archive.infolist()}
        except (
            zipfile.BadZipFile,
            NotImplementedError,
            OSError,
            ValueError,
            struct.error,
        ) as error:
            raise OSDFaceError(
                f"{self._name} is cut off or damaged ({error}): fetch the file again."
            ) from error
        for info in entries.values():
            if (
                ".." in info.filename.split("/")
                or info.filename.startswith("/")
                or "\\" in info.filename
                or ":" in info.filename
            ):
                raise OSDFaceError(
                    f"{self._name} is refused: it holds an entry that points outside itself "
                    f"({info.filename:.80})."
                )
            if (
                info.compress_type != zipfile.ZIP_STORED
                or info.compress_size != info.file_size
                or info.flag_bits & 1
            ):
                raise OSDFaceError(
                    f"{self._name} is refused: {info.filename:.80} is packed and would unpack to "
                    f"{info.file_size} bytes, "
                    "where torch stores tensors as they are; fetch the file from its official page."
                )
        if sum(info.file_size for info in entries.values()) > self._size:
            _damaged(self._name, "its entries are larger than the file")
        pickles = [
            filename
            for filename in entries
            if filename.endswith("/data.pkl") and filename.count("/") == 1
        ]
        if len(pickles) != 1:
            raise OSDFaceError(
                f"{self._name} is a zip archive but no torch checkpoint: give the .ckpt or .pth "
                "file itself."
            )
        root = pickles[0].removesuffix("data.pkl")
        if entries[pickles[0]].file_size > _PICKLE_LIMIT:
            _damaged(self._name, "its pickle is larger than any checkpoint's")

        def copy(entry: str, into: memoryview) -> None:
            try:
                if entries[entry].file_size != len(into):
                    _damaged(
                        self._name,
                        f"{entry:.80} has {entries[entry].file_size} bytes instead of {len(into)}",
                    )
                with archive.open(entries[entry]) as source:
                    _fill(source, into)
            except (
                KeyError,
                zipfile.BadZipFile,
                NotImplementedError,
                OSError,
                EOFError,
                ValueError,
                struct.error,
            ) as error:
                _damaged(self._name, str(error), error)

        order = (
            bytearray(entries[root + "byteorder"].file_size)
            if root + "byteorder" in entries
            else bytearray(b"little")
        )
        if root + "byteorder" in entries:
            copy(root + "byteorder", memoryview(order))
        if order != b"little":
            _damaged(self._name, "its numbers are not little-endian")
        data = bytearray(entries[pickles[0]].file_size)
        copy(pickles[0], memoryview(data))
        top, _ = _unpickle(io.BytesIO(data), self._name)
        return top, lambda storage, into: copy(f"{root}data/{storage.key}", into)

    def _open_legacy(self, start: bytes) -> tuple[Any, Callable[[Storage, memoryview], None]]:
        """torch's format before 1.6: five pickles, then each storage's element count and bytes."""
        if start != _LEGACY_START:
            raise OSDFaceError(
                f"{self._name} is {_looks_like(start, self._size)}: fetch the file again from its "
                "official page."
            )
        self._file.seek(0)
        head = io.BytesIO(self._file.read(_PICKLE_LIMIT))
        _, protocol, system = (_unpickle(head, self._name)[0] for _ in range(3))
        top, storages = _unpickle(head, self._name)
        keys, _ = _unpickle(head, self._name)
        position = head.tell()
        if (
            protocol != _LEGACY_PROTOCOL
            or not isinstance(system, dict)
            or system.get("little_endian") is not True
        ):
            _damaged(self._name, "it was written by an unknown version of torch")
        if (
            not isinstance(keys, list)
            or not all(isinstance(key, str) for key in keys)
            or set(keys) != set(storages)
        ):
            _damaged(self._name, "its list of storages does not match its tensors")
        places = {}
        for key in keys:
            places[key] = position + 8
            if position + 8 + storages[key].size > self._size:
                raise OSDFaceError(
                    f"{self._name} is cut off at {self._size} bytes: fetch the file again."
                )
            self._file.seek(position)
            if struct.unpack("<q", self._file.read(8)) != (storages[key].elements,):
                _damaged(self._name, "the size of a storage is not what its tensors say")
            position += 8 + storages[key].size

        def copy(storage: Storage, into: memoryview) -> None:
            self._file.seek(places[storage.key])
            _fill(self._file, into)

        return top, copy


def _fill(source: Any, into: memoryview) -> None:
    done = 0
    while done < len(into):
        part = source.read(min(_CHUNK, len(into) - done))
        if not part:
            raise EOFError("the file ends too early")
        into[done : done + len(part)] = part
        done += len(part)


def _looks_like(start: bytes, size: int) -> str:
    text = start.lstrip().lower()
    if not size:
        return "empty"
    if text.startswith(b"<"):
        return "a web page and no checkpoint"
    if text.startswith(b"version http"):
        return "a Git LFS pointer and no checkpoint"
    if start[:1] == b"\x80":
        return "a plain pickle and no torch checkpoint, which is never opened"
    return "no torch checkpoint"
