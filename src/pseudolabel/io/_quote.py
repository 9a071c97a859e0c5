"""Words of a file in an error. A line of it may have megabytes, a value that refers to itself has no end."""

import reprlib

__all__ = ["quote"]


class _Short(reprlib.Repr):
    """`repr` that looks at the first eight items, two levels deep, and at 120 letters."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 2
        self.maxlist = self.maxtuple = self.maxdict = 8
        self.maxstring = self.maxother = 120

    def repr_int(self, x: int, level: int) -> str:
        # The digits of a long number take time with their square, and Python refuses to write them.
        return super().repr_int(x, level) if x.bit_length() <= 64 else f"<{x.bit_length()} bits>"


_SHORT = _Short()


def quote(value: object) -> str:
    """`repr` of the value, cut short where it is long."""
    return _SHORT.repr(value)
