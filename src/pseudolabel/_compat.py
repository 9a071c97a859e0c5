"""Deprecations: a name that was public once keeps working for one minor release, with a warning.

Functions and classes take `deprecated` (PEP 702), which type checkers see as well; renamed keyword
arguments take `deprecate_parameter`.
"""

import functools
import warnings
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from typing_extensions import deprecated

__all__ = ["deprecate_parameter", "deprecated"]

P = ParamSpec("P")
R = TypeVar("R")


def deprecate_parameter(
    old: str, new: str, *, since: str, until: str
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let a function take its argument ``new`` under the name ``old`` too, with a ``DeprecationWarning``."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
            if old in kwargs:
                if new in kwargs:
                    raise TypeError(f"{function.__name__}: {old!r} is the old name of {new!r}, got both")
                warnings.warn(
                    f"{function.__name__}: argument {old!r} is called {new!r} since {since}; "
                    f"the old name goes in {until}",
                    DeprecationWarning,
                    stacklevel=2,
                )
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return wrapper

    return decorate
