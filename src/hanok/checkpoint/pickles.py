"""Finds the tensors in a file of `torch.save` without torch and without running what is in it.

A pickle is a program that may call anything. Here it may use only the opcodes that `torch.save`
writes and name only the entries of `_KNOWN`, inert stand-ins that note which storage, offset and
strides a tensor has. The bytes stay in the file: zip entries are stored uncompressed, and files
from before the zip format hold their storages one after the other.

Invariant: nothing outside this module is ever imported, called or changed by a file. Every view
that is returned lies inside its storage, and every storage inside the file.

Cost: the pickle is read twice (a scan, then the stand-ins), at most `MAX_PICKLE_BYTES`; no data is.
"""

import io
import math
import pickle
import pickletools
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from hanok.checkpoint.safetensors import DTYPE_BITS, LFS_MARK, TensorRef, count_elements
from hanok.errors import CheckpointError

MAX_PICKLE_BYTES = 64 * 2**20
MAX_EXPANDED_BYTES = 2**30
STREAM_MAGIC = 0x1950A86A20F9469CFC6C
STREAM_PROTOCOL = 1001
ZIP_MAGIC = b"PK\x03\x04"
ZIP_LOCAL_HEADER_BYTES = 30
NESTED_KEYS = ("state_dict", "model")
ADVICE = (
    "Nothing was executed. Ask for the weights as safetensors, or, if you trust where the file "
    "comes from, load it with torch there and save a plain dict of tensors"
)

_OPCODE_NAMES = """
    PROTO FRAME STOP MARK POP POP_MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT
    BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINUNICODE SHORT_BINUNICODE
    EMPTY_LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_DICT SETITEM SETITEMS
    BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET GLOBAL STACK_GLOBAL REDUCE BUILD BINPERSID
"""
_OPCODES = frozenset(_OPCODE_NAMES.split())
"""The opcodes that `torch.save` writes at pickle protocols 2 to 5, without INST, OBJ, NEWOBJ and EXT."""

_STORAGE_DTYPES = {
    "FloatStorage": "F32",
    "DoubleStorage": "F64",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
    "ComplexFloatStorage": "C64",
    "UntypedStorage": "U8",
    "TypedStorage": "U8",
}
_TORCH_DTYPES = {
    "float32": "F32",
    "float64": "F64",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
    "complex64": "C64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
}


def read_pickle_header(path: Path) -> dict[str, TensorRef]:
    """Return the tensors of a `torch.save` file: of its dict, else of its state_dict or model.

    Names that share memory give refs with equal offsets. A file that is damaged, of another format,
    or that names anything but tensors and plain values is a CheckpointError.
    """
    try:
        file_bytes = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(512)
            file.seek(0)
            if head.startswith(ZIP_MAGIC):
                root, storages = _read_zip(file, path, file_bytes)
            else:
                _refuse_other_formats(path, head)
                root, storages = _read_stream(file, path, file_bytes)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    return {
        name: _tensor_ref(path, name, view, storages, file_bytes)
        for name, view in _named_views(path, root)
    }


class _RefusedError(Exception):
    """A pickle asked for something refused; the reader of the file adds path and advice."""


# Stand-ins: what a pickle may build. `__setstate__` is what BUILD would call; it refuses, so that
# no file can change a stand-in after the fact.


def _refuse_state(stand_in: object, state: object) -> NoReturn:
    raise _RefusedError(f"sets the state of a {type(stand_in).__name__[1:]}, which has none")


@dataclass(frozen=True, slots=True)
class _Known:
    """A global that a file may name; REDUCE calls `build`, which only makes stand-ins."""

    build: Callable[..., object]

    def __call__(self, *args: object) -> object:
        return self.build(*args)

    __setstate__ = _refuse_state


@dataclass(frozen=True, slots=True)
class _Dtype:
    """A torch dtype or a storage class, by its safetensors name."""

    name: str
    is_storage: bool

    __setstate__ = _refuse_state


