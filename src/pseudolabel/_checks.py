"""Argument validation. Every message names the argument, what was expected and what came.

Shapes and dtypes are always checked: that costs no device work. Values (finite, in range) are checked where
wrong ones would give a wrong answer in silence; on an accelerator that is one synchronisation, which
``PSEUDOLABEL_CHECKS=0`` in the environment saves. Under ``torch.compile`` values are not checked. The rest is
traced, for which PyTorch before 2.10 needs it free of ``isinstance(x, int | float)`` and ``get_args``.
"""

import math
import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "check_boxes",
    "check_callable",
    "check_channels",
    "check_choice",
    "check_classes",
    "check_count",
    "check_finite",
    "check_float",
    "check_ignore_index",
    "check_integer",
    "check_labels",
    "check_number",
    "check_probability",
    "check_sequence",
    "check_shapes",
    "check_size",
    "check_unit_range",
    "describe_pixels",
    "values_unchecked",
]

_VALUES = os.environ.get("PSEUDOLABEL_CHECKS", "1") != "0"

_LARGEST = torch.finfo(torch.float32).max

# Height and width of an argument: H, w, w', h4, ... What a network returns (hi, wi) is left to its caller.
_SIDE = re.compile(r"[HWhw]['0-9]?")


def values_unchecked(value: Tensor) -> bool:
    """Whether the values of a tensor are not to be looked at."""
    return not _VALUES or torch.compiler.is_compiling() or value.numel() == 0


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    return f"{type(value).__name__} {value!r}"


def check_shapes(**arguments: tuple[Tensor, str]) -> dict[str, int]:
    """Check tensors against shapes such as ``"B C h w"``, letters shared by several arguments being equal.

    Returns the size that each letter stands for. A number in a shape stands for itself; ``"..."`` in front
    stands for any leading axes. Heights and widths (H, W, h, w, and these with a digit or prime) are at least
    1: a batch or a set of classes may be empty, a map may not. Sparse tensors and those without values (the
    meta device) are refused.
    """
    sizes: dict[str, int] = {}
    owner: dict[str, str] = {}
    for name, (value, pattern) in arguments.items():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{name}: expected a tensor of shape ({pattern.replace(' ', ', ')}), got {_describe(value)}"
            )
        if value.layout is not torch.strided or value.device.type == "meta":
            kind = "meta" if value.device.type == "meta" else str(value.layout).removeprefix("torch.")
            raise TypeError(f"{name}: expected a dense tensor that holds values, got a {kind} tensor")
        axes = pattern.split()
        shape = tuple(value.shape)
        open_ended = axes[0] == "..."
        if open_ended:
            axes = axes[1:]
            shape = shape[len(shape) - len(axes) :] if len(shape) >= len(axes) else shape
        if len(shape) != len(axes):
            raise ValueError(
                f"{name}: expected shape ({pattern.replace(' ', ', ')}), got {tuple(value.shape)}"
            )
        for axis, size in zip(axes, shape, strict=True):
            if _SIDE.fullmatch(axis) and size == 0:  # in this order: a batch may have an unknown size
                raise ValueError(
                    f"{name}: expected shape ({pattern.replace(' ', ', ')}) with {axis} >= 1, "
                    f"got {tuple(value.shape)}"
                )
            if axis not in sizes and not axis.isdigit():
                sizes[axis], owner[axis] = size, name
            expected = int(axis) if axis.isdigit() else sizes[axis]
            if size != expected:
                source = f" with {axis}={expected} from {owner[axis]}" if axis in owner else ""
                raise ValueError(
                    f"{name}: expected shape ({pattern.replace(' ', ', ')}){source}, got {tuple(value.shape)}"
                )
    return sizes


def check_float(**arguments: Tensor) -> None:
    """Check that tensors are of a floating dtype."""
    for name, value in arguments.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point tensor, got {_describe(value)}")


def check_integer(**arguments: Tensor) -> None:
    """Check that tensors are of an integer dtype."""
    for name, value in arguments.items():
        if (
            not isinstance(value, Tensor)
            or value.is_floating_point()
            or value.is_complex()
            or value.dtype == torch.bool
        ):
            raise TypeError(f"{name}: expected an integer tensor, got {_describe(value)}")


def check_finite(**arguments: Tensor) -> None:
    """Check that tensors hold neither NaN nor infinity."""
    for name, value in arguments.items():
        # The extremes of a tensor with a NaN are NaN; they are found much faster than all finite values.
        if values_unchecked(value) or bool(torch.isfinite(torch.stack(torch.aminmax(value.detach()))).all()):
            continue
        nan, inf = int(torch.isnan(value).sum()), int(torch.isinf(value).sum())
        raise ValueError(
            f"{name}: expected finite values, got {nan} NaN and {inf} infinite of {value.numel()}"
        )


def check_unit_range(*, tolerance: float = 1e-3, **arguments: Tensor) -> None:
    """Check that tensors are finite and in [0, 1], rounding noise up to ``tolerance`` aside."""
    for name, value in arguments.items():
        if values_unchecked(value):
            continue
        low, high = (float(bound) for bound in torch.aminmax(value.detach()))
        if not (low >= -tolerance and high <= 1 + tolerance):  # a NaN fails as well
            hint = " (divide 8-bit values by 255)" if high > 2 and name == "image" else ""
            raise ValueError(f"{name}: expected values in [0, 1], got values from {low:g} to {high:g}{hint}")


