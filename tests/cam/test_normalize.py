"""`normalize_cam`."""

from collections.abc import Callable

import hypothesis.extra.numpy as hnp
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pseudolabel.cam import normalize_cam

METHODS = ["max", "minmax", "minmax-zero", "none"]
maps = hnp.arrays(
    "float32", hnp.array_shapes(min_dims=4, max_dims=4, max_side=5), elements=st.floats(-100, 100, width=32)
).map(torch.from_numpy)


def test_hand_computed() -> None:
    cam = torch.tensor([[[[-3.0, 1.0, 2.0, 5.0]], [[2.0, 4.0, 4.0, 6.0]]]])
    expected = {
        "max": [[0, 1 / 5, 2 / 5, 1], [2 / 6, 4 / 6, 4 / 6, 1]],
        "minmax": [[0, 1 / 5, 2 / 5, 1], [0, 0.5, 0.5, 1]],
        "minmax-zero": [[0, 1 / 5, 2 / 5, 1], [0, 0.5, 0.5, 1]],
    }
    for method, rows in expected.items():
        torch.testing.assert_close(normalize_cam(cam, method, eps=1e-8), torch.tensor(rows)[None, :, None])


def test_eps_enters_as_published() -> None:
    cam = torch.tensor([[[[1.0, 2.0, 3.0]]]])
    eps = 0.5
    torch.testing.assert_close(normalize_cam(cam, "max", eps).flatten(), torch.tensor([1, 2, 3]) / 3.5)
    torch.testing.assert_close(normalize_cam(cam, "minmax", eps).flatten(), torch.tensor([0, 1, 2]) / 2.5)
    torch.testing.assert_close(
        normalize_cam(cam, "minmax-zero", eps).flatten(), torch.tensor([0, 0.5, 1.5]) / 2.5
    )


@pytest.mark.parametrize(
    ("method", "gradient"),
    [
        ("max", [1 / 3, 1 / 3, 1 / 3 - 2 / 9]),  # of the sum of x / (M + 1)
        ("minmax", [1 / 3 - 7 / 18, 1 / 3 - 7 / 18, 1 / 3 - 2 / 9]),  # two pixels share the minimum
    ],
)
def test_slope_at_zero(method: str, gradient: list[float], flat_clamp: Callable) -> None:
    """Zeros are many in maps after a ReLU, and learn as other values do."""
    cam = torch.tensor([[[[0.0, 0.0, 2.0]]]], requires_grad=True)
    with flat_clamp():
        normalize_cam(cam, method, eps=1).sum().backward()
    assert cam.grad.flatten().tolist() == pytest.approx(gradient)


def test_none_is_raw() -> None:
    cam = torch.randn(1, 2, 3, 3)
    assert normalize_cam(cam, "none") is cam


@given(cam=maps, method=st.sampled_from(METHODS[:3]))
def test_in_unit_range(cam: torch.Tensor, method: str) -> None:
    out = normalize_cam(cam, method)
    assert out.min() >= 0
    assert out.max() <= 1


@given(cam=maps, method=st.sampled_from(METHODS))
def test_classes_and_images_are_independent(cam: torch.Tensor, method: str) -> None:
    out = normalize_cam(cam, method)
    for b in range(cam.shape[0]):
        for c in range(cam.shape[1]):
            torch.testing.assert_close(
                out[b : b + 1, c : c + 1], normalize_cam(cam[b : b + 1, c : c + 1], method)
            )


@given(cam=maps, method=st.sampled_from(METHODS))
def test_flip_equivariant(cam: torch.Tensor, method: str) -> None:
    torch.testing.assert_close(normalize_cam(cam.flip(-1), method), normalize_cam(cam, method).flip(-1))


@given(cam=maps, method=st.sampled_from(METHODS[:3]))
def test_order_is_kept(cam: torch.Tensor, method: str) -> None:
    order = cam.clamp(min=0).flatten(2).argsort(-1)
    assert (normalize_cam(cam, method).flatten(2).gather(-1, order).diff(dim=-1) >= 0).all()


@pytest.mark.parametrize("method", METHODS[:3])
@pytest.mark.parametrize("value", [-3.0, 0.0])
def test_a_map_without_a_positive_value_becomes_zero(method: str, value: float) -> None:
    assert normalize_cam(torch.full((1, 1, 3, 3), value), method).eq(0).all()


@pytest.mark.parametrize("method", METHODS[:3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(method: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    cam = torch.randn(1, 2, 4, 4, generator=generator)
    out = normalize_cam(cam.to(dtype), method)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), normalize_cam(cam, method), atol=0.01, rtol=0.01)


def test_gradients() -> None:
    cam = torch.rand(1, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    for method in METHODS[:3]:
        assert torch.autograd.gradcheck(lambda x, m=method: normalize_cam(x, m), (cam,))


@pytest.mark.parametrize("method", METHODS)
def test_compiles(method: str) -> None:
    cam = torch.randn(1, 2, 4, 4)
    compiled = torch.compile(normalize_cam, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(cam, method), normalize_cam(cam, method))


def test_no_classes_and_one_pixel() -> None:
    assert normalize_cam(torch.rand(2, 0, 4, 4)).shape == (2, 0, 4, 4)
    assert normalize_cam(torch.ones(1, 1, 1, 1)).item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    ("cam", "arguments", "error", "message"),
    [
        (torch.rand(2, 3, 3), {}, ValueError, r"cam: expected shape \(B, C, h, w\), got \(2, 3, 3\)"),
        (torch.ones(1, 1, 2, 2, dtype=torch.uint8), {}, TypeError, "cam: expected a floating-point tensor"),
        (torch.full((1, 1, 2, 2), torch.nan), {}, ValueError, "cam: expected finite values, got 4 NaN"),
        (torch.full((1, 1, 2, 2), torch.inf), {}, ValueError, "cam: expected finite values, .*4 infinite"),
        (torch.rand(1, 1, 2, 2), {"method": "sum"}, ValueError, "method: expected one of"),
        (torch.rand(1, 1, 2, 2), {"eps": 0}, ValueError, "eps: expected a finite number > 0, got 0"),
    ],
)
def test_errors(cam, arguments, error, message) -> None:
    with pytest.raises(error, match=message):
        normalize_cam(cam, **arguments)
