"""KNN matting: against its dense definition, against pymatting, and as the other methods behave."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from skimage import data

from pseudolabel.masks import alpha_to_mask
from pseudolabel.matting import MattingReport, closed_form_matting, knn_matting


def dense_laplacian(image: torch.Tensor, neighbours, distance_weights) -> np.ndarray:
    """`D - W` by sorting all distances; no two may be alike."""
    _, height, width = image.shape
    y, x = np.meshgrid(np.linspace(0, 1, height), np.linspace(0, 1, width), indexing="ij")
    count = np.zeros((height * width, height * width))
    for length, weight in zip(neighbours, distance_weights, strict=True):
        f = np.stack([*image.numpy().reshape(3, -1), weight * x.ravel(), weight * y.ravel()], 1)
        distance = np.linalg.norm(f[:, None] - f[None], axis=2)
        nearest = distance.argsort(1)[:, :length]
        np.add.at(count, (np.arange(len(f))[:, None], nearest), 1)
    both = count + count.T
    return np.diag(both.sum(1)) - both


def random_case(seed: int, size=(8, 9), images=1, classes=2):
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(images, 3, *size, generator=generator, dtype=torch.float64)
    label = torch.randint(0, classes + 3, (images, *size), generator=generator)  # background and unknown
    trimap = torch.stack([(label == c + 1).double() for c in range(classes)], 1)
    trimap = trimap.masked_fill((label > classes)[:, None], 0.5)
    return image, trimap


LISTS = {"neighbours": (5, 3), "distance_weights": (1.0, 0.1)}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_solves_the_dense_system(seed: int) -> None:
    image, trimap = random_case(seed)
    laplacian = dense_laplacian(image[0], **LISTS)
    unknown = (trimap[0, 0] == 0.5).flatten().numpy()
    seeds = trimap[0].flatten(1).T.numpy()[~unknown]
    inner, outer = laplacian[np.ix_(unknown, unknown)], laplacian[np.ix_(unknown, ~unknown)]
    expected = np.linalg.solve(inner, -outer @ seeds)
    alpha, report = knn_matting(image, trimap, **LISTS, rtol=1e-12, return_report=True)
    np.testing.assert_allclose(alpha[0].flatten(1).T.numpy()[unknown], expected, atol=1e-10)
    np.testing.assert_array_equal(alpha[0].flatten(1).T.numpy()[~unknown], seeds)
    assert bool(report.converged.all())
    # With a prior of confidence 2.
    prior = torch.rand(1, 2, 8, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) / 2
    right = -outer @ seeds + 2 * prior[0].flatten(1).T.numpy()[unknown]
    expected = np.linalg.solve(inner + 2 * np.eye(unknown.sum()), right)
    alpha = knn_matting(image, trimap, **LISTS, rtol=1e-12, prior=prior, prior_weight=2.0)
    np.testing.assert_allclose(alpha[0].flatten(1).T.numpy()[unknown], expected, atol=1e-10)


def test_like_colours_are_alike_wherever_they_are() -> None:
    """Two stripes of the object's colour: the far one has no seed, and background of its own between."""
    image = torch.full((1, 3, 12, 30), 0.2, dtype=torch.float64)
    image[..., 3:8] = image[..., 20:25] = 0.9
    image += 0.01 * torch.rand(image.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    trimap = torch.full((1, 1, 12, 30), 0.5, dtype=torch.float64)
    trimap[..., 4:7] = 1
    trimap[..., :2] = trimap[..., 12:14] = trimap[..., -2:] = 0
    found = alpha_to_mask(knn_matting(image, trimap, neighbours=[20], distance_weights=[0.0]))[0]
    assert found[:, 20:25].eq(1).all()
    assert found[:, 26:].eq(0).all()
    assert alpha_to_mask(closed_form_matting(image, trimap))[0, :, 20:25].eq(0).all(), (
        "what a local method does"
    )


def test_agrees_with_pymatting() -> None:
    pymatting = pytest.importorskip("pymatting", reason="pymatting is not installed: no comparison with it")
    photo = torch.from_numpy(data.astronaut()[:256:2, 128:384:2].copy()).permute(2, 0, 1)[None].double() / 255
    trimap = torch.full((1, 1, 128, 128), 0.5, dtype=torch.float64)
    trimap[..., :20] = trimap[..., -20:] = 0
    trimap[..., 40:80, 50:80] = 1
    alpha = knn_matting(photo, trimap, rtol=1e-9, max_iter=2000)[0, 0]
    # Its known pixels are not hard constraints, but nearly with such a weight.
    theirs = pymatting.estimate_alpha_knn(photo[0].permute(1, 2, 0).numpy().copy(), trimap[0, 0].numpy())
    unknown = trimap[0, 0] == 0.5
    assert ((alpha > 0.5) == torch.from_numpy(theirs > 0.5))[unknown].double().mean() >= 0.995
    assert (alpha - torch.from_numpy(theirs))[unknown].abs().mean() < 5e-3


@given(seed=st.integers(0, 10**6))
def test_stays_in_range_and_classes_share(seed: int) -> None:
    image, trimap = random_case(seed, classes=3)
    alpha = knn_matting(image, trimap, neighbours=[4], distance_weights=[0.5], rtol=1e-10)
    assert alpha.min() >= 0
    assert alpha.sum(1).max() <= 1 + 1e-9
    known = (trimap != 0.5).all(1, keepdim=True)
    assert torch.equal(alpha.where(known, 0), trimap.where(known, 0))
    # Background by itself is what the classes leave.
    background = (1 - trimap.sum(1, keepdim=True)).where(known, 0.5)
    with_background = torch.cat([trimap, background], 1)
    both = knn_matting(image, with_background, neighbours=[4], distance_weights=[0.5], rtol=1e-10)
    torch.testing.assert_close(both[:, :3], alpha, rtol=0, atol=1e-7)


def test_absent_classes_cost_nothing_and_images_stay_apart() -> None:
    image, trimap = random_case(3, images=3)
    trimap[1] = 0
    trimap[2, 0] = 0
    together, report = knn_matting(image, trimap, **LISTS, return_report=True)
    for i in range(3):
        alone, one = knn_matting(image[i : i + 1], trimap[i : i + 1], **LISTS, return_report=True)
        assert torch.equal(together[i], alone[0])
        assert report.iterations[i] == one.iterations[0]
    assert not together[1].any()
    assert not together[2, 0].any()
    assert isinstance(report, MattingReport)
    assert report.iterations[1] == 0


def test_nothing_unknown_nothing_known_one_kind_of_seed() -> None:
    image, trimap = random_case(4, classes=1)
    known = (trimap == 1).double()
    assert torch.equal(knn_matting(image, known), known)
    nothing = torch.full_like(trimap, 0.5)
    assert torch.equal(knn_matting(image, nothing), nothing)
    no_foreground = torch.where(trimap == 1, 0.5, trimap)
    assert knn_matting(image, no_foreground).abs().max() < 1e-3
    no_background = torch.where(trimap == 0, 0.5, trimap)
    assert (knn_matting(image, no_background) - 1).abs().max() < 1e-3


def test_flat_image_and_lists_longer_than_the_image() -> None:
    trimap = torch.tensor([[[[0.0, 0.5, 0.5, 1.0]]]])
    alpha = knn_matting(torch.zeros(1, 3, 1, 4), trimap, neighbours=[9], distance_weights=[1.0])
    torch.testing.assert_close(alpha, torch.tensor([[[[0.0, 0.5, 0.5, 1.0]]]]))  # all are tied to all


def test_stops_at_max_iter_and_starts_from_x0() -> None:
    image, trimap = random_case(5)
    solution = knn_matting(image, trimap, **LISTS, rtol=1e-12)
    cut, report = knn_matting(image, trimap, **LISTS, rtol=1e-12, max_iter=2, return_report=True)
    assert not report.converged.any()
    assert report.iterations.tolist() == [2]
    assert (cut - solution).abs().max() > 1e-3
    _, report = knn_matting(image, trimap, **LISTS, rtol=1e-9, x0=solution, return_report=True)
    assert report.iterations.tolist() == [0]


def test_gradients() -> None:
    image, trimap = random_case(6, size=(4, 5), classes=2)
    prior = torch.rand(1, 2, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) / 2
    weight = torch.full((1, 4, 5), 0.7, dtype=torch.float64)

    def run(prior: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        settings = {"neighbours": [4], "distance_weights": [0.5], "rtol": 1e-13}
        return knn_matting(image, trimap, prior=prior, prior_weight=weight, **settings)

    assert torch.autograd.gradcheck(run, (prior.requires_grad_(), weight.requires_grad_()))


def test_gradient_of_the_seeds() -> None:
    image, trimap = random_case(7, size=(4, 5), classes=1)
    trimap = trimap.clamp(0.05, 0.95)  # known still, but not at the ends of the range

    def run(trimap: torch.Tensor) -> torch.Tensor:
        return knn_matting(image, trimap, neighbours=[4], distance_weights=[0.5], rtol=1e-13)

    assert torch.autograd.gradcheck(run, (trimap.requires_grad_(),))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_and_devices(dtype: torch.dtype, device: torch.device) -> None:
    image, trimap = random_case(8)
    image = (image * 64).round() / 64
    exact = knn_matting(image, trimap, **LISTS, rtol=1e-6)
    alpha = knn_matting(image.to(device, dtype), trimap.to(device, dtype), **LISTS, rtol=1e-6)
    assert (alpha.dtype, alpha.device.type) == (dtype, device.type)
    torch.testing.assert_close(alpha.cpu().double(), exact, rtol=0, atol=max(1e-4, torch.finfo(dtype).eps))


IMAGE, TRIMAP = random_case(0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: knn_matting(IMAGE[0], TRIMAP), ValueError, "image: expected shape"),
        (lambda: knn_matting(IMAGE, TRIMAP[..., 1:]), ValueError, "trimap: .* with W=9 from image"),
        (lambda: knn_matting(IMAGE * 255, TRIMAP), ValueError, "image: .*divide 8-bit"),
        (lambda: knn_matting(IMAGE.long(), TRIMAP), TypeError, "image: expected a floating-point"),
        (lambda: knn_matting(IMAGE, TRIMAP.long()), TypeError, "trimap: expected a floating-point"),
        (
            lambda: knn_matting(IMAGE, TRIMAP, neighbours=[5]),
            ValueError,
            "distance_weights: expected one for",
        ),
        (
            lambda: knn_matting(IMAGE, TRIMAP, neighbours=[5, 1]),
            ValueError,
            "neighbours: expected integers >= 2",
        ),
        (
            lambda: knn_matting(IMAGE, TRIMAP, neighbours=[5, 2.0]),
            ValueError,
            "neighbours: expected integers",
        ),
        (
            lambda: knn_matting(IMAGE, TRIMAP, distance_weights=[1, -1]),
            ValueError,
            "distance_weights: expected",
        ),
        (lambda: knn_matting(IMAGE, TRIMAP, rtol=0), ValueError, "rtol: expected"),
        (lambda: knn_matting(IMAGE, TRIMAP, max_iter=0), ValueError, "max_iter: expected"),
        (
            lambda: knn_matting(IMAGE, TRIMAP, prior=TRIMAP[:, :1]),
            ValueError,
            "prior: .* with C=2 from trimap",
        ),
    ],
)
def test_errors(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()
