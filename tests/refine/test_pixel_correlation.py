"""Pixel correlation and its seed: sections 6.1 of the PMM and 3, 4, 13 of the RTC specification."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from pseudolabel.cam import normalize_cam
from pseudolabel.refine import PixelCorrelation, cam_seed, keep_max_class, pixel_correlation

EPS = 1e-5
seeds = st.integers(0, 1000)


def case(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    cam = torch.rand(2, 3, 4, 6, generator=generator, dtype=dtype)
    return cam, torch.randn(2, 5, 4, 6, generator=generator, dtype=dtype)


def tensors(data: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(value) for name, value in data.items() if value.ndim}


def enlarge(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=True)


# ------------------------------------------------------------------------------------------ golden files


@pytest.mark.parametrize("chunk_size", [None, 7])
def test_golden_network(golden: Callable, chunk_size: int | None) -> None:
    """The whole head of the classifier: the seed from its maps, the features from three taps."""
    data = tensors(golden("pmm/public_seam"))
    cam = F.conv2d(data["f_x4"], data["w_fc8"])
    taps = [
        enlarge(data["img"], cam.shape[2:]),
        F.conv2d(data["f_x2"], data["w_f8_3"]).relu(),
        F.conv2d(data["f_x3"], data["w_f8_4"]).relu(),
    ]
    features = F.conv2d(torch.cat(taps, 1), data["w_f9"])
    refined = pixel_correlation(cam_seed(cam[:, 1:]), features, chunk_size=chunk_size)
    for maps, expected in ((cam, data["cam"]), (refined, data["cam_rv"])):
        torch.testing.assert_close(enlarge(maps, data["img"].shape[2:]), expected, atol=4e-6, rtol=0)


def test_golden_max_norm(golden: Callable) -> None:
    """The torch variant is a method of `normalize_cam`; the NumPy variant of the same program differs.

    It divides by `max + eps` where the other has `max - min + eps`, and keeps what falls below 0: constant
    maps become -1.
    """
    data = tensors(golden("pmm/public_seam"))
    ours = normalize_cam(data["x"], "minmax-zero")
    torch.testing.assert_close(ours, data["max_norm_torch"], atol=4e-6, rtol=0)
    x = data["x"].relu()
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    in_numpy = (x.where(x >= low + EPS, 0) - low - EPS) / (high + EPS)
    torch.testing.assert_close(in_numpy, data["max_norm_numpy"], atol=4e-6, rtol=0)
    assert (ours - data["max_norm_numpy"]).abs().max() > 0.9
    torch.testing.assert_close(keep_max_class(ours), data["max_onehot"], atol=4e-6, rtol=0)


def test_golden_norm_and_winner(golden: Callable) -> None:
    data = tensors(golden("rtc/public_camnorm"))
    cam = data["max_norm_in"].requires_grad_()
    normalised = normalize_cam(cam, "minmax-zero")
    torch.testing.assert_close(normalised, data["max_norm_out"], atol=1e-5, rtol=1e-4)
    normalised.backward(data["max_norm_grad_weight"])
    torch.testing.assert_close(cam.grad, data["max_norm_grad_in"], atol=1e-4, rtol=1e-3)
    assert torch.equal(keep_max_class(data["onehot_in"]), data["onehot_out"])


@pytest.mark.parametrize("chunk_size", [None, 5, 1000])
def test_golden_module(golden: Callable, chunk_size: int | None) -> None:
    data = tensors(golden("rtc/public_pcm"))
    features = data["feat"].requires_grad_()
    refined = pixel_correlation(data["cam"], features, chunk_size=chunk_size)
    torch.testing.assert_close(refined, data["out"], atol=1e-5, rtol=1e-4)
    refined.backward(data["grad_weight"])
    torch.testing.assert_close(features.grad, data["grad_feat"], atol=1e-4, rtol=1e-3)
    for cam, features, expected in (
        ("cam_lowres", "feat", "out_from_lowres"),
        ("cam", "feat_zero_pixel", "out_zero_pixel"),
    ):
        refined = pixel_correlation(data[cam], data[features], chunk_size=chunk_size)
        torch.testing.assert_close(refined, data[expected], atol=1e-5, rtol=1e-4)


def test_golden_seed(golden: Callable) -> None:
    """RTC: the same seed, correlated twice, with deep and with shallow features."""
    data = tensors(golden("rtc/public_crr"))
    seed = cam_seed(data["cam_logits"][:, 1:])
    torch.testing.assert_close(seed, data["cam_seed"], atol=1e-5, rtol=1e-4)
    for name in ("deep", "shallow"):
        refined = pixel_correlation(seed, data[f"{name}_feat"])
        torch.testing.assert_close(refined, data[f"pcm_{name}"], atol=1e-5, rtol=1e-4)


# ------------------------------------------------------------------------------------------ the seed


def test_hand_computed_seed() -> None:
    cam = torch.tensor([[[[4.0, 1.0, 0.0]], [[-5.0, 2.0, 0.0]], [[0.0, 0.0, 0.0]]]])
    seed = cam_seed(cam, eps=1e-9)
    expected = torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(seed[0, :, 0], expected)
    # (4 - 1) / (4 + 1), and 1 - that.
    torch.testing.assert_close(
        cam_seed(cam, eps=1.0)[0, :, 0, 0], torch.tensor([0.4, 0.6, 0.0, 0.0]), atol=1e-6, rtol=0
    )


@given(seed=seeds)
def test_seed_properties(seed: int) -> None:
    # In float64 the peaks of two classes on one pixel, each about 1, do not tie.
    cam = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    scores = cam_seed(cam)
    assert scores.min() >= 0
    assert scores.max() <= 1
    torch.testing.assert_close(scores.sum(1), torch.ones_like(scores[:, 0]))
    assert torch.equal(keep_max_class(scores), scores)
    assert ((scores[:, 1:] > 0).sum(1) <= 1).all()
    torch.testing.assert_close(cam_seed(7 * cam), scores, atol=1e-4, rtol=0)


def test_seed_of_nothing() -> None:
    for cam in (torch.zeros(1, 2, 2, 2), -torch.ones(1, 2, 2, 2), torch.zeros(1, 0, 2, 2)):
        scores = cam_seed(cam)
        assert scores[:, 0].eq(1).all()
        assert scores[:, 1:].eq(0).all()


def test_ties_and_background_are_kept() -> None:
    scores = torch.tensor([0.1, 0.5, 0.5, 0.2]).view(1, 4, 1, 1)
    assert keep_max_class(scores).flatten().tolist() == pytest.approx([0.1, 0.5, 0.5, 0])
    negative = torch.tensor([-3.0, -2.0, -1.0]).view(1, 3, 1, 1)
    assert keep_max_class(negative).flatten().tolist() == [-3, 0, -1]


def test_winner_leaves_its_input_alone() -> None:
    for channels in (1, 4):
        scores = torch.rand(2, channels, 3, 3)
        before = scores.clone()
        kept = keep_max_class(scores)
        kept.zero_()
        assert torch.equal(scores, before)


def test_winner_gradient() -> None:
    scores = torch.rand(1, 4, 5, 5, dtype=torch.float64, requires_grad=True)
    kept = keep_max_class(scores)
    kept.sum().backward()
    assert torch.equal(scores.grad, (kept != 0).double())
    assert torch.autograd.gradcheck(keep_max_class, (scores,))
    cam = torch.rand(1, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(cam_seed, (cam,))


def test_nan_is_seen() -> None:
    cam = torch.rand(1, 3, 2, 2)
    cam[0, 1, 0, 0] = torch.nan
    assert cam_seed(cam)[0, :, 0, 0].isnan().any()
    assert keep_max_class(F.pad(cam, (0, 0, 0, 0, 1, 0)))[0, 2, 0, 0].isnan()


# ------------------------------------------------------------------------------------------ correlation


def test_hand_computed() -> None:
    # The middle pixel is at 45 degrees to both others: weights 1/sqrt(2), 1, 1/sqrt(2) for itself.
    cam = torch.tensor([[[[1.0, 0.0, 0.0]]]])
    features = torch.tensor([[[[3.0, 2.0, 0.0]], [[0.0, 2.0, 5.0]]]])
    half = 0.5**0.5
    expected = torch.tensor([1 / (1 + half), half / (1 + 2 * half), 0.0])
    torch.testing.assert_close(pixel_correlation(cam, features).flatten(), expected, atol=1e-4, rtol=0)


def test_smaller_maps_are_stretched_from_corner_to_corner() -> None:
    at_right_angles = torch.eye(4).view(1, 4, 1, 4)
    refined = pixel_correlation(torch.tensor([[[[0.0, 0.9]]]]), at_right_angles)
    torch.testing.assert_close(refined.flatten(), torch.tensor([0, 0.3, 0.6, 0.9]), atol=1e-4, rtol=0)


def test_opposite_features_do_not_count() -> None:
    cam = torch.tensor([[[[1.0, 0.0]]]])
    refined = pixel_correlation(cam, torch.tensor([[[[1.0, -1.0]]]]))
    torch.testing.assert_close(refined, cam, atol=1e-4, rtol=0)


@given(seed=seeds, chunk_size=st.sampled_from([None, 1, 7, 24, 100]))
def test_properties(seed: int, chunk_size: int | None) -> None:
    cam, features = case(seed)
    refine = lambda cam, features: pixel_correlation(cam, features, chunk_size=chunk_size)  # noqa: E731
    refined = refine(cam, features)
    assert refined.min() >= 0
    assert (refined <= cam.amax((2, 3), keepdim=True)).all()
    other = cam.flip(1).sqrt()
    torch.testing.assert_close(refine(2 * cam - other, features), 2 * refined - refine(other, features))
    order = torch.randperm(24, generator=torch.Generator().manual_seed(seed))
    shuffle = lambda x: x.flatten(2)[..., order].view_as(x)  # noqa: E731
    torch.testing.assert_close(refine(shuffle(cam), shuffle(features)), shuffle(refined))
    lengths = 0.5 + torch.rand(2, 1, 4, 6, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(refine(cam, features * lengths), refined, atol=1e-3, rtol=0)
    # Columns sum to 1: all pixels at 1 stay there.
    torch.testing.assert_close(
        refine(torch.ones_like(cam), features), torch.ones_like(cam), atol=1e-4, rtol=0
    )


def test_special_features() -> None:
    cam, _ = case()
    alike = pixel_correlation(cam, torch.ones(2, 5, 4, 6, dtype=cam.dtype))
    torch.testing.assert_close(alike, cam.mean((2, 3), keepdim=True).expand_as(cam), atol=1e-4, rtol=0)
    at_right_angles = torch.eye(24, dtype=cam.dtype).view(1, 24, 4, 6).expand(2, -1, -1, -1)
    torch.testing.assert_close(pixel_correlation(cam, at_right_angles), cam, atol=1e-4, rtol=0)
    assert pixel_correlation(cam, torch.zeros(2, 5, 4, 6)).eq(0).all()


@pytest.mark.parametrize("chunk_size", [1, 5, 24])
def test_chunks_change_nothing(chunk_size: int) -> None:
    results = []
    for size in (None, chunk_size):
        cam, features = (value.requires_grad_() for value in case())
        refined = pixel_correlation(cam, features, chunk_size=size)
        refined.square().sum().backward()
        results.append((refined, cam.grad, features.grad))
    for whole, chunked in zip(*results, strict=True):
        torch.testing.assert_close(chunked, whole)


def test_chunks_keep_no_matrix() -> None:
    """What the backward pass keeps: nothing of the size of a chunk of the matrix."""
    sizes: dict[int | None, int] = {}
    for chunk_size in (None, 20):
        cam, features = torch.rand(1, 2, 20, 20), torch.rand(1, 3, 20, 20, requires_grad=True)
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):  # noqa: B023
            pixel_correlation(cam, features, chunk_size=chunk_size)
        sizes[chunk_size] = max(kept)
    assert sizes[None] == 400 * 400
    assert sizes[20] <= 3 * 400


@pytest.mark.parametrize("chunk_size", [None, 5])
def test_gradcheck(chunk_size: int | None) -> None:
    cam, features = (value[:1, :, :2, :3].clone().requires_grad_() for value in case())
    assert torch.autograd.gradcheck(
        lambda c, f: pixel_correlation(c, f, chunk_size=chunk_size), (cam, features)
    )


def test_gradient_of_a_pixel_without_features_is_finite() -> None:
    cam, features = case()
    features[:, :, 0, 0] = 0
    pixel_correlation(cam, features.requires_grad_()).square().sum().backward()
    assert features.grad.isfinite().all()


def test_batch_equals_singles() -> None:
    cam, features = case()
    for one in range(2):
        some = slice(one, one + 1)
        torch.testing.assert_close(
            pixel_correlation(cam, features)[some], pixel_correlation(cam[some], features[some])
        )
        torch.testing.assert_close(cam_seed(cam)[some], cam_seed(cam[some]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    cam, features = case(dtype=torch.float32)
    for function, arguments in (
        (pixel_correlation, (cam, features)),
        (cam_seed, (cam,)),
        (keep_max_class, (cam,)),
    ):
        exact = function(*(value.to(dtype).float() for value in arguments))
        low = function(*(value.to(dtype) for value in arguments))
        assert low.dtype == dtype
        torch.testing.assert_close(low.float(), exact, atol=1e-2, rtol=1e-2)


def test_autocast_changes_nothing() -> None:
    cam, features = case(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = pixel_correlation(cam, features)
    assert torch.equal(inside, pixel_correlation(cam, features))


@pytest.mark.parametrize("chunk_size", [None, 7])
def test_compiles_to_one_graph(chunk_size: int | None) -> None:
    cam, features = case(dtype=torch.float32)
    compiled = torch.compile(pixel_correlation, fullgraph=True, backend="eager")
    torch.testing.assert_close(
        compiled(cam, features, chunk_size=chunk_size), pixel_correlation(cam, features)
    )
    for function in (cam_seed, keep_max_class):
        assert torch.equal(torch.compile(function, fullgraph=True, backend="eager")(cam), function(cam))


def test_module_equals_function() -> None:
    cam, features = case()
    settings = {"eps": 0.1, "chunk_size": 5}
    module = PixelCorrelation(**settings)
    assert torch.equal(module(cam, features), pixel_correlation(cam, features, **settings))
    assert torch.equal(PixelCorrelation()(cam, features), pixel_correlation(cam, features))
    assert not torch.allclose(module(cam, features), PixelCorrelation()(cam, features))
    assert repr(module) == "PixelCorrelation(eps=0.1, chunk_size=5)"


def test_devices(device: torch.device) -> None:
    cam, features = case(dtype=torch.float32)
    for chunk_size in (None, 7):
        refined = pixel_correlation(cam.to(device), features.to(device), chunk_size=chunk_size)
        assert refined.device.type == device.type
        torch.testing.assert_close(refined.cpu(), pixel_correlation(cam, features), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(cam_seed(cam.to(device)).cpu(), cam_seed(cam))


CAM, FEATURES = case()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: pixel_correlation(CAM[0], FEATURES), ValueError, r"cam: expected shape \(B, K, h', w'\)"),
        (lambda: pixel_correlation(CAM, FEATURES[:1]), ValueError, "features: .* with B=2 from cam"),
        (lambda: pixel_correlation(CAM.long(), FEATURES), TypeError, "cam: expected a floating-point"),
        (lambda: pixel_correlation(CAM, FEATURES.long()), TypeError, "features: expected a floating-point"),
        (lambda: pixel_correlation(CAM, FEATURES, eps=0), ValueError, "eps: expected a finite number > 0"),
        (
            lambda: pixel_correlation(CAM, FEATURES, chunk_size=0),
            ValueError,
            "chunk_size: expected an integer >= 1 or None, got 0",
        ),
        (lambda: PixelCorrelation(chunk_size=1.5), ValueError, "chunk_size: expected an integer"),
        (lambda: PixelCorrelation(eps=-1), ValueError, "eps: expected a finite number"),
        (lambda: cam_seed(CAM[0]), ValueError, r"cam: expected shape \(B, C, h, w\)"),
        (lambda: cam_seed(CAM.long()), TypeError, "cam: expected a floating-point"),
        (lambda: cam_seed(CAM, eps=0), ValueError, "eps: expected a finite number > 0"),
        (lambda: keep_max_class(CAM[0]), ValueError, r"scores: expected shape \(B, 1\+C, h, w\)"),
        (lambda: keep_max_class(CAM.long()), TypeError, "scores: expected a floating-point"),
        (lambda: keep_max_class(CAM[:, :0]), ValueError, "scores: expected a background channel"),
    ],
)
def test_errors(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()