@dataclass(frozen=True, slots=True)
class _Storage:
    """Bytes of the file that tensors view; a part of a storage in the oldest files."""

    key: str
    dtype: str
    size_bytes: int
    part_offset_bytes: int
    part_bytes: int

    __setstate__ = _refuse_state


@dataclass(frozen=True, slots=True)
class _View:
    """A tensor: a shape laid over a storage. Types are checked when it becomes a TensorRef."""

    storage: object
    offset: object
    shape: object
    strides: object
    dtype: object
    flags: object

    __setstate__ = _refuse_state


class _StateDict(dict[object, object]):
    """An OrderedDict whose attributes (`_metadata` of a state_dict) are dropped."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        return


def _view(storage: object, offset: object, shape: object, strides: object) -> _View:
    return _View(storage, offset, shape, strides, None, None)


def _view_v2(
    storage: object,
    offset: object,
    shape: object,
    strides: object,
    requires_grad: object,
    hooks: object,
    flags: object = None,
) -> _View:
    return _View(storage, offset, shape, strides, None, flags)


def _view_v3(
    storage: object,
    offset: object,
    shape: object,
    strides: object,
    requires_grad: object,
    hooks: object,
    dtype: object,
    flags: object = None,
) -> _View:
    return _View(storage, offset, shape, strides, dtype, flags)


def _parameter(data: object, *rest: object) -> object:
    return data


def _size(extents: object = ()) -> object:
    return extents


_KNOWN: Mapping[tuple[str, str], object] = {
    ("collections", "OrderedDict"): _Known(_StateDict),
    ("torch", "Size"): _Known(_size),
    ("torch._utils", "_rebuild_tensor"): _Known(_view),
    ("torch._utils", "_rebuild_tensor_v2"): _Known(_view_v2),
    ("torch._utils", "_rebuild_tensor_v3"): _Known(_view_v3),
    ("torch._utils", "_rebuild_parameter"): _Known(_parameter),
    ("torch._utils", "_rebuild_parameter_with_state"): _Known(_parameter),
    **{
        (module, name): _Dtype(dtype, is_storage=True)
        for name, dtype in _STORAGE_DTYPES.items()
        for module in ("torch", "torch.storage")
    },
    **{("torch", name): _Dtype(dtype, is_storage=False) for name, dtype in _TORCH_DTYPES.items()},
}
"""Everything that a file may name. The values are immutable."""


class _Unpickler(pickle.Unpickler):
    """Builds stand-ins; `storages` collects every storage that the pickle names."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module_name: str, global_name: str, /) -> object:
        known = _KNOWN.get((module_name, global_name))
        if known is None:
            raise _RefusedError(
                f"names {module_name}.{global_name}, which does not belong to a plain dict of tensors"
            )
        return known

    def persistent_load(self, pid: object) -> _Storage:
        storage = _storage(pid)
        first = self.storages.setdefault(storage.key, storage)
        if first.size_bytes != storage.size_bytes:
            raise _RefusedError(
                f"says that storage {storage.key!r} holds {first.size_bytes} bytes and "
                f"{storage.size_bytes} bytes"
            )
        return storage


def _storage(pid: object) -> _Storage:
    """Return the storage that ("storage", class, key, device, elements[, part of it]) names."""
    match pid:
        case ("storage", _Dtype(is_storage=True) as kind, str(key), _, int(count), *rest):
            part = rest[0] if rest else None
        case _:
            raise _RefusedError("names something outside the pickle that is no storage")
    item_bytes = DTYPE_BITS[kind.name] // 8
    match part:
        case None:
            begin, length = 0, count
        case (_, int(begin), int(length)):
            pass
        case _:
            raise _RefusedError(f"describes no part of storage {key!r} that can be understood")
    if count < 0 or not 0 <= begin <= begin + length <= count:
        raise _RefusedError(
            f"takes elements {begin} to {begin + length} of storage {key!r}, which has {count}"
        )
    return _Storage(key, kind.name, count * item_bytes, begin * item_bytes, length * item_bytes)


