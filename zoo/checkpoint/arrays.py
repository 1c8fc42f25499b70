"""Reads detectron2's pickles of NumPy arrays without unpickling them.

`pickle.Unpickler` calls what a file names, and reserves what a file asks for. Here the opcodes are walked by
`pickletools`, which runs none of them, and a few are followed: numbers, strings, lists, tuples, dicts, and arrays of
plain numbers, which become tensors. Nothing else is ever built, whatever the file says.
"""

import pickletools
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

# As torch.save began its files until 1.6; those are for torch.load.
_TORCH_MAGIC = 0x1950A86A20F9469CFC6C
_MAX_DEPTH = 32
MAX_STEPS = 5_000_000
# Raw bytes longer than that are handed to their array and not remembered, so that they are never there twice.
_SMALL = 4096
_KINDS = "fiub"
_MARK = object()
_SPENT = object()

_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = ("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT")
_STRINGS = ("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8")
_BYTES = ("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8")
_VALUES = {*_LITERALS, *_STRINGS, *_BYTES}
_EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
# What a file may name, and what is done where it is called.
_NAMES = {
    **{f"numpy.{module}.multiarray _reconstruct": "array" for module in ("core", "_core")},
    **{f"numpy.{module}.multiarray scalar": "scalar" for module in ("core", "_core")},
    **{f"numpy.{module}.numeric _frombuffer": "buffer" for module in ("core", "_core")},
    "numpy ndarray": "ndarray",
    "numpy dtype": "dtype",
    "_codecs encode": "encode",
    "collections OrderedDict": "dict",
    # Python 3's way of writing no bytes for Python 2.
    "__builtin__ bytes": "nothing",
}


class UnsafePickleError(ValueError):
    """A pickle that names objects, or is none of arrays; the message is a clause."""


class _Name(str):
    """A name from the list above that is on the stack."""


class _Array:
    """An array that has not been given its contents yet."""

    tensor: torch.Tensor | None = None


class _Type:
    """A dtype, once it has been told its byte order."""

    def __init__(self, code: str):
        self.code, self.order = code, "="

    def resolve(self) -> np.dtype:
        try:
            dtype = np.dtype(self.code).newbyteorder(self.order)
        except (TypeError, ValueError):
            raise UnsafePickleError(f"an array has the dtype {self.code[:20]!r}") from None
        if dtype.kind not in _KINDS or dtype.hasobject or dtype.fields or dtype.subdtype:
            raise UnsafePickleError(f"an array has the dtype {self.code[:20]!r}, which is none of plain numbers")
        return dtype


class PlainType(_Type):
    """What a file of torch makes of a NumPy dtype: NumPy's own takes states that crash the process."""

    def __init__(self, code: Any, *_: Any):
        super().__init__(_only(code, str))

    def __setstate__(self, state: Any):
        _give(self, _only(state, tuple))


def plain_scalar(dtype: Any, raw: Any) -> int | float | bool:
    """Return the number that a file of torch pickled as a NumPy scalar.

    Raises:
        UnsafePickleError: If its dtype is none of plain numbers, or its bytes are not one of them.
    """
    resolved, content = _only(dtype, _Type).resolve(), _raw(raw)
    if len(content) != resolved.itemsize:
        raise UnsafePickleError("a scalar has another length than its dtype says")
    return np.frombuffer(content, resolved)[0].item()


class _Bounded:
    """A file that gives no more than it has, so that no length in it makes anybody reserve memory."""

    def __init__(self, file: BinaryIO, size: int):
        self._file, self._size = file, size
        self.tell = file.tell

    def read(self, count: int = -1) -> bytes | bytearray:
        if not 0 <= count <= self._size - self._file.tell():
            raise UnsafePickleError("it is truncated")
        if count <= _SMALL:
            return self._file.read(count)
        # An array's contents, which stay where they were read to.
        content = bytearray(count)
        if self._file.readinto(content) != count:
            raise UnsafePickleError("it is truncated")
        return content

    def readline(self) -> bytes:
        line = self._file.readline(1000)
        if not line.endswith(b"\n"):
            raise UnsafePickleError("it is truncated")
        return line


