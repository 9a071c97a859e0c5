"""Broken arguments: every public function of tensors, every argument of it, every kind of wrong value.

The valid calls are those of `cases` in tests/test_docs.py: a new function joins by its row there. What a
wrong value has to end in is told by its kind alone, not by what the functions do. Where a function is right
to do otherwise, `EXCEPT` says why.
"""

import importlib.util
import inspect
import math
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import pseudolabel as pl

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("cam", "refine", "masks", "matting", "heads", "losses", "metrics", "recipes")
FUNCTIONS = {
    f"{room}.{name}": value
    for room in ROOMS
    for name in getattr(pl, room).__all__
    if inspect.isfunction(value := getattr(getattr(pl, room), name))
}

# What a case ends in.
ERROR = "error"
ERROR_OR_RESULT = "error or result"
SAME = "as usual"
LIMIT = "error, or as the largest number"
SEEN = "error, or NaN in the result"
OWN = "its own exception"


class Kind(NamedTuple):
    """A kind of wrong value: of which arguments, made of the right one how, and what it has to end in."""

    of: Callable[[Any], bool]
    make: Callable[[Any], Any]
    end: str = ERROR


class OwnError(Exception):
    """Raised by a caller's own function."""


def is_float(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def is_integer(value: object) -> bool:
    return isinstance(value, Tensor) and not value.is_floating_point()


def is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def is_tensors(value: object) -> bool:
    return type(value) in (list, tuple) and len(value) > 0 and is_tensor(value[0])


def is_numbers(value: object) -> bool:
    return (
        type(value) in (list, tuple) and len(value) > 0 and all(isinstance(one, int | float) for one in value)
    )


def is_type(kind: type) -> Callable[[Any], bool]:
    return lambda value: type(value) is kind


def fill(tensor: Tensor, value: float) -> Tensor:
    """One pixel, token or row of every image and channel."""
    filled = tensor.clone()
    middle = [side // 2 for side in tensor.shape]
    if tensor.ndim >= 4:
        filled[..., middle[-2], middle[-1]] = value
    elif tensor.ndim == 3:
        filled[:, middle[1]] = value
    else:
        filled[..., 0] = value
    return filled


def longer(tensor: Tensor, axis: int) -> Tensor:
    return torch.cat([tensor, tensor.narrow(axis, 0, 1)], axis)


def has_axis(axis: int) -> Callable[[Any], bool]:
    return lambda value: is_tensor(value) and value.ndim > axis


def changed(change: Callable[[Tensor], Tensor]) -> Callable[[Any], Any]:
    """The caller's function, with what it returns changed."""

    def of(output: Any) -> Any:
        if isinstance(output, tuple):
            return (change(output[0]), *output[1:])
        if isinstance(output, SimpleNamespace):
            return SimpleNamespace(**{name: change(value) for name, value in vars(output).items()})
        return change(output)

    return lambda function: lambda *arguments: of(function(*arguments))


def raises(*_: object) -> None:
    raise OwnError("mine")


def constant(value: object) -> Callable[[Any], Any]:
    return lambda _: value


def first(value: object) -> Callable[[Any], Any]:
    return lambda numbers: type(numbers)([value, *numbers[1:]])


def last(change: Callable[[Tensor], Any]) -> Callable[[Any], Any]:
    return lambda tensors: [*tensors[:-1], change(tensors[-1])]


GROUPS: dict[str, Callable[[Any], bool]] = {
    "tensor": is_tensor,
    "list of tensors": is_tensors,
    "size or list of numbers": is_numbers,
    "whole number": is_type(int),
    "number": is_type(float),
    "choice": is_type(str),
    "function": inspect.isfunction,
}
KINDS: dict[str, Kind] = {
    **{f"{group}: None": Kind(of, constant(None)) for group, of in GROUPS.items()},
    **{f"{group}: a text": Kind(of, constant("nonsense")) for group, of in GROUPS.items()},
    **{f"{group}: a dict": Kind(of, constant({})) for group, of in GROUPS.items()},
    **{f"{group}: an object": Kind(of, constant(object())) for group, of in GROUPS.items()},
    # what a tensor is
    "tensor: a number": Kind(is_tensor, constant(0.5)),
    "tensor: a nested list": Kind(is_tensor, Tensor.tolist),
    "tensor: a NumPy array": Kind(is_tensor, Tensor.numpy),
    "tensor: complex": Kind(is_tensor, lambda x: x.to(torch.complex64)),
    "tensor: sparse": Kind(is_tensor, Tensor.to_sparse),
    "tensor: sparse rows": Kind(lambda x: is_tensor(x) and x.ndim == 2, Tensor.to_sparse_csr),
    "tensor: without values (meta)": Kind(is_tensor, lambda x: x.to("meta")),
    "tensor: strides": Kind(is_tensor, lambda x: x.repeat_interleave(2, -1)[..., ::2], SAME),
    "tensor: axes out of order": Kind(
        lambda x: is_tensor(x) and x.ndim > 1, lambda x: x.mT.contiguous().mT, SAME
    ),
    "tensor: with a gradient": Kind(is_float, lambda x: x.clone().requires_grad_(), SAME),
    "tensor: a parameter": Kind(is_float, torch.nn.Parameter, SAME),
    # shapes
    "shape: scalar": Kind(is_tensor, lambda x: x.flatten()[0]),
    "shape: flat": Kind(lambda x: is_tensor(x) and x.ndim > 1, Tensor.flatten),
    "shape: one axis more in front": Kind(is_tensor, lambda x: x[None], ERROR_OR_RESULT),
    "shape: one axis more behind": Kind(is_tensor, lambda x: x[..., None], ERROR_OR_RESULT),
    "shape: first axis gone": Kind(is_tensor, lambda x: x[0], ERROR_OR_RESULT),
    "shape: axes swapped": Kind(lambda x: is_tensor(x) and x.ndim > 1, lambda x: x.mT, ERROR_OR_RESULT),
    **{
        f"shape: axis {axis} {what}": Kind(has_axis(axis), lambda x, a=axis, f=make: f(x, a), ERROR_OR_RESULT)
        for axis in range(4)
        for what, make in {
            "longer than elsewhere": longer,
            "of length 1": lambda x, axis: x.narrow(axis, 0, 1),
            "of length 0": lambda x, axis: x.narrow(axis, 0, 0),
        }.items()
    },
    # dtypes
    "dtype: float16": Kind(is_float, Tensor.half, ERROR_OR_RESULT),
    "dtype: bfloat16": Kind(is_float, Tensor.bfloat16, ERROR_OR_RESULT),
    "dtype: float64 among float32": Kind(is_float, Tensor.double, ERROR_OR_RESULT),
    "dtype: bool for floats": Kind(is_float, lambda x: x > 0.5, ERROR_OR_RESULT),
    "dtype: int64 for floats": Kind(is_float, Tensor.long, ERROR_OR_RESULT),
    "dtype: 8-bit pixels": Kind(is_float, lambda x: (x * 255).to(torch.uint8), ERROR_OR_RESULT),
    "dtype: int32": Kind(is_integer, Tensor.int, SAME),
    "dtype: int8": Kind(is_integer, Tensor.char, SAME),
    "dtype: uint8": Kind(is_integer, Tensor.byte, SAME),
    "dtype: bool for integers": Kind(is_integer, lambda x: x > 0, ERROR_OR_RESULT),
    "dtype: float for integers": Kind(is_integer, Tensor.float, ERROR_OR_RESULT),
    # values of float tensors
    "values: a NaN": Kind(is_float, lambda x: fill(x, math.nan), SEEN),
    "values: NaN everywhere": Kind(is_float, lambda x: x * math.nan, SEEN),
    "values: infinity": Kind(is_float, lambda x: fill(x, math.inf), LIMIT),
    "values: minus infinity": Kind(is_float, lambda x: fill(x, -math.inf), LIMIT),
    "values: the largest float32": Kind(is_float, lambda x: fill(x, 3.4e38), ERROR_OR_RESULT),
    "values: the least float32": Kind(is_float, lambda x: fill(x, -3.4e38), ERROR_OR_RESULT),
    "values: denormal": Kind(is_float, lambda x: x * 1e-44, ERROR_OR_RESULT),
    "values: all 0": Kind(is_float, torch.zeros_like, ERROR_OR_RESULT),
    "values: all 1": Kind(is_float, torch.ones_like, ERROR_OR_RESULT),
    "values: negative": Kind(is_float, torch.neg, ERROR_OR_RESULT),
    "values: 0 to 255": Kind(is_float, lambda x: x * 255, ERROR_OR_RESULT),
    # label sets
    "labels: half steps": Kind(is_integer, lambda x: x + 0.5),
    "labels: NaN": Kind(is_integer, lambda x: fill(x.float(), math.nan)),
    **{
        f"labels: a {value}": Kind(is_integer, lambda x, value=value: fill(x.long(), value), ERROR_OR_RESULT)
        for value in (-1, 2, 254, 255, 256, 2**31, 2**62, -(2**63))
    },
    "labels: all 0": Kind(is_integer, torch.zeros_like, ERROR_OR_RESULT),
    "labels: all 1": Kind(is_integer, torch.ones_like, ERROR_OR_RESULT),
    "labels: all 255": Kind(is_integer, lambda x: x * 0 + 255, ERROR_OR_RESULT),
    # lists of tensors
    "list of tensors: empty": Kind(is_tensors, constant([])),
    "list of tensors: a tensor instead": Kind(is_tensors, lambda x: x[0]),
    "list of tensors: a generator": Kind(is_tensors, iter),
    "list of tensors: one None": Kind(is_tensors, last(constant(None))),
    "list of tensors: one text": Kind(is_tensors, last(constant("a"))),
    "list of tensors: one flat": Kind(is_tensors, last(Tensor.flatten)),
    "list of tensors: one complex": Kind(is_tensors, last(lambda x: x.to(torch.complex64))),
    "list of tensors: one of integers": Kind(is_tensors, last(Tensor.long), ERROR_OR_RESULT),
    "list of tensors: one NaN": Kind(is_tensors, last(lambda x: fill(x, math.nan)), SEEN),
    "list of tensors: one of another batch": Kind(is_tensors, last(lambda x: longer(x, 0)), ERROR_OR_RESULT),
    "list of tensors: one of more channels": Kind(is_tensors, last(lambda x: longer(x, 1)), ERROR_OR_RESULT),
    # sizes, scales, dilations
    "size or list of numbers: empty": Kind(is_numbers, lambda x: type(x)()),
    "size or list of numbers: a number instead": Kind(is_numbers, lambda x: x[0]),
    "size or list of numbers: one less": Kind(is_numbers, lambda x: x[:-1], ERROR_OR_RESULT),
    "size or list of numbers: one more": Kind(is_numbers, lambda x: (*x, x[-1]), ERROR_OR_RESULT),
    **{
        f"size or list of numbers: {value!r} in it": Kind(is_numbers, first(value), end)
        for value, end in {
            0: ERROR_OR_RESULT,
            -1: ERROR_OR_RESULT,
            1.5: ERROR_OR_RESULT,
            True: ERROR_OR_RESULT,
            1e30: ERROR_OR_RESULT,
            math.nan: ERROR,
            math.inf: ERROR,
            None: ERROR,
            "3": ERROR,
            1j: ERROR,
        }.items()
    },
    # settings
    **{
        f"whole number: {value!r}": Kind(is_type(int), constant(value), end)
        for value, end in {
            0: ERROR_OR_RESULT,
            -1: ERROR_OR_RESULT,
            1.5: ERROR_OR_RESULT,
            True: ERROR_OR_RESULT,
            -(2**63): ERROR_OR_RESULT,
            math.nan: ERROR,
            math.inf: ERROR,
            1j: ERROR,
        }.items()
    },
    "whole number: a list": Kind(is_type(int), constant([1])),
    **{
        f"number: {value!r}": Kind(is_type(float), constant(value), end)
        for value, end in {
            0.0: ERROR_OR_RESULT,
            -1.0: ERROR_OR_RESULT,
            2.0: ERROR_OR_RESULT,
            1e-320: ERROR_OR_RESULT,
            True: ERROR_OR_RESULT,
            1e308: ERROR,
            math.nan: ERROR,
            math.inf: ERROR,
            -math.inf: ERROR,
            1j: ERROR,
        }.items()
    },
    "number: a list": Kind(is_type(float), constant([0.5])),
    "choice: empty": Kind(is_type(str), constant("")),
    "choice: another case": Kind(is_type(str), str.swapcase),
    "choice: a space behind": Kind(is_type(str), lambda x: x + " "),
    "choice: a number": Kind(is_type(str), constant(3)),
    "choice: a list": Kind(is_type(str), lambda x: [x]),
    # the caller's own functions
    "function: returns None": Kind(inspect.isfunction, constant(lambda *_: None)),
    "function: returns a text": Kind(inspect.isfunction, constant(lambda *_: "a")),
    "function: returns NaN": Kind(inspect.isfunction, changed(lambda x: x * math.nan), SEEN),
    "function: returns integers": Kind(inspect.isfunction, changed(Tensor.long), ERROR_OR_RESULT),
    "function: returns another batch": Kind(inspect.isfunction, changed(lambda x: longer(x, 0))),
    "function: returns a flat tensor": Kind(inspect.isfunction, changed(Tensor.flatten)),
    "function: returns complex numbers": Kind(inspect.isfunction, changed(lambda x: x.to(torch.complex64))),
    "function: raises": Kind(inspect.isfunction, constant(raises), OWN),
}

# Where a function is right to end otherwise than its kind says: a pattern of `function argument kind`.
EXCEPT = {
    r"\.(class_foreground|relabel|icd|matlabel) image values:": "without a CRF, nothing looks at the photo",
    r"heads.icd_bottom_up_loss (features|directions) values:": "with two classes, an image has no part in it",
    r"heads.icd_update_sides (sums values|counts labels): ": "what is not finite is left out of the average",
    r"heads.prototypes_from_topk features values:": "only the best pixels are read",
    r"losses.balanced_mask_cross_entropy logits values:": "an image whose mask lacks a class has no loss",
    r"losses.pretended_under_fitting_loss beta number: inf": "keeps the gate open, as documented",
    r"metrics.\w+ confusion labels: half steps": "the mean of matrices is a matrix, too",
}


class Call(NamedTuple):
    """A valid call of a public function."""

    function: Callable[..., Any]
    arguments: dict[str, Any]
    optional: set[str]


@cache
def calls() -> dict[str, Call]:
    """The first call that each case of the precision page makes of the function that it is there for."""
    path = ROOT / "tests/test_docs.py"
    spec = importlib.util.spec_from_file_location("cases_of_test_docs", path)
    docs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(docs)
    found = {}
    for name, (call, value) in docs.cases().items():
        if name not in FUNCTIONS:  # a class, or in a room of its own
            continue
        code, seen = inspect.unwrap(FUNCTIONS[name]).__code__, {}

        def look(frame: Any, event: str, _: object, code: Any = code, seen: dict = seen) -> None:
            if event == "call" and frame.f_code is code and not seen:
                seen.update(frame.f_locals)

        sys.setprofile(look)
        try:
            call(value)
        finally:
            sys.setprofile(None)
        arguments, optional = {}, set()
        for parameter in inspect.signature(FUNCTIONS[name]).parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD:
                arguments.update(seen[parameter.name])
                continue
            arguments[parameter.name] = seen[parameter.name]
            if parameter.default is None or "None" in str(parameter.annotation):
                optional.add(parameter.name)
        found[name] = Call(FUNCTIONS[name], arguments, optional)
    return found


def tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value.detach()
    elif isinstance(value, dict):
        for one in value.values():
            yield from tensors(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from tensors(one)
    elif hasattr(value, "__dict__"):
        yield from tensors(vars(value))


def is_finite(value: object) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors(value))


def same(one: object, other: object) -> bool:
    pairs = list(tensors(one)), list(tensors(other))
    return len(pairs[0]) == len(pairs[1]) and all(
        a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=1e-4, atol=1e-6, equal_nan=True)
        for a, b in zip(*pairs, strict=True)
    )


def is_named(message: str, argument: str, call: Call, recipe: bool) -> bool:
    """Whether a message says which argument is wrong, or which other one it does not fit.

    The parts of a recipe name their own arguments, which the recipe hands on or has made.
    """
    names = {argument, *call.arguments}
    pattern = r"[\w.\[\]():, ]+: expected .+" if recipe else None
    return any(re.search(rf"\b{name}\b", message) for name in names) or bool(
        pattern and re.match(pattern, message)
    )


def outcome(name: str, call: Call, argument: str, kind: Kind, usual: object) -> str:
    """What is wrong with what a case ends in; nothing where it is well."""
    value = call.arguments[argument]
    end = kind.end
    if end == ERROR and argument in call.optional and kind.make(value) is None:
        end = ERROR_OR_RESULT

    def run(made: object) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", r"image: image \d of the batch spans only")  # denormal ones do
            return call.function(**{**call.arguments, argument: made})

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch calls its sparse rows a draft
        made = kind.make(value)
    try:
        result = run(made)
    except OwnError:
        return "" if end == OWN else "an exception of nobody"
    except (TypeError, ValueError) as error:
        named = is_named(str(error), argument, call, name.startswith("recipes."))
        return "" if named and end != OWN else f"{type(error).__name__}: {str(error)[:150]}"
    except (Exception, SystemExit) as error:  # noqa: BLE001
        return f"{type(error).__name__}: {str(error)[:150]}"
    if end in (ERROR, OWN):
        return "no error"
    if end == SAME:
        return "" if same(result, usual) else "another result than usual"
    if end == SEEN:
        return "" if not is_finite(result) else "a result that hides it"
    if end == LIMIT and is_finite(result):
        largest = torch.finfo(torch.float32).max
        return "" if same(result, run(made.clamp(-largest, largest))) else "a result that hides it"
    return ""


def cases() -> Iterator[tuple[str, str, str]]:
    """Function, argument and kind, of all that there are."""
    for name, call in calls().items():
        for argument, value in call.arguments.items():
            for label, kind in KINDS.items():
                if kind.of(value):
                    yield name, argument, label


def excepted(case: tuple[str, str, str]) -> bool:
    return any(re.search(pattern, " ".join(case)) for pattern in EXCEPT)


def test_every_function_takes_part() -> None:
    """Those that take no tensor are asked by hand, below."""
    assert set(FUNCTIONS) - set(calls()) == {
        "cam.find_classifier",
        "cam.find_target_layer",
        "heads.d2cam_anchor_weight",
        "heads.icd_warmup",
        "masks.choose_background",
        "refine.affinity_offsets",
    }


def test_every_kind_takes_part() -> None:
    found = list(cases())
    assert {kind for _, _, kind in found} == set(KINDS)
    assert len(found) > 12_000


def test_every_exception_is_needed() -> None:
    found = [" ".join(case) for case in cases()]
    for pattern in EXCEPT:
        assert any(re.search(pattern, case) for case in found), pattern


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name in calls()])
def test_every_case(name: str) -> None:
    call = calls()[name]
    usual = call.function(**call.arguments)
    wrong = {
        " ".join(case): said
        for case in cases()
        if case[0] == name
        and not excepted(case)
        and (said := outcome(name, call, case[1], KINDS[case[2]], usual))
    }
    assert not wrong, "\n".join(f"{case}: {said}" for case, said in wrong.items())


@pytest.mark.parametrize("step", [-1, math.nan, math.inf, None, "1", 1j, []])
@pytest.mark.parametrize("argument", ["step", "total_steps", "sharpness"])
def test_warmup(argument: str, step: object) -> None:
    with pytest.raises(ValueError, match=rf"^{argument}: expected"):
        pl.heads.icd_warmup(**{"step": 1, "total_steps": 2, argument: step})


@pytest.mark.parametrize("radius", [-1, 0, 1, 1.5, math.nan, None, "5", True])
def test_offsets(radius: object) -> None:
    with pytest.raises(ValueError, match=r"^radius: expected"):
        pl.refine.affinity_offsets(radius)


@pytest.mark.parametrize("scored", [[], [(torch.full((1, 1, 2, 2), math.nan), torch.zeros(1, 2, 2).long())]])
def test_choose_background(scored: list) -> None:
    with pytest.raises(ValueError, match=r"scored|cam"):
        pl.masks.choose_background(scored)