class _Window:
    """A file limited to the bytes before `end`, for a reader that would read on."""

    def __init__(self, file: BinaryIO, end: int) -> None:
        self.file = file
        self.end = end

    def read(self, count: int) -> bytes:
        return self.file.read(max(0, min(count, self.end - self.file.tell())))

    def readline(self) -> bytes:
        return self.file.readline(max(0, self.end - self.file.tell()))

    def tell(self) -> int:
        return self.file.tell()


def _load(file: BinaryIO, path: Path, end: int) -> tuple[Any, dict[str, _Storage]]:
    """Return one pickle of stand-ins that starts at the file's position; leaves it after STOP."""
    start = file.tell()
    window = _Window(file, min(end, start + MAX_PICKLE_BYTES))
    try:
        for opcode, argument, position in pickletools.genops(window):  # type: ignore[arg-type]  # a window is read like a file
            if opcode.name not in _OPCODES:
                raise _RefusedError(
                    f"uses the pickle opcode {opcode.name} ({argument!r:.80}), which torch.save "
                    "does not write"
                )
            # The unpickler reserves room for every index up to this one, so a five-byte opcode
            # could claim 32 GiB. An honest index counts the opcodes before it.
            if opcode.name == "LONG_BINPUT" and int(argument or 0) > (position or 0):
                raise _RefusedError(
                    f"numbers a pickled object {argument} after {position} bytes, which would only "
                    "fill the memory"
                )
        size = file.tell() - start
        file.seek(start)
        unpickler = _Unpickler(file.read(size))
        return unpickler.load(), unpickler.storages
    except _RefusedError as error:
        raise CheckpointError(f"{path}: {error}, and is refused. {ADVICE}") from None
    except OSError:
        raise
    # A damaged pickle can make the unpickler raise anything; which error it is does not matter.
    except Exception as error:
        raise CheckpointError(
            f"{path}: the pickle at byte {start} cannot be read ({type(error).__name__}: "
            f"{error!s:.200}); it is damaged, cut off, or larger than {MAX_PICKLE_BYTES} bytes. "
            f"{ADVICE}"
        ) from error


def _refuse_other_formats(path: Path, head: bytes) -> None:
    if head.startswith(LFS_MARK):
        raise CheckpointError(
            f"{path}: is a Git LFS pointer and not the weights; fetch them with `git lfs pull`"
        )
    if head[257:262] == b"ustar":
        raise CheckpointError(
            f"{path}: is in the tar format of the first PyTorch releases, which is not supported; "
            "load it with torch where you trust it and save it again"
        )
    if not head.startswith(pickle.PROTO):
        raise CheckpointError(
            f"{path}: starts with {head[:8]!r} and was not written by torch.save (neither zip nor "
            "the magic number of the format before it); get it again or give another file"
        )


# A region is (offset in the file, length), both in bytes.
_Regions = Mapping[str, tuple[int, int]]