def check_labels(labels: Tensor, name: str = "labels") -> None:
    """Check that image-level labels are multi-hot: bool, or numbers that are 0 or 1."""
    if labels.is_complex():
        raise TypeError(f"{name}: expected a multi-hot tensor of 0 and 1, got {_describe(labels)}")
    if labels.dtype == torch.bool or values_unchecked(labels):
        return
    if not bool(((labels == 0) | (labels == 1)).all()):
        raise ValueError(
            f"{name}: expected a multi-hot tensor of 0 and 1, one column a foreground class, got values "
            f"{torch.unique(labels.detach())[:8].tolist()}"
        )


def check_number(
    name: str,
    value: float,
    *,
    above: float = -math.inf,
    at_least: float = -math.inf,
    at_most: float = math.inf,
) -> None:
    """Check that a setting is a number in the stated range, and finite in float32 as well."""
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not -_LARGEST <= value <= _LARGEST  # a NaN fails as well
        or not (value > above and at_least <= value <= at_most)
    ):
        bounds = [
            f"> {above:g}" if above > -math.inf else "",
            f">= {at_least:g}" if at_least > -math.inf else "",
            f"<= {at_most:g}" if at_most < math.inf else "",
        ]
        wanted = " and ".join(bound for bound in bounds if bound)
        raise ValueError(f"{name}: expected a finite number {wanted}".rstrip() + f", got {value!r}")


def check_count(*, at_least: int = 1, **values: int) -> None:
    """Check that settings are integers, and large enough."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
            raise ValueError(f"{name}: expected an integer >= {at_least}, got {value!r}")


def check_boxes(boxes: Tensor, size: tuple[int, int]) -> None:
    """Check that boxes (B,4) of top, left, bottom, right lie in an image of this size (H,W)."""
    if values_unchecked(boxes):
        return
    height, width = size
    top, left, bottom, right = boxes.unbind(1)
    wrong = (top < 0) | (left < 0) | (bottom <= top) | (right <= left) | (bottom > height) | (right > width)
    if bool(wrong.any()):
        raise ValueError(
            "boxes: expected top, left, bottom, right with 0 <= top < bottom <= "
            f"{height} and 0 <= left < right <= {width}, got {boxes[wrong][0].tolist()}"
        )


def check_size(**sizes: tuple[int, int]) -> None:
    """Check that settings are two integers >= 1, a height and a width."""
    for name, value in sizes.items():
        if (
            not isinstance(value, (tuple, list))
            or len(value) != 2
            or not all(isinstance(side, int) and not isinstance(side, bool) and side >= 1 for side in value)
        ):
            raise ValueError(f"{name}: expected two integers (height, width) >= 1, got {value!r}")


def check_sequence(**values: object) -> None:
    """Check that arguments are lists or the like: not one tensor, one number, a text or a dict."""
    for name, value in values.items():
        if isinstance(value, (str, bytes, Mapping, Tensor)) or not hasattr(value, "__len__"):
            raise TypeError(f"{name}: expected a list or tuple, got {_describe(value)}")


def check_channels(num_classes: int, source: str, **scores: Tensor) -> None:
    """Check that scores (B,1+C,...) have the background in front of the C classes of another argument."""
    for name, value in scores.items():
        if value.shape[1] != 1 + num_classes:
            raise ValueError(
                f"{name}: expected {1 + num_classes} channels, the background and the classes of {source}, "
                f"got {value.shape[1]}"
            )


def check_callable(**values: object) -> None:
    """Check that arguments can be called."""
    for name, value in values.items():
        if not callable(value):
            raise TypeError(f"{name}: expected a callable, got {_describe(value)}")


def check_ignore_index(ignore_index: int, num_classes: int = 0) -> None:
    """Check that the label of ignored pixels is an integer and no class."""
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise ValueError(f"ignore_index: expected an integer, got {ignore_index!r}")
    if 0 <= ignore_index < num_classes:
        raise ValueError(
            f"ignore_index: expected an integer outside of 0..{num_classes - 1}, got {ignore_index!r}"
        )


def check_probability(name: str, value: float) -> None:
    """Check that a setting is a number in [0, 1]."""
    check_number(name, value, at_least=0, at_most=1)


def check_choice(name: str, value: str, literal: Any) -> None:
    """Check that a setting is one of the names of a ``Literal``."""
    if value not in (known := list(literal.__args__)):
        raise ValueError(f"{name}: expected one of {known}, got {value!r}")


def check_classes(num_classes: int, ignore_index: int, **maps: Tensor) -> None:
    """Check that label maps hold classes `0..num_classes-1` and ``ignore_index`` only."""
    check_count(num_classes=num_classes)
    check_ignore_index(ignore_index, num_classes)
    check_integer(**maps)
    devices = {name: value.device for name, value in maps.items()}
    if len(set(devices.values())) > 1:
        raise ValueError(f"{', '.join(maps)}: expected tensors of one device, got {devices}")
    for name, value in maps.items():
        if values_unchecked(value):
            continue
        labels = value.long()
        labels = labels.masked_fill(labels == ignore_index, 0)
        low, high = torch.aminmax(labels)
        if int(low) < 0 or int(high) >= num_classes:
            wrong = (labels < 0) | (labels >= num_classes)
            raise ValueError(
                f"{name}: expected classes 0..{num_classes - 1} or ignore_index {ignore_index}, got "
                f"{torch.unique(labels[wrong])[:8].tolist()} in {describe_pixels(wrong)}"
            )


def describe_pixels(found: Tensor) -> str:
    """Say how many pixels of a (B,H,W) bool map are set, and where."""
    position = found.nonzero()
    images = torch.unique(position[:, 0]).tolist()
    listed = ", ".join(map(str, images[:8])) + (", ..." if len(images) > 8 else "")
    image, y, x = position[0].tolist()
    return (
        f"{len(position)} pixel{'s' * (len(position) > 1)} of image {listed} of the batch "
        f"(first: image {image}, row {y}, column {x})"
    )
