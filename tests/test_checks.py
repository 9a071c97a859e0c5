"""Argument validation: every message names the argument, what was expected and what came."""

import os
import subprocess
import sys
from typing import Literal

import pytest
import torch

from pseudolabel import _checks


def test_shared_letters() -> None:
    sizes = _checks.check_shapes(a=(torch.rand(2, 3), "B C"), b=(torch.rand(2, 3, 5), "B C W"))
    assert sizes == {"B": 2, "C": 3, "W": 5}
    with pytest.raises(ValueError, match=r"b: expected shape \(B, C\) with C=3 from a, got \(2, 4\)"):
        _checks.check_shapes(a=(torch.rand(2, 3), "B C"), b=(torch.rand(2, 4), "B C"))


def test_fixed_sizes_and_leading_axes() -> None:
    _checks.check_shapes(a=(torch.rand(7, 2, 3, 5), "... 3 W"))
    _checks.check_shapes(a=(torch.rand(3, 5), "... 3 W"))
    with pytest.raises(ValueError, match=r"a: expected shape \(\.\.\., 3, W\), got \(4, 5\)"):
        _checks.check_shapes(a=(torch.rand(4, 5), "... 3 W"))
    with pytest.raises(ValueError, match=r"a: expected shape \(\.\.\., 3, W\), got \(5,\)"):
        _checks.check_shapes(a=(torch.rand(5), "... 3 W"))


