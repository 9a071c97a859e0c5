"""A look at a pickle's program before it runs: what it would make must be in keeping with its length.

A few bytes can ask for any amount of time or memory. Sixty nested pairs, each of the one before and itself,
have 2^60 leaves to hash or to print; one number puts a value at place 2^32 of a table; one text can be handed
to a function a million times; keys of a dict can be chosen to collide. No pickle of arrays, tensors and plain
containers needs any of it.
"""

import pickletools
from collections.abc import Collection, Iterator, Sequence
from typing import IO, Any

__all__ = ["UnsafePickleError", "check_pickle"]

_STEPS = {step.code.encode("latin-1"): step for step in pickletools.opcodes}
_REFUSED = {
    **dict.fromkeys(("EMPTY_SET", "ADDITEMS", "FROZENSET"), "a set"),
    **dict.fromkeys(("INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"), "an object of a class"),
    "DUP": "a value twice",
}
_TUPLES = ("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3")
_FILL = ("APPEND", "APPENDS", "SETITEM", "SETITEMS")
_WITH_KEYS = ("SETITEM", "SETITEMS", "DICT")
_CALL = ("REDUCE", "BUILD")  # a function with its arguments, `__setstate__` with the state
_TIMES = 8  # the bytes of an array pass through tuples and functions up to four times


class UnsafePickleError(ValueError):
    """A pickle asks for more than arrays, tensors and plain containers. Nothing was run."""


class _Value:
    """What the program has made: how much is in it, as deep as tuples go, and whether it is a plain key."""

    __slots__ = ("plain", "weight")

    def __init__(self, weight: int, plain: bool = True) -> None:
        self.weight, self.plain = weight, plain


_MARK = _Value(0)


def check_pickle(file: IO[bytes], *, refused: Collection[str] = ()) -> None:
    """Go through the program from here to its end, without running a step.

    What goes into tuples and into functions, all of it together and again each time that it does, may be a
    few times as much as the program is long. Keys are neither tuples nor longer than 64 bits.

    Args:
        file: Where the program begins.
        refused: Names, `module name`, that it must not ask for.

    Raises:
        UnsafePickleError: If it asks for one of these, for a set or an object of a class.
        ValueError: If it is cut off, or would make more than a program of its length should.
    """
    look, start = _Look(), file.tell()
    for step, argument in _steps(file):
        if step.name == "GLOBAL" and argument in refused:
            raise UnsafePickleError(f"it asks for {argument}")
        look.step(step, argument)
        if look.passed > _TIMES * (file.tell() - start + 1024):
            raise ValueError("it passes on the same values again and again")


def _steps(file: IO[bytes]) -> Iterator[tuple[pickletools.OpcodeInfo, Any]]:
    """The steps up to the end, with their arguments."""
    while code := file.read(1):
        step = _STEPS.get(code)
        if step is None:
            raise ValueError("it has a step that no pickle has")
        if step.name == "STRING":  # which `pickletools` takes for ASCII, and Python 2 wrote arrays with it
            yield step, file.readline()
        else:
            yield step, step.arg.reader(file) if step.arg else None
        if step.name == "STOP":
            return
    raise ValueError("it is cut off, or empty")


class _Look:
    """The state of a program that is looked at."""

    def __init__(self) -> None:
        self.stack: list[_Value] = []
        self.memo: dict[int, _Value] = {}
        self.steps = 0
        self.passed = 0  # weight of what went into tuples and functions

    def step(self, step: pickletools.OpcodeInfo, argument: Any) -> None:
        self.steps += 1
        if step.name in _REFUSED:
            raise UnsafePickleError(f"it asks for {_REFUSED[step.name]}")
        if isinstance(argument, int) and argument.bit_length() > 128:
            raise ValueError(f"it holds a number of {argument.bit_length()} bits")
        if "PUT" in step.name:
            self.remember(argument, self.stack[-1])
        taken = self.take(step.stack_before)
        made = self.make(step.name, argument, taken)
        self.stack += [_MARK if kind is pickletools.markobject else made for kind in step.stack_after]

    def take(self, kinds: Sequence[pickletools.StackObject]) -> list[_Value]:
        """Take what a step takes from the stack, in the order in which it was put there."""
        taken: list[_Value] = []
        for kind in reversed(kinds):
            if kind is pickletools.stackslice:
                while self.stack[-1] is not _MARK:
                    taken.append(self.stack.pop())
            elif kind is pickletools.markobject:
                self.stack.pop()
            else:
                taken.append(self.stack.pop())
                if taken[-1] is _MARK:
                    raise ValueError("a mark is not where it should be")
        return taken[::-1]

    def make(self, name: str, argument: Any, taken: list[_Value]) -> _Value:
        """What a step makes of what it takes."""
        if "GET" in name:
            return self.memo[argument]
        if name == "MEMOIZE":
            self.remember(len(self.memo), taken[0])
            return taken[0]
        if name in _WITH_KEYS and not all(key.plain for key in taken[len(taken) % 2 :: 2]):
            raise ValueError("a key of a dict is a tuple, or a number of more than 64 bits")
        if name in _FILL:
            taken[0].weight += sum(value.weight for value in taken[1:])
            return taken[0]
        if name in _CALL:
            self.passed += taken[1].weight
            return taken[0] if name == "BUILD" else _Value(taken[1].weight)
        made = _Value(1 + sum(value.weight for value in taken))
        if isinstance(argument, str | bytes):
            made.weight += len(argument)
        elif isinstance(argument, int):
            made.plain = argument.bit_length() <= 64
        elif name in _TUPLES:
            made.plain = not taken
            self.passed += made.weight
        return made

    def remember(self, place: int, value: _Value) -> None:
        if place > self.steps:
            raise ValueError(f"it uses place {place} of its memory after {self.steps} steps")
        self.memo[place] = value
