"""A walk through a pickle as torch.jit.save writes it: every step is looked at, none is carried out."""

from __future__ import annotations

import math
import pickletools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_DEEPEST = 100
_MOST_DIMENSIONS = 64
_LONGEST_TYPE = 500

_STORAGES = {
    **{"DoubleStorage": 8, "FloatStorage": 4, "HalfStorage": 2, "BFloat16Storage": 2, "LongStorage": 8},
    **{"IntStorage": 4, "ShortStorage": 2, "CharStorage": 1, "ByteStorage": 1, "BoolStorage": 1},
    **{"ComplexFloatStorage": 8, "ComplexDoubleStorage": 16},
}
_LISTS = ("build_intlist", "build_doublelist", "build_boollist", "build_tensorlist")
_VALUES = {"BINFLOAT", "BININT", "BININT1", "BININT2", "BINUNICODE", "SHORT_BINUNICODE"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclass(frozen=True)
class _Global:
    module: str
    name: str


@dataclass(frozen=True)
class _Storage:
    numbers: int


class _Node:
    """Something made of other things: how deep it is, and whether it came from the memo, so that it may not grow."""

    def __init__(self, kind: str, depth: int, items: tuple[Any, ...] = ()) -> None:
        self.kind, self.depth, self.items, self.taken = kind, depth, items, False


class Walk:
    """The steps of one pickle. ``sizes``: bytes of the parts of the archive; storages lie in ``folder``/KEY there."""

    def __init__(self, content: bytes, sizes: Mapping[str, int], folder: str) -> None:
        self._content, self._sizes, self._folder = content, sizes, folder
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def check(self) -> None:
        """Raise ValueError for a step that torch.jit.save does not write, and for sizes that are not true."""
        steps = 0
        try:
            for code, argument, _ in pickletools.genops(self._content):
                steps += 1
                self._step(code.name, argument, steps)
        except (IndexError, KeyError, TypeError, AttributeError, UnicodeDecodeError):
            raise ValueError("a step lacks what it needs") from None
        if len(self._stack) != 1 or self._marks:
            raise ValueError("it does not end with one value")

    def _step(self, code: str, argument: Any, steps: int) -> None:
        if code in _VALUES:
            self._stack.append(argument)
        elif code == "LONG1":
            if not -(2**63) <= argument < 2**63:
                raise ValueError("a number is too long")
            self._stack.append(argument)
        elif code in _CONSTANTS:
            self._stack.append(_CONSTANTS[code])
        elif code in _TUPLES:
            self._stack.append(self._made("tuple", self._popped(_TUPLES[code])))
        elif code in ("EMPTY_LIST", "EMPTY_DICT"):
            self._stack.append(_Node(code[6:].lower(), 1))
        elif code == "MARK":
            self._marks.append(len(self._stack))
        elif code == "TUPLE":
            self._stack.append(self._made("tuple", self._since_mark()))
        elif code in ("APPENDS", "SETITEMS"):
            self._grow("list" if code == "APPENDS" else "dict", self._since_mark())
        elif code in ("APPEND", "SETITEM"):
            self._grow("list" if code == "APPEND" else "dict", self._popped(1 if code == "APPEND" else 2))
        elif code in ("BINPUT", "LONG_BINPUT"):
            # The reader makes room for as many entries as the number says.
            if not 0 <= argument <= steps:
                raise ValueError("a memo number is too large")
            self._memo[argument] = self._stack[-1]
        elif code in ("BINGET", "LONG_BINGET"):
            value = self._memo[argument]
            if isinstance(value, _Node):
                value.taken = True
            self._stack.append(value)
        elif code == "GLOBAL":
            self._stack.append(self._global(argument))
        elif code == "BINPERSID":
            self._stack.append(self._storage(self._popped(1)[0]))
        elif code == "REDUCE":
            function, arguments = self._popped(2)
            self._stack.append(self._reduced(function, arguments))
        elif code == "NEWOBJ":
            kind, arguments = self._popped(2)
            if not isinstance(kind, _Global) or not kind.module.startswith("__torch__") or arguments.items:
                raise ValueError("an object is of no class of its code")
            self._stack.append(_Node("object", 1))
        elif code == "BUILD":
            (state,) = self._popped(1)
            self._grow("object", (state,))
        elif code not in ("PROTO", "STOP"):
            raise ValueError(f"step {code} is unknown")

    def _popped(self, count: int) -> tuple[Any, ...]:
        if len(self._stack) - count < (self._marks[-1] if self._marks else 0):
            raise ValueError("a step lacks what it needs")
        if not count:
            return ()
        found = tuple(self._stack[-count:])
        del self._stack[-count:]
        return found

    def _since_mark(self) -> tuple[Any, ...]:
        start = self._marks.pop()
        found = tuple(self._stack[start:])
        del self._stack[start:]
        return found

    @staticmethod
    def _made(kind: str, items: tuple[Any, ...]) -> _Node:
        depth = 1 + max((item.depth for item in items if isinstance(item, _Node)), default=0)
        if depth > _DEEPEST:
            raise ValueError("it is nested too deeply")
        return _Node(kind, depth, items)

    def _grow(self, kind: str, items: tuple[Any, ...]) -> None:
        target = self._stack[-1]
        # What came from the memo stands elsewhere too, perhaps within itself.
        if target.kind != kind or target.taken or (kind == "dict" and len(items) % 2):
            raise ValueError(f"values are put into what is no new {kind}")
        target.depth = max(target.depth, self._made(kind, items).depth)

    @staticmethod
    def _global(argument: str) -> _Global:
        module, _, name = argument.partition(" ")
        own = re.fullmatch(r"__torch__(\.\w+)*", module) is not None and re.fullmatch(r"\w+", name) is not None
        if own and not module.startswith("__torch__.torch.classes"):
            return _Global(module, name)
        known = {
            ("torch._utils", "_rebuild_tensor_v2"),
            ("collections", "OrderedDict"),
            ("torch", "device"),
            ("torch.jit._pickle", "restore_type_tag"),
            *(("torch.jit._pickle", each) for each in _LISTS),
            *(("torch", each) for each in _STORAGES),
        }
        if (module, name) not in known:
            raise ValueError(f"it names {module[:60]}.{name[:60]}")
        return _Global(module, name)

    def _storage(self, description: Any) -> _Storage:
        word, kind, key, device, numbers = description.items[:5]
        if word != "storage" or not isinstance(kind, _Global) or kind.name not in _STORAGES or device != "cpu":
            raise ValueError("a storage is of an unknown kind")
        if type(numbers) is not int or not isinstance(key, str):
            raise ValueError("a storage has no size or no name")
        if self._sizes.get(f"{self._folder}/{key}", -1) != numbers * _STORAGES[kind.name]:
            raise ValueError(f"storage {key[:20]} has another size than the archive holds")
        return _Storage(numbers)

    def _reduced(self, function: Any, arguments: Any) -> Any:
        if not isinstance(function, _Global) or arguments.kind != "tuple":
            raise ValueError("it calls what is no function")
        given = arguments.items
        if function.name == "_rebuild_tensor_v2":
            self._check_tensor(*given)
            return _Node("tensor", 1)
        if function.name == "OrderedDict" and not given:
            return _Node("dict", 1)
        if function.name == "device" and len(given) == 1 and given[0] in ("cpu", "cuda", "cuda:0"):
            return _Node("device", 1)
        if function.name in _LISTS and len(given) == 1 and given[0].kind == "list":
            return self._made("typed", given)
        if function.name == "restore_type_tag" and len(given) == 2 and isinstance(given[0], _Node):
            text = given[1]
            if len(text) > _LONGEST_TYPE or text.count("[") > 20 or text.count("(") > 20:
                raise ValueError("the name of a type is too long")
            return self._made("typed", given)
        raise ValueError(f"it calls {function.name}")

    @staticmethod
    def _check_tensor(storage: Any, offset: Any, shape: Any, strides: Any, needs_gradient: Any, hooks: Any) -> None:
        sizes, steps = shape.items, strides.items
        numbers = (offset, *sizes, *steps)
        if not isinstance(storage, _Storage) or shape.kind != "tuple" or strides.kind != "tuple":
            raise ValueError("a tensor has no storage or no shape")
        if len(sizes) != len(steps) or len(sizes) > _MOST_DIMENSIONS or type(needs_gradient) is not bool:
            raise ValueError("a tensor has no valid shape")
        if not all(type(number) is int and 0 <= number < 2**62 for number in numbers):
            raise ValueError("a tensor has no valid shape")
        count = math.prod(sizes)
        last = offset + sum((size - 1) * step for size, step in zip(sizes, steps, strict=True))
        if count > storage.numbers or offset > storage.numbers or (count and last >= storage.numbers):
            raise ValueError("a tensor is larger than its storage")