def test_what_is_no_tensor() -> None:
    with pytest.raises(TypeError, match=r"a: expected a tensor of shape \(B, C\), got list \[1\]"):
        _checks.check_shapes(a=([1], "B C"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_floats(dtype: torch.dtype) -> None:
    _checks.check_float(a=torch.zeros(1, dtype=dtype))
    with pytest.raises(TypeError, match=r"a: expected an integer tensor, got a b?float"):
        _checks.check_integer(a=torch.zeros(1, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.int32])
def test_integers(dtype: torch.dtype) -> None:
    _checks.check_integer(a=torch.zeros(1, dtype=dtype))
    with pytest.raises(TypeError, match="a: expected a floating-point tensor"):
        _checks.check_float(a=torch.zeros(1, dtype=dtype))


def test_bool_and_complex_are_neither() -> None:
    for dtype in (torch.bool, torch.complex64):
        with pytest.raises(TypeError):
            _checks.check_integer(a=torch.zeros(1, dtype=dtype))
        with pytest.raises(TypeError):
            _checks.check_float(a=torch.zeros(1, dtype=dtype))


def test_values() -> None:
    _checks.check_finite(a=torch.zeros(0))
    with pytest.raises(ValueError, match="a: expected finite values, got 1 NaN and 2 infinite of 4"):
        _checks.check_finite(a=torch.tensor([0, torch.nan, torch.inf, -torch.inf]))
    _checks.check_unit_range(a=torch.tensor([-1e-4, 1 + 1e-4]))
    with pytest.raises(ValueError, match=r"a: expected values in \[0, 1\], got values from -0.5 to 1"):
        _checks.check_unit_range(a=torch.tensor([-0.5, 1.0]))
    with pytest.raises(ValueError, match="got values from nan to nan"):
        _checks.check_unit_range(a=torch.tensor([0.5, torch.nan]))
    _checks.check_labels(torch.tensor([[True, False]]))
    _checks.check_labels(torch.tensor([[1.0, 0.0]]))
    with pytest.raises(ValueError, match="labels: expected a multi-hot tensor"):
        _checks.check_labels(torch.tensor([[3, 7]]))


def test_numbers() -> None:
    _checks.check_number("a", 3, above=2, at_most=3)
    for value in (2, 3.1, float("nan"), float("inf"), True, "3", None):
        with pytest.raises(ValueError, match="a: expected a finite number > 2 and <= 3, got"):
            _checks.check_number("a", value, above=2, at_most=3)


def test_choices() -> None:
    _checks.check_choice("a", "x", Literal["x", "y"])
    with pytest.raises(ValueError, match=r"a: expected one of \['x', 'y'\], got 'z'"):
        _checks.check_choice("a", "z", Literal["x", "y"])


def test_value_checks_can_be_switched_off() -> None:
    code = (
        "import torch; from pseudolabel.cam import normalize_cam;"
        "assert normalize_cam(torch.full((1, 1, 1, 1), torch.nan)).isnan().all()"
    )
    for setting, works in (("0", True), ("1", False)):
        run = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PSEUDOLABEL_CHECKS": setting},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (run.returncode == 0) == works, run.stderr


@pytest.mark.parametrize("side", ["H", "W", "h", "w'", "h4"])
def test_maps_have_pixels(side: str) -> None:
    _checks.check_shapes(a=(torch.rand(0, 0, 1), f"B heads {side}"))  # a batch or a stack may be empty
    with pytest.raises(ValueError, match=rf"^a: expected shape \(B, {side}\) with {side} >= 1, got \(2, 0\)"):
        _checks.check_shapes(a=(torch.rand(2, 0), f"B {side}"))


@pytest.mark.parametrize(
    ("tensor", "kind"), [(torch.eye(2).to_sparse(), "sparse_coo"), (torch.eye(2, device="meta"), "meta")]
)
def test_dense_tensors_with_values(tensor: torch.Tensor, kind: str) -> None:
    with pytest.raises(
        TypeError, match=rf"^a: expected a dense tensor that holds values, got a {kind} tensor"
    ):
        _checks.check_shapes(a=(tensor, "C D"))


def test_labels_are_no_complex_numbers() -> None:
    _checks.check_labels(torch.ones(2), "present")
    with pytest.raises(TypeError, match=r"^present: expected a multi-hot tensor of 0 and 1, got a complex64"):
        _checks.check_labels(torch.ones(2, dtype=torch.complex64), "present")
    with pytest.raises(ValueError, match=r"^present: expected a multi-hot"):
        _checks.check_labels(torch.tensor([0, 2]), "present")


def test_numbers_are_finite_in_float32() -> None:
    _checks.check_number("a", 3e38)
    for value in (1e39, -1e39, 10**400):
        with pytest.raises(ValueError, match=r"^a: expected a finite number, got -?1"):
            _checks.check_number("a", value)


def test_sizes() -> None:
    _checks.check_size(size=(1, 2), other=[3, 4])
    for value in (None, 3, (), (1,), (1, 2, 3), (0, 1), (1, -1), (1.0, 2), (True, 2), "12", {1: 2, 3: 4}):
        with pytest.raises(ValueError, match=r"^size: expected two integers \(height, width\) >= 1, got"):
            _checks.check_size(size=value)


def test_sequences() -> None:
    _checks.check_sequence(a=[1], b=(), c=range(2))
    for value in (None, 3, "text", b"bytes", {}, torch.ones(2), iter([1])):
        with pytest.raises(TypeError, match=r"^a: expected a list or tuple, got"):
            _checks.check_sequence(a=value)


def test_callables() -> None:
    _checks.check_callable(a=len, b=torch.nn.Identity())
    with pytest.raises(TypeError, match=r"^a: expected a callable, got NoneType None"):
        _checks.check_callable(a=None)


def test_label_of_ignored_pixels() -> None:
    _checks.check_ignore_index(255, 21)
    _checks.check_ignore_index(-1, 21)
    _checks.check_ignore_index(0)
    for value in (None, "255", 255.0, True, [255]):
        with pytest.raises(ValueError, match=r"^ignore_index: expected an integer, got"):
            _checks.check_ignore_index(value)
    with pytest.raises(ValueError, match=r"^ignore_index: expected an integer outside of 0\.\.20, got 20"):
        _checks.check_ignore_index(20, 21)


def test_devices_of_label_maps() -> None:
    masks = {"mask": torch.zeros(1, 2, 2).long(), "truth": torch.zeros(1, 2, 2, device="meta").long()}
    with pytest.raises(ValueError, match=r"^mask, truth: expected tensors of one device"):
        _checks.check_classes(2, 255, **masks)
