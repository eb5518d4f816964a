"""Python's pickles of plain values, interpreted opcode by opcode: nothing can be called but what the caller names.

The standard library's unpickler can be kept from calling functions, but not from recursing: a dictionary's key made of
a million nested tuples overflows C's stack when it is hashed. Here keys are text and numbers, so that no value is
hashed, compared or copied at any depth; what is read takes memory in proportion to the program.
"""

from __future__ import annotations

import reprlib
import struct
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

_MARK = object()
_MOST_DIGITS = 32  # bytes of an integer


class _Program:
    """Bytes that are taken from the front. Raises ValueError at their end."""

    def __init__(self, content: bytes):
        self._content, self._at = content, 0

    def take(self, size: int) -> bytes:
        if not 0 <= size <= len(self._content) - self._at:
            raise ValueError("it ends within an instruction")
        self._at += size
        return self._content[self._at - size : self._at]

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def line(self) -> str:
        end = self._content.find(b"\n", self._at)
        if end < 0:
            raise ValueError("it ends within a line")
        return self.take(end + 1 - self._at)[:-1].decode()


def load(content: bytes, find: Callable[[str, str], Any], persistent: Callable[[Any], Any]) -> Any:
    """The value that a pickle describes.

    Args:
      content: the pickle, of protocols 2 to 5.
      find: find(module, name), what stands for a global name: a value, or a function that may be called.
      persistent: persistent(key), what stands for a persistent id.

    Raises:
      ValueError: it isn't well formed, or wants anything but dicts, lists, tuples, text, numbers, and what `find` and
        `persistent` give.
      Whatever `find`, `persistent` and the functions raise.
    """
    program, machine = _Program(content), _Machine(find, persistent)
    while True:
        opcode = program.take(1)
        if opcode == b".":
            return machine.end()
        machine.step(opcode, program)


class _Machine:
    """The stack, and what is remembered of it by number."""

    def __init__(self, find: Callable[[str, str], Any], persistent: Callable[[Any], Any]):
        self._find, self._persistent = find, persistent
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def end(self) -> Any:
        value = self._pop()
        if self._stack:
            raise ValueError("it ends with values that nothing was made of")
        return value

    def step(self, opcode: bytes, program: _Program) -> None:
        push = self._stack.append
        match opcode:
            case b"\x80":
                if not 2 <= (protocol := program.number("<B")) <= 5:
                    raise ValueError(f"protocol {protocol}, expected 2 to 5")
            case b"\x95":  # FRAME, whose size only helps to read ahead.
                program.take(8)
            case b"(":
                push(_MARK)
            case b"0":
                self._pop()
            case b"N" | b"\x88" | b"\x89":
                push({b"N": None, b"\x88": True, b"\x89": False}[opcode])
            case b"K" | b"M" | b"J" | b"G":
                push(program.number({b"K": "<B", b"M": "<H", b"J": "<i", b"G": ">d"}[opcode]))
            case b"I":  # Protocol 0's, as which PyTorch once wrote booleans.
                text = program.line()
                push({"00": False, "01": True}[text] if text in ("00", "01") else _integer(text))
            case b"\x8a":
                if (size := program.number("<B")) > _MOST_DIGITS:
                    raise ValueError(f"an integer of {size} bytes")
                push(int.from_bytes(program.take(size), "little", signed=True))
            case b"X" | b"\x8c" | b"\x8d":
                size = program.number({b"X": "<I", b"\x8c": "<B", b"\x8d": "<Q"}[opcode])
                push(program.take(size).decode("utf-8", "surrogatepass"))
            case b"U" | b"C" | b"T" | b"B":
                size = program.number("<B" if opcode in b"UC" else "<I")
                push(program.take(size) if opcode in b"CB" else program.take(size).decode("ascii"))
            case b"}" | b"]" | b")":
                push({} if opcode == b"}" else [] if opcode == b"]" else ())
            case b"t" | b"l":
                push(tuple(self._to_mark()) if opcode == b"t" else self._to_mark())
            case b"d":
                self._set({}, self._to_mark())
            case b"\x85" | b"\x86" | b"\x87":
                push(tuple(self._pop_many(opcode[0] - 0x84)))
            case b"a" | b"e":
                items = [self._pop()] if opcode == b"a" else self._to_mark()
                self._top(list).extend(items)
            case b"s" | b"u":
                items = self._pop_many(2) if opcode == b"s" else self._to_mark()
                self._set(self._pop(), items)
            case b"q" | b"r" | b"\x94":
                forms = {b"q": "<B", b"r": "<I"}
                number = program.number(forms[opcode]) if opcode in forms else len(self._memo)
                self._memo[number] = self._top(object)
            case b"h" | b"j":
                number = program.number("<B" if opcode == b"h" else "<I")
                if number not in self._memo:
                    raise ValueError(f"it refers to a value {number} that it doesn't have")
                push(self._memo[number])
            case b"c" | b"\x93":
                module, name = (program.line(), program.line()) if opcode == b"c" else self._pop_many(2)
                push(self._find(module, name))
            case b"R":
                function, arguments = self._pop_many(2)
                if not callable(function) or not isinstance(arguments, tuple):
                    raise ValueError(f"it calls {reprlib.repr(function)} with {reprlib.repr(arguments)}")
                push(function(*arguments))
            case b"Q":
                push(self._persistent(self._pop()))
            case b"b":  # Attributes, which a state_dict has beside its tensors: they are left out.
                value, _ = self._pop_many(2)
                if not isinstance(value, OrderedDict):
                    raise ValueError(f"it sets attributes of {reprlib.repr(value)}")
                push(value)
            case _:
                raise ValueError(f"the instruction {opcode!r}, which plain values don't take")

    def _pop(self) -> Any:
        return self._pop_many(1)[0]

    def _pop_many(self, number: int) -> list[Any]:
        values = self._stack[-number:]
        if len(values) < number or any(v is _MARK for v in values):
            raise ValueError("it takes values that it doesn't have")
        del self._stack[-number:]
        return values

    def _to_mark(self) -> list[Any]:
        for at in range(len(self._stack) - 1, -1, -1):
            if self._stack[at] is _MARK:
                values = self._stack[at + 1 :]
                del self._stack[at:]
                return values
        raise ValueError("it takes values that it doesn't have")

    def _top(self, kind: type) -> Any:
        if not self._stack or self._stack[-1] is _MARK or not isinstance(self._stack[-1], kind):
            raise ValueError("it takes a value that it doesn't have")
        return self._stack[-1]

    def _set(self, target: Any, items: list[Any]) -> None:
        if not isinstance(target, dict) or len(items) % 2:
            raise ValueError(f"it sets items of {reprlib.repr(target)}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in (str, int, float, bool, bytes, type(None)):
                raise ValueError(f"a key {reprlib.repr(key)}, expected text")
            target[key] = value
        self._stack.append(target)


def _integer(text: str) -> int:
    if len(text) > 2 * _MOST_DIGITS:
        raise ValueError(f"an integer of {len(text)} digits")
    return int(text)
