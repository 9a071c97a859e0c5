"""Argument validation: every message names the argument, what was expected and what came."""

import os
import subprocess
import sys

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
    _checks.check_choice("a", "x", ["x", "y"])
    with pytest.raises(ValueError, match=r"a: expected one of \['x', 'y'\], got 'z'"):
        _checks.check_choice("a", "z", ["x", "y"])


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
