"""`constant_background` and `power_background`."""

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch

from pseudolabel.masks import constant_background, power_background, scores_to_mask

CAM = torch.tensor([[[[0.9, 0.0, 0.2]], [[0.1, 0.0, 0.5]]]])


def test_hand_computed() -> None:
    torch.testing.assert_close(constant_background(CAM, 0.3)[0, 0, 0], torch.tensor([0.3, 0.3, 0.3]))
    torch.testing.assert_close(power_background(CAM, 2)[0, 0, 0], torch.tensor([0.01, 1.0, 0.25]))
    for scores in (constant_background(CAM, 0.3), power_background(CAM, 2)):
        assert torch.equal(scores[:, 1:], CAM)


@pytest.mark.parametrize(
    ("alpha", "root"), [(4, 0.2755), (6, 0.2219), (11, 0.1556), (24, 0.0939), (32, 0.0770)]
)
def test_power_is_a_threshold_on_the_highest_map(alpha: float, root: float) -> None:
    """The figures of section 3.2 of the PMM specification."""
    cam = torch.tensor([[[[root - 1e-4, root + 1e-4]]]])
    assert scores_to_mask(power_background(cam, alpha)).tolist() == [[[0, 1]]]


def test_larger_exponents_give_more_foreground(generator: torch.Generator) -> None:
    cam = torch.rand(1, 3, 20, 20, generator=generator) ** 3
    shares = [(scores_to_mask(power_background(cam, alpha)) > 0).float().mean() for alpha in (1, 2, 4, 8, 16)]
    assert shares == sorted(shares)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    for scores in (constant_background(CAM.to(dtype), 0.3), power_background(CAM.to(dtype), 4)):
        assert scores.dtype == dtype
    torch.testing.assert_close(
        power_background(CAM.to(dtype), 4).float(), power_background(CAM, 4), atol=0.02, rtol=0.02
    )


def test_no_classes_is_all_background() -> None:
    none = torch.rand(2, 0, 3, 3)
    assert scores_to_mask(constant_background(none, 0.1)).eq(0).all()
    assert scores_to_mask(power_background(none, 4)).eq(0).all()


def test_rounding_noise_above_one() -> None:
    assert power_background(torch.tensor([[[[1.0005]]]]), 3)[0, 0].item() == 0


@pytest.mark.parametrize("alpha", [0.5, 1, 3])
def test_differentiable(alpha: float) -> None:
    cam = torch.rand(1, 2, 2, 3, dtype=torch.float64) * 0.8 + 0.1
    assert torch.autograd.gradcheck(lambda x: power_background(x, alpha), (cam.requires_grad_(),))


@pytest.mark.parametrize(
    ("alpha", "slopes"),  # at 0, 0.75, 1 and a little above
    [(0.5, [-0.5, -1, 0, 0]), (1, [-1, -1, -1, 0]), (3, [-3, -3 / 16, 0, 0])],
)
def test_slope_at_the_bounds(alpha: float, slopes: list[float], flat_clamp: Callable) -> None:
    """A map of 0 is as good as any; a root at a map of 1 has a gradient of 0, not an infinite one."""
    for context in (nullcontext, flat_clamp):
        cam = torch.tensor([[[[0.0, 0.75, 1.0, 1.0005]]]], requires_grad=True)
        with context():
            power_background(cam, alpha)[:, 0].sum().backward()
        assert cam.grad.flatten().tolist() == pytest.approx(slopes)


@pytest.mark.parametrize("rule", [constant_background, power_background])
def test_compiles_and_devices(rule, device: torch.device) -> None:
    compiled = torch.compile(rule, fullgraph=True, backend="eager")
    cam = CAM.to(device)
    torch.testing.assert_close(compiled(cam, 0.5), rule(cam, 0.5))


@pytest.mark.parametrize("rule", [constant_background, power_background])
@pytest.mark.parametrize(
    ("cam", "value", "error", "message"),
    [
        (CAM[0], 0.5, ValueError, r"cam: expected shape \(B, C, H, W\)"),
        (CAM.long(), 0.5, TypeError, "cam: expected a floating-point tensor"),
        (CAM * 3, 0.5, ValueError, r"cam: expected values in \[0, 1\], got values from 0 to 2.7"),
        (CAM * torch.nan, 0.5, ValueError, r"cam: expected values in \[0, 1\], got values from nan to nan"),
        (CAM, -1, ValueError, "(value|alpha): expected a finite number"),
        (CAM, True, ValueError, "(value|alpha): expected a finite number"),
    ],
)
def test_errors(rule, cam, value, error, message) -> None:
    with pytest.raises(error, match=message):
        rule(cam, value)