def is_pickle(path: str | Path) -> bool:
    """Return whether a file is a bare pickle, other than those in which torch kept its tensors."""
    with open(path, "rb") as file:
        if file.read(1) != b"\x80":
            return False
        file.seek(0)
        try:
            opcodes = pickletools.genops(_Bounded(file, Path(path).stat().st_size))
            next(opcodes)
            return next(opcodes)[1] != _TORCH_MAGIC
        except (ValueError, StopIteration):
            return True  # a broken one, which the reader refuses


def read_arrays(path: str | Path) -> Any:
    """Return what a pickle of arrays holds, its arrays as tensors.

    Raises:
        UnsafePickleError: If there is anything else in it than plain types and arrays of plain numbers, it is nested
            too deeply, or truncated.
    """
    with open(path, "rb") as file:
        try:
            return _Machine().run(_Bounded(file, Path(path).stat().st_size))
        except UnsafePickleError:
            raise
        except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise UnsafePickleError(f"its opcodes make no sense ({type(error).__name__})") from error


class _Machine:
    """The part of pickle's stack machine that arrays and plain types need."""

    def __init__(self):
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, file: _Bounded) -> Any:
        for step, (opcode, argument, _) in enumerate(pickletools.genops(file)):
            if step > MAX_STEPS:
                raise UnsafePickleError(f"it has more than {MAX_STEPS:,} opcodes")
            if opcode.name == "STOP":
                break
            self._follow(opcode.name, argument)
        (result,) = self.stack
        self._left = MAX_STEPS
        self._done: dict[int, tuple[Any, Any, int]] = {}
        return self._finished(result)

    def _finished(self, value: Any, depth: int = 0) -> Any:
        """Return a value with tensors in the place of arrays; lists may be in lists many times, so they are counted.

        What was finished once is not walked again: a few doubled lists mean billions of things.
        """
        before = self._left
        _, finished, cost = self._done.get(id(value), (None, None, 1))
        self._left -= cost
        if depth > _MAX_DEPTH or self._left < 0:
            raise UnsafePickleError(f"it is nested more than {_MAX_DEPTH} deep, or endlessly")
        if isinstance(value, _Array):
            if value.tensor is None:
                raise UnsafePickleError("an array has no contents")
            return value.tensor
        if finished is not None:
            return finished
        if isinstance(value, dict | list | tuple):
            if isinstance(value, dict):
                finished = {key: self._finished(item, depth + 1) for key, item in value.items()}
            else:
                finished = type(value)(self._finished(item, depth + 1) for item in value)
            self._done[id(value)] = value, finished, before - self._left
            return finished
        if isinstance(value, _Name | _Type):
            raise UnsafePickleError("its opcodes make no sense")
        return value

    def _follow(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in ("PROTO", "FRAME"):
            return
        if name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _VALUES:
            stack.append(argument)
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name in _TUPLES:
            stack.append(tuple(self._take(_TUPLES[name])))
        elif name == "MARK":
            stack.append(_MARK)
        elif name in ("TUPLE", "LIST"):
            items = self._to_mark()
            stack.append(tuple(items) if name == "TUPLE" else items)
        elif name == "DICT":
            stack.append(_pairs(self._to_mark()))
        elif name in ("APPEND", "APPENDS"):
            items = self._take(1) if name == "APPEND" else self._to_mark()
            _only(stack[-1], list).extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = self._take(2) if name == "SETITEM" else self._to_mark()
            _only(stack[-1], dict).update(_pairs(items))
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self._remember(argument)
        elif name == "MEMOIZE":
            self._remember(len(self.memo))
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            if (value := self.memo[argument]) is _SPENT:
                raise UnsafePickleError("two arrays share their contents")
            stack.append(value)
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            stack.append(_named(argument if name == "GLOBAL" else " ".join(self._take(2))))
        elif name == "REDUCE":
            function, arguments = self._take(2)
            stack.append(_call(_only(function, _Name), _only(arguments, tuple)))
        elif name == "BUILD":
            (state,) = self._take(1)
            _give(stack[-1], _only(state, tuple))
        elif name in ("POP", "POP_MARK"):
            _ = self._take(1) if name == "POP" else self._to_mark()
        else:
            raise UnsafePickleError(f"it has the opcode {name}, which no file of arrays needs")

    def _take(self, count: int) -> list[Any]:
        taken = self.stack[-count:]
        if len(taken) < count or any(value is _MARK for value in taken):
            raise UnsafePickleError("its opcodes make no sense")
        del self.stack[-count:]
        return taken

    def _to_mark(self) -> list[Any]:
        start = max(index for index, value in enumerate(self.stack) if value is _MARK)
        items = self.stack[start + 1 :]
        del self.stack[start:]
        return items

    def _remember(self, index: int) -> None:
        value = self.stack[-1]
        large = isinstance(value, str | bytes | bytearray) and len(value) > _SMALL
        self.memo[index] = _SPENT if large else value


def _only(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise UnsafePickleError("its opcodes make no sense")
    return value


def _pairs(items: list[Any]) -> dict:
    keys = items[::2]
    if len(items) % 2 or not all(isinstance(key, str | bytes | int) for key in keys):
        raise UnsafePickleError("a dict has keys that are no names")
    return dict(zip(keys, items[1::2], strict=True))


def _named(name: str) -> _Name:
    if name not in _NAMES:
        raise UnsafePickleError(f"it pickles {'.'.join(name.split(' '))[:80]!r}, which could run code when read")
    return _Name(_NAMES[name])


def _call(function: _Name, arguments: tuple) -> Any:
    """Do what one of the allowed names does with its arguments."""
    if function == "dict":
        if arguments not in ((), ([],)):
            raise UnsafePickleError("its opcodes make no sense")
        return {}
    if function == "nothing" and arguments == ():
        return b""
    if function == "encode":
        text, encoding = arguments
        if encoding != "latin1":
            raise UnsafePickleError(f"bytes are encoded as {str(encoding)[:20]!r}")
        return _only(text, str).encode("latin1")
    if function == "dtype":
        return _Type(_only(arguments[0], str))
    if function == "array":
        return _Array()
    if function == "scalar":
        dtype, raw = arguments
        return plain_scalar(dtype, raw)
    if function == "buffer":
        raw, dtype, shape, order = arguments
        array = _Array()
        _fill(array, shape, dtype, order == "F", raw)
        return array
    raise UnsafePickleError("its opcodes make no sense")


def _give(target: Any, state: tuple) -> None:
    """Tell a dtype its byte order, or an array its contents."""
    if isinstance(target, _Type):
        if len(state) < 5:
            raise UnsafePickleError("its opcodes make no sense")
        _, order, subarray, names, fields, *_ = state
        if subarray is not None or names is not None or fields is not None:
            raise UnsafePickleError("an array has records instead of numbers")
        if order not in ("<", ">", "=", "|"):
            raise UnsafePickleError("its opcodes make no sense")
        target.order = order
    elif isinstance(target, _Array):
        _, shape, dtype, fortran, raw = state
        _fill(target, shape, dtype, bool(fortran), raw)
    else:
        raise UnsafePickleError("its opcodes make no sense")


def _raw(value: Any) -> bytes | bytearray:
    # What Python 2 wrote are strings, a character for a byte.
    return value.encode("latin1") if isinstance(value, str) else _only(value, bytes | bytearray)


def _fill(array: _Array, shape: Any, dtype: Any, fortran: bool, raw: Any) -> None:
    dtype = _only(dtype, _Type).resolve()
    if not isinstance(shape, tuple) or not all(type(side) is int and side >= 0 for side in shape) or len(shape) > 16:
        raise UnsafePickleError("an array has no shape")
    if isinstance(raw, list):
        raise UnsafePickleError("an array holds objects instead of numbers")
    raw = _raw(raw)
    count = 1
    for side in shape:
        count *= side
    if count * dtype.itemsize != len(raw):
        raise UnsafePickleError("an array has another length than its shape says")
    content = raw if isinstance(raw, bytearray) else bytearray(raw)
    values = np.frombuffer(content, dtype).reshape(shape, order="F" if fortran else "C")
    values = np.ascontiguousarray(values).reshape(shape)
    if not dtype.isnative:
        values = values.astype(dtype.newbyteorder("="))
    try:
        array.tensor = torch.from_numpy(values)
    except TypeError:
        raise UnsafePickleError(f"an array has the dtype {dtype}, which torch has not") from None