def _read_zip(file: BinaryIO, path: Path, file_bytes: int) -> tuple[object, _Regions]:
    """Return the object in a zip archive of torch.save and the region of each storage."""
    entries = _zip_entries(file, path, file_bytes)
    pickles = [name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise CheckpointError(
            f"{path}: is a zip archive with {len(pickles)} entries NAME/data.pkl and not one, so "
            "it was not written by torch.save; give another file"
        )
    prefix = pickles[0].removesuffix("data.pkl")
    if order := entries.get(f"{prefix}byteorder"):
        file.seek(order[0])
        if (text := file.read(min(order[1], 16))) != b"little":
            raise CheckpointError(
                f"{path}: was saved in the byte order {text!r}, and only little is supported; "
                "save it again on a little-endian machine"
            )
    begin, size = entries[pickles[0]]
    file.seek(begin)
    root, _ = _load(file, path, begin + size)
    folder = f"{prefix}data/"
    return root, {
        name.removeprefix(folder): region
        for name, region in entries.items()
        if name.startswith(folder)
    }


def _zip_entries(file: BinaryIO, path: Path, file_bytes: int) -> dict[str, tuple[int, int]]:
    """Return the region of the data of every entry of a zip archive."""
    try:
        infos = zipfile.ZipFile(file).infolist()
    except OSError:
        raise
    # As with a pickle: a damaged directory fails in many ways, in Python and in C.
    except Exception as error:
        raise CheckpointError(
            f"{path}: begins like a zip archive and has no readable directory at its end "
            f"({error}); a download was probably cut off after {file_bytes} bytes, get it again"
        ) from None
    entries: dict[str, tuple[int, int]] = {}
    for info in infos:
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise CheckpointError(
                f"{path}: zip entry {info.filename!r} is compressed or encrypted, which torch.save "
                "never does; unpack it and pack it again with `zip -0`"
            )
        # The directory does not say how long the local header is; the local header does.
        is_inside = 0 <= info.header_offset < file_bytes
        file.seek(info.header_offset if is_inside else file_bytes)
        local = file.read(ZIP_LOCAL_HEADER_BYTES)
        extra = sum(int.from_bytes(local[at : at + 2], "little") for at in (26, 28))
        begin = info.header_offset + ZIP_LOCAL_HEADER_BYTES + extra
        if not local.startswith(ZIP_MAGIC) or begin + info.file_size > file_bytes:
            raise CheckpointError(
                f"{path}: zip entry {info.filename!r} of {info.file_size} bytes does not lie "
                f"where the directory says, in a file of {file_bytes} bytes; it is damaged"
            )
        if info.filename in entries:
            raise CheckpointError(f"{path}: zip entry {info.filename!r} is there twice")
        entries[info.filename] = (begin, info.file_size)
    return entries


def _read_stream(file: BinaryIO, path: Path, file_bytes: int) -> tuple[object, _Regions]:
    """Return the object and storages of the pre-zip format: five pickles, then raw storages."""
    for wanted in (STREAM_MAGIC, STREAM_PROTOCOL):
        mark, _ = _load(file, path, file_bytes)
        if mark != wanted:
            raise CheckpointError(
                f"{path}: is marked by {_shown(mark)}, where torch.save writes {wanted}; it is "
                "damaged or a pickle of another program"
            )
    system, _ = _load(file, path, file_bytes)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise CheckpointError(
            f"{path}: was not saved on a little-endian machine, and nothing else is supported"
        )
    root, storages = _load(file, path, file_bytes)
    keys, _ = _load(file, path, file_bytes)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise CheckpointError(f"{path}: the list of storages is damaged; get the file again")
    regions: dict[str, tuple[int, int]] = {}
    for key in keys:
        prefix = file.read(8)
        if (storage := storages.get(key)) is None or len(prefix) < 8:
            raise CheckpointError(
                f"{path}: storage {key!r} is not used by the pickle, or missing because the file "
                f"ends at byte {file_bytes}; a download was probably cut off, get it again"
            )
        size = int.from_bytes(prefix, "little", signed=True) * DTYPE_BITS[storage.dtype] // 8
        begin = file.tell()
        if not 0 <= size <= file_bytes - begin:
            raise CheckpointError(
                f"{path}: storage {key!r} needs {size} bytes from byte {begin} on, and the file "
                f"ends at byte {file_bytes}; a download was probably cut off, get it again"
            )
        regions[key] = (begin, size)
        file.seek(begin + size)
    return root, regions


def _named_views(path: Path, root: object) -> Iterator[tuple[str, _View]]:
    """Yield the tensors of the dict that holds the weights."""
    if not isinstance(root, dict):
        raise CheckpointError(f"{path}: holds a {type(root).__name__.strip('_')}, not a state_dict")
    nested = (root.get(key) for key in NESTED_KEYS)
    levels = [level for level in (root, *nested) if isinstance(level, dict) and _has_view(level)]
    if not levels:
        raise CheckpointError(
            f"{path}: holds no tensors at the top, in 'state_dict' or in 'model'; its keys are "
            f"{[key for key in root if isinstance(key, str)][:20]}"
        )
    for name, value in levels[0].items():
        if isinstance(value, _View):
            if not isinstance(name, str):
                raise CheckpointError(f"{path}: a tensor is named by a {type(name).__name__}")
            yield name, value
        elif _has_view(value):
            # Dropping them silently would lose weights.
            raise CheckpointError(
                f"{path}: a {type(value).__name__.strip('_')} of tensors, {_shown(name)}, is next to "
                "other tensors, so it is not clear which are the weights; save a flat dict of them"
            )


def _shown(value: object) -> str:
    """Return a text for messages; that of a nested object could be larger than any memory."""
    return repr(value) if isinstance(value, (str, int)) else type(value).__name__


def _has_view(value: object) -> bool:
    if isinstance(value, dict):
        return any(isinstance(item, _View) for item in value.values())
    return isinstance(value, (list, tuple)) and any(isinstance(item, _View) for item in value)


def _tensor_ref(
    path: Path, name: str, view: _View, storages: _Regions, file_bytes: int
) -> TensorRef:
    """Return the place of a view in the file, after checking that it lies inside its storage."""
    where = f"{path}: tensor {name!r}"
    storage, offset = view.storage, view.offset
    if not isinstance(storage, _Storage) or type(offset) is not int or offset < 0 or view.flags:
        raise CheckpointError(
            f"{where} has no storage, no valid offset, or is a conjugate or negative view; save "
            "it again after calling resolve_conj() and resolve_neg()"
        )
    shape, strides = _naturals(view.shape, where), _naturals(view.strides, where)
    if len(shape) != len(strides):
        raise CheckpointError(f"{where} has the shape {shape}, but the strides {strides}")
    dtype = view.dtype.name if isinstance(view.dtype, _Dtype) else storage.dtype
    if storage.key not in storages:
        raise CheckpointError(
            f"{where} needs storage {storage.key!r} of {storage.size_bytes} bytes, which the file "
            f"of {file_bytes} bytes lacks; a download was probably cut off, get it again"
        )
    begin, size_bytes = storages[storage.key]
    if size_bytes != storage.size_bytes:
        raise CheckpointError(
            f"{where} expects {storage.size_bytes} bytes in storage {storage.key!r}, and the file "
            f"has {size_bytes}; it is damaged, get it again"
        )
    item_bytes = DTYPE_BITS[dtype] // 8
    count = count_elements(shape, where)
    reach = sum((extent - 1) * stride for extent, stride in zip(shape, strides, strict=True))
    used_bytes = (reach + 1) * item_bytes if count else 0
    if offset * item_bytes + used_bytes > storage.part_bytes:
        raise CheckpointError(
            f"{where} of dtype {dtype}, shape {shape} and strides {strides} uses bytes "
            f"{offset * item_bytes} to {offset * item_bytes + used_bytes} of a storage of "
            f"{storage.part_bytes} bytes; the file is damaged"
        )
    if count * item_bytes > max(file_bytes, MAX_EXPANDED_BYTES):
        raise CheckpointError(
            f"{where} of shape {shape} repeats {used_bytes} bytes until they are "
            f"{count * item_bytes}, more than the whole file of {file_bytes}; save it unexpanded"
        )
    return TensorRef(
        name=name,
        dtype=dtype,
        shape=shape,
        path=path,
        offset_bytes=begin + storage.part_offset_bytes + offset * item_bytes,
        size_bytes=used_bytes,
        strides=None if _is_dense(shape, strides) else strides,
    )


def _naturals(value: object, where: str) -> tuple[int, ...]:
    if not isinstance(value, (tuple, list)) or not all(type(i) is int and i >= 0 for i in value):
        raise CheckpointError(f"{where} has a shape or strides that are no integers >= 0")
    return tuple(value)


def _is_dense(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether the elements lie in C order without gaps."""
    if not math.prod(shape):
        return True
    step = 1
    for extent, stride in zip(reversed(shape), reversed(strides), strict=True):
        if extent != 1 and stride != step:
            return False
        step *= extent
    return True
