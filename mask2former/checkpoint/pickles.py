"""A pickle machine for plain data: it imports nothing, and calls nothing but the parts it is given.

Python's own unpickler imports whatever a file names, and even a restricted one can be brought down by a file: a
memo index of four billion takes all memory, a key of tuples in tuples overflows the stack. Checkpoints need
about forty of the opcodes, so here are these, on Python objects whose kind is checked at every step.
"""

import pickletools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pickle import UnpicklingError
from typing import Any, BinaryIO

__all__ = ["Unfinished", "as_key", "module_versions", "read_pickle"]

Parts = Mapping[str, Callable[..., Any]]

CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
NUMBERS = ("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT")
TEXTS = ("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8")
BYTES = ("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8")
LITERALS = frozenset((*NUMBERS, *TEXTS, *BYTES))
TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
HEADERS = ("PROTO", "FRAME")


@dataclass(frozen=True)
class _Global:
    """A name in a file. It is never looked up in any module, only in the table of parts."""

    name: str


@dataclass(eq=False)
class Unfinished:
    """What a part returns where a BUILD opcode with its state follows.

    Attributes:
        finish: from the state to the object.
        result: the object, when the state has come.
    """

    finish: Callable[[Any], Any]
    result: Any = None


def read_pickle(file: BinaryIO, parts: Parts) -> Any:
    """Read the first pickle of a file.

    Args:
        parts: what stands for the functions and classes that the file may name, by "module.name". A part is
            called with whatever arguments the file gives, and has to check them.

    Returns:
        Numbers, text, bytes, lists, tuples, dicts, and what the parts return.

    Raises:
        UnpicklingError: if the file names anything else, or asks for anything else.
        ValueError, IndexError, KeyError, TypeError: if it is broken.
    """
    machine = _Machine(parts)
    for opcode, argument, _ in pickletools.genops(file):
        machine.step(opcode.name, argument)
    return machine.stack.pop()


class _Machine:
    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.stack: list[Any] = []
        self.marks: list[int] = []  # lengths of the stack at the MARK opcodes
        self.memo: dict[int, Any] = {}
        self.actions: dict[str, Callable[[Any], None]] = {
            "MARK": lambda _: self.marks.append(len(self.stack)),
            "EMPTY_LIST": lambda _: self.stack.append([]),
            "EMPTY_DICT": lambda _: self.stack.append({}),
            "LIST": lambda _: self.stack.append(self.since_mark()),
            "TUPLE": lambda _: self.stack.append(tuple(self.since_mark())),
            "DICT": lambda _: self.set_items({}, self.since_mark()),
            "APPEND": lambda _: self.extend(self.pop(1)),
            "APPENDS": lambda _: self.extend(self.since_mark()),
            "SETITEM": lambda _: self.set_items_of_top(self.pop(2)),
            "SETITEMS": lambda _: self.set_items_of_top(self.since_mark()),
            "GLOBAL": lambda name: self.push_global(name.replace(" ", ".", 1)),
            "STACK_GLOBAL": lambda _: self.push_global(".".join(self.pop(2))),
            "REDUCE": lambda _: self.call(),
            "BUILD": lambda _: self.build(),
            "MEMOIZE": lambda _: self.put(len(self.memo)),
            **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), self.put),
            **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), self.get),
        }

    def step(self, opcode: str, argument: Any) -> None:
        if opcode in LITERALS:
            self.stack.append(argument)
        elif opcode in CONSTANTS:
            self.stack.append(CONSTANTS[opcode])
        elif opcode in TUPLES:
            self.stack.append(tuple(self.pop(TUPLES[opcode])))
        elif opcode in self.actions:
            self.actions[opcode](argument)
        elif opcode not in HEADERS and opcode != "STOP":
            raise UnpicklingError(f"it has the opcode {opcode}, which no array needs")

    def pop(self, count: int) -> list[Any]:
        start = len(self.stack) - count
        if start < (self.marks[-1] if self.marks else 0):
            raise UnpicklingError("it takes more from the stack than it put there")
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def since_mark(self) -> list[Any]:
        return self.pop(len(self.stack) - self.marks.pop())

    def extend(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise UnpicklingError(f"it appends to a {type(self.stack[-1]).__name__}")
        self.stack[-1].extend(items)

    def set_items_of_top(self, items: list[Any]) -> None:
        (target,) = self.pop(1)
        if type(target) not in (dict, OrderedDict):
            raise UnpicklingError(f"it sets items of a {type(target).__name__}")
        self.set_items(target, items)

    def set_items(self, target: dict[Any, Any], items: list[Any]) -> None:
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[as_key(key)] = value
        self.stack.append(target)

    def push_global(self, name: str) -> None:
        if name not in self.parts:
            raise UnpicklingError(f"it names {name}, which is no part of an array or tensor")
        self.stack.append(_Global(name))

    def call(self) -> None:
        function, arguments = self.pop(2)
        if not isinstance(function, _Global) or not isinstance(arguments, tuple):
            raise UnpicklingError(f"it calls a {type(function).__name__}")
        self.stack.append(self.parts[function.name](*arguments))

    def build(self) -> None:
        target, state = self.pop(2)
        if isinstance(target, Unfinished):
            target.result = target.finish(state)
            self.stack.append(target.result)
        elif type(target) is OrderedDict:
            _keep_versions(target, state)
            self.stack.append(target)
        else:
            raise UnpicklingError(f"it changes a {type(target).__name__}")

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def get(self, index: int) -> None:
        item = self.memo[index]
        finished = isinstance(item, Unfinished) and item.result is not None
        self.stack.append(item.result if finished else item)


def as_key(key: Any) -> str | int:
    """A key that is safe to hash. Raises ``UnpicklingError`` for others."""
    if not isinstance(key, str | int):
        raise UnpicklingError(f"it has a {type(key).__name__} as a key")
    return key


def _keep_versions(weights: Any, state: Any) -> None:
    """The one attribute that a state dict has: see ``module_versions``."""
    if isinstance(state, dict) and "_metadata" in state:
        weights._metadata = module_versions(state["_metadata"])


def module_versions(metadata: Any) -> OrderedDict[str, dict[str, int]]:
    """What a state dict says of its modules: their versions, by which older names are renamed. All else is left out."""
    items = metadata.items() if isinstance(metadata, dict) else ()
    return OrderedDict(
        (name, {"version": module["version"]})
        for name, module in items
        if isinstance(module, dict) and isinstance(module.get("version"), int)
    )
