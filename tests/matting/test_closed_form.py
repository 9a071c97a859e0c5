"""Closed-form matting, and what all methods that solve for mattes share: seeds, classes, prior, report."""

import importlib.util
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pseudolabel.matting import MattingReport, closed_form_matting, matting_energy
from pseudolabel.matting._cholesky import is_narrow
from pseudolabel.matting._pixels import Pixels
from pseudolabel.matting._stencil import stencil_laplacian
from pseudolabel.matting.closed_form import _entries

seeds = st.integers(0, 2**31 - 1)
EXACT = {"rtol": 1e-12, "max_iter": 2000}


def levin(image: Tensor, eps: float) -> Tensor:
    """The dense matting Laplacian (HW,HW) of an image (3,H,W), window by window as in the paper."""
    _, height, width = image.shape
    colours, index = image.flatten(1).T, torch.arange(height * width).view(height, width)
    matrix = image.new_zeros(height * width, height * width)
    for y in range(1, height - 1):
        for x in range(1, width - 1):
            window = index[y - 1 : y + 2, x - 1 : x + 2].flatten()
            centred = colours[window] - colours[window].mean(0)
            covariance = centred.T @ centred / 9 + eps / 9 * torch.eye(3, dtype=image.dtype)
            affinity = (1 + centred @ torch.linalg.inv(covariance) @ centred.T) / 9
            matrix[window[:, None], window] += torch.eye(9, dtype=image.dtype) - affinity
    return matrix


def dense_mattes(
    matrix: Tensor, trimap: Tensor, prior: Tensor | None = None, weight: float | Tensor = 0.0
) -> Tensor:
    """Mattes (C,H,W) for hard trimaps, by dense algebra."""
    known = (trimap == 1).any(0) | (trimap == 0).all(0)
    u = ~known.flatten()
    x = torch.where(known, trimap.where(trimap == 1, 0), 0).flatten(1).T
    inner, rhs = matrix[u][:, u].clone(), -matrix[u][:, ~u] @ x[~u]
    if prior is not None:
        confidence = torch.as_tensor(weight, dtype=matrix.dtype).expand(known.shape).flatten()[u]
        inner += torch.diag(confidence)
        rhs += confidence[:, None] * prior.flatten(1).T[u]
    x[u] = torch.linalg.solve(inner, rhs)
    return x.T.view_as(trimap)


def smooth(seed: int, channels: int, size: tuple[int, int], coarse: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    small = torch.rand(1, channels, coarse, coarse, generator=generator, dtype=torch.float64)
    return torch.nn.functional.interpolate(small, size, mode="bicubic")[0].clamp(0, 1)


def case(
    seed: int = 0, classes: int = 1, size: tuple[int, int] = (12, 10), unknown: float = 0.5
) -> tuple[Tensor, Tensor]:
    """A smooth image (1,3,H,W) with some noise, and a trimap (1,C,H,W) of all classes and a background."""
    generator = torch.Generator().manual_seed(seed)
    image = smooth(seed, 3, size) * 0.9 + 0.1 * torch.rand(3, *size, generator=generator, dtype=torch.float64)
    scores = smooth(seed + 1, classes + 1, size).softmax(0)
    sure = scores.amax(0)
    label = scores.argmax(0)
    label.flatten()[torch.arange(classes + 1)] = torch.arange(classes + 1)
    known = sure >= sure.flatten().quantile(unknown)
    known.flatten()[: classes + 1] = True
    hard = torch.stack([label == k + 1 for k in range(classes)]).double()
    return image[None], hard.where(known, 0.5)[None]


def photo(side: int = 68) -> tuple[Tensor, Tensor]:
    """A photo of a cat with a wide unknown zone."""
    from skimage import data, transform

    image = torch.from_numpy(transform.resize(data.chelsea(), (side, side * 4 // 3), anti_aliasing=True))
    y, x = torch.meshgrid(torch.linspace(-1, 1, side), torch.linspace(-1, 1, side * 4 // 3), indexing="ij")
    distance = y**2 + x**2
    trimap = torch.full_like(distance, 0.5)
    trimap[distance < 0.15], trimap[distance > 0.9] = 1, 0
    return image.permute(2, 0, 1)[None], trimap[None, None].double()


# ------------------------------------------------------------------------------------ the Laplacian


@pytest.mark.parametrize("eps", [1e-7, 1e-5, 1e-2])
def test_equals_the_dense_laplacian(eps: float) -> None:
    image, _ = case()
    pixels = Pixels(torch.ones(12, 10, dtype=torch.bool))
    operator = stencil_laplacian(_entries(image[0], pixels, eps), pixels, None, 3, "jacobi")
    matrix = levin(image[0], eps)
    x = torch.randn(120, 3, dtype=torch.float64)
    torch.testing.assert_close(operator.matvec(x), matrix @ x, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(operator.rows(x.T.reshape(3, 12, 10)), matrix @ x, rtol=1e-10, atol=1e-10)


def test_properties_of_the_laplacian() -> None:
    image, _ = case()
    pixels = Pixels(torch.ones(12, 10, dtype=torch.bool))
    matvec = stencil_laplacian(_entries(image[0], pixels, 1e-5), pixels, None, 120, "jacobi").matvec
    matrix = matvec(torch.eye(120, dtype=torch.float64))
    torch.testing.assert_close(matrix @ torch.ones(120, 1, dtype=torch.float64), torch.zeros(120, 1).double())
    torch.testing.assert_close(matrix, matrix.T)
    assert torch.linalg.eigvalsh(matrix).min() > -1e-10


@given(seed=seeds, size=st.tuples(st.integers(3, 9), st.integers(3, 9)), share=st.floats(0.05, 1))
def test_rows_of_some_pixels(seed: int, size: tuple[int, int], share: float) -> None:
    """Those of the whole matrix, whichever pixels are unknown."""
    image = smooth(seed, 3, size)
    active = torch.rand(size, generator=torch.Generator().manual_seed(seed)) < share
    active[seed % size[0], seed % size[1]] = True
    pixels = Pixels(active)
    operator = stencil_laplacian(_entries(image, pixels, 1e-4), pixels, None, None, "jacobi")
    u, matrix = active.flatten(), levin(image, 1e-4)
    x = torch.randn(size[0] * size[1], dtype=torch.float64)
    torch.testing.assert_close(operator.matvec(x[u]), matrix[u][:, u] @ x[u])
    torch.testing.assert_close(operator.rows(x.view(1, *size))[:, 0], (matrix @ x)[u])


def test_equals_pymatting() -> None:
    """Labels of the converged solution, on the unknown pixels of a photo."""
    found = importlib.util.find_spec("pymatting")
    if found is None:
        pytest.skip('pymatting is not installed: pip install "pseudolabel[matting]"')
    # Its one file, since the import of the whole compiles for a minute when it is the first.
    path = Path(found.submodule_search_locations[0]) / "laplacian" / "cf_laplacian.py"
    spec = importlib.util.spec_from_file_location("cf_laplacian", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    import numpy as np
    from scipy.sparse.linalg import spsolve

    image, trimap = photo(60)
    matrix = module.cf_laplacian(np.ascontiguousarray(image[0].permute(1, 2, 0).numpy()), epsilon=1e-5)
    known = trimap.flatten().numpy() != 0.5
    u = np.flatnonzero(~known)
    rhs = -matrix[u][:, np.flatnonzero(known)] @ trimap.flatten().numpy()[known]
    expected = torch.from_numpy(spsolve(matrix[u][:, u].tocsc(), rhs))
    alpha = closed_form_matting(image, trimap, rtol=1e-7, clip=False).flatten()[torch.from_numpy(u)]
    assert len(u) > 2000
    assert ((alpha > 0.5) == (expected > 0.5)).double().mean() >= 0.999
    torch.testing.assert_close(alpha, expected, rtol=0, atol=1e-4)


# ------------------------------------------------------------------------------------------ mattes


@given(seed=seeds, classes=st.integers(1, 4), unknown=st.floats(0.1, 0.9))
def test_equals_the_dense_solution(seed: int, classes: int, unknown: float) -> None:
    image, trimap = case(seed, classes, (9, 8), unknown)
    expected = dense_mattes(levin(image[0], 1e-3), trimap[0])
    raw = closed_form_matting(image, trimap, eps=1e-3, clip=False, **EXACT)[0]
    torch.testing.assert_close(raw, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("preconditioner", ["v-cycle", "jacobi"])
@pytest.mark.parametrize("classes", [1, 2, 3])
def test_preconditioners_agree(preconditioner: str, classes: int) -> None:
    image, trimap = case(3, classes, (40, 50), 0.6)
    expected = dense_mattes(levin(image[0], 1e-4), trimap[0])
    raw, report = closed_form_matting(
        image, trimap, eps=1e-4, clip=False, preconditioner=preconditioner, return_report=True, **EXACT
    )
    torch.testing.assert_close(raw[0], expected, rtol=1e-5, atol=1e-7)
    assert report.converged.all()


def test_hand_computed() -> None:
    """An image without colour: each window wants its nine mattes equal, and the unknown are means."""
    image = torch.full((1, 3, 3, 3), 0.5, dtype=torch.float64)
    trimap = torch.tensor([[1.0, 1, 1], [0, 0.5, 0], [0, 0, 0]], dtype=torch.float64)[None, None]
    alpha = closed_form_matting(image, trimap, **EXACT)
    torch.testing.assert_close(alpha[0, 0, 1, 1], torch.tensor(3 / 8, dtype=torch.float64))
    assert torch.equal(alpha[trimap != 0.5], trimap[trimap != 0.5])


@given(seed=seeds, classes=st.integers(1, 4))
def test_mattes_and_background_sum_to_one(seed: int, classes: int) -> None:
    """With the background solved for as a class of its own, whose trimap is what the others leave."""
    image, trimap = case(seed, classes, (9, 8))
    background = (trimap == 0).all(1, keepdim=True).double()
    unknown = ((trimap != 1).all(1, keepdim=True)) & (background == 0)
    whole = torch.cat([trimap, background.masked_fill(unknown, 0.5)], 1)
    raw = closed_form_matting(image, whole, clip=False, **EXACT)
    torch.testing.assert_close(raw.sum(1), torch.ones_like(raw[:, 0]), rtol=0, atol=1e-7)
    torch.testing.assert_close(
        raw[:, :-1], closed_form_matting(image, trimap, clip=False, **EXACT), rtol=0, atol=1e-7
    )


@given(seed=seeds, classes=st.integers(1, 3))
def test_clipping(seed: int, classes: int) -> None:
    image, trimap = case(seed, classes, (9, 8))
    raw, alpha = (closed_form_matting(image, trimap, clip=clip, **EXACT) for clip in (False, True))
    assert alpha.min() >= 0
    assert alpha.sum(1).max() <= 1 + 1e-12
    mattes = torch.cat([raw, 1 - raw.sum(1, keepdim=True)], 1).clamp(min=0)
    torch.testing.assert_close(alpha, (mattes / mattes.sum(1, keepdim=True))[:, :-1])


def test_raw_mattes_leave_the_range() -> None:
    raw = closed_form_matting(*photo(48), clip=False)
    assert raw.min() < -0.01 or raw.max() > 1.01
    torch.testing.assert_close(closed_form_matting(*photo(48)), raw.clamp(0, 1))


@given(seed=seeds)
def test_mirrored_and_transposed(seed: int) -> None:
    image, trimap = case(seed, 2, (9, 8))
    alpha = closed_form_matting(image, trimap, **EXACT)
    for turn in (lambda x: x.flip(2), lambda x: x.flip(3), lambda x: x.mT):
        turned = closed_form_matting(turn(image), turn(trimap), **EXACT)
        torch.testing.assert_close(turned, turn(alpha), rtol=0, atol=1e-6)
    other = closed_form_matting(image.flip(1), trimap.flip(1), **EXACT)
    torch.testing.assert_close(other.flip(1), alpha, rtol=0, atol=1e-6)


def test_known_pixels_far_away_do_not_matter() -> None:
    image, trimap = case(size=(20, 20))
    trimap[..., 10:] = 0
    wide = closed_form_matting(image, trimap, **EXACT)
    torch.testing.assert_close(
        wide[..., :13], closed_form_matting(image[..., :13], trimap[..., :13], **EXACT)
    )


# -------------------------------------------------------------------- what is known, and degenerate


def test_absent_classes() -> None:
    """They are 0, and leave the others as they are."""
    image, trimap = case(classes=2)
    absent = torch.zeros_like(trimap[:, :1])
    alpha = closed_form_matting(image, torch.cat([absent, trimap[:, :1], absent, trimap[:, 1:], absent], 1))
    assert torch.equal(alpha[:, [1, 3]], closed_form_matting(image, trimap))
    assert alpha[:, [0, 2, 4]].eq(0).all()


def test_known_where_one_class_is_sure() -> None:
    """What the trimap of another class says there does not count."""
    image, trimap = case(classes=2)
    vague = trimap.clone()
    vague[:, 1][trimap[:, 0] == 1] = 0.5
    assert torch.equal(closed_form_matting(image, vague), closed_form_matting(image, trimap))


def test_classes_that_claim_a_pixel_share_it() -> None:
    image, trimap = case(classes=2)
    trimap[0, :, 0, 0] = 1
    assert closed_form_matting(image, trimap)[0, :, 0, 0].tolist() == [0.5, 0.5]


def test_soft_seeds() -> None:
    image, trimap = case()
    soft = trimap.clone()
    soft[trimap == 1], soft[trimap == 0] = 0.95, 0.03
    raw, alpha = (closed_form_matting(image, maps, clip=False, **EXACT) for maps in (trimap, soft))
    torch.testing.assert_close(alpha, 0.03 + 0.92 * raw, rtol=0, atol=1e-7)


def test_no_unknown_pixel() -> None:
    image, trimap = case(classes=2)
    known = trimap.where(trimap != 0.5, 0)
    alpha, report = closed_form_matting(image, known, return_report=True)
    assert torch.equal(alpha, known)
    assert report.iterations.tolist() == [0]
    assert report.residual.tolist() == [0]
    assert report.converged.tolist() == [True]


def test_no_class_at_all() -> None:
    image, trimap = case(classes=2)
    alpha, report = closed_form_matting(image, 0 * trimap, return_report=True)
    assert alpha.eq(0).all()
    assert report.converged.all()
    assert closed_form_matting(image, trimap[:, :0]).shape == (1, 0, 12, 10)


@pytest.mark.parametrize("classes", [1, 3])
def test_no_background(classes: int) -> None:
    """All seeds are of one class: so is everything."""
    image, _ = case()
    trimap = torch.full((1, classes, 12, 10), 0.5, dtype=torch.float64)
    trimap[:, :, :4, :5] = 0
    trimap[:, 0, :4, :5] = 1
    alpha, report = closed_form_matting(image, trimap, return_report=True)
    torch.testing.assert_close(alpha[:, 0], torch.ones(1, 12, 10).double())
    torch.testing.assert_close(alpha[:, 1:], torch.zeros(1, classes - 1, 12, 10).double())
    assert report.converged.all()
    assert report.iterations.eq(0).all()


def test_no_foreground() -> None:
    image, trimap = case()
    alpha, report = closed_form_matting(image, trimap.where(trimap != 1, 0), return_report=True)
    assert alpha.eq(0).all()
    assert report.converged.all()


@pytest.mark.parametrize(("classes", "share"), [(1, 1 / 2), (3, 1 / 4)])
def test_nothing_known(classes: int, share: float) -> None:
    image, _ = case()
    alpha, report = closed_form_matting(
        image, torch.full((1, classes, 12, 10), 0.5, dtype=torch.float64), return_report=True
    )
    assert alpha.eq(share).all()
    assert report.converged.all()


def test_one_seed() -> None:
    """The least that determines a solution."""
    image, trimap = case()
    trimap.fill_(0.5)
    trimap[..., 0, 0], trimap[..., -1, -1] = 1, 0
    alpha, report = closed_form_matting(image, trimap, return_report=True)
    assert alpha.isfinite().all()
    assert report.converged.all()
    assert alpha[..., 1, 1] > alpha[..., -2, -2]


def test_single_unknown_pixel_at_the_corner() -> None:
    image, trimap = case()
    trimap[trimap == 0.5] = 0
    trimap[..., -1, -1] = 0.5
    expected = dense_mattes(levin(image[0], 1e-5), trimap[0])
    torch.testing.assert_close(closed_form_matting(image, trimap, clip=False, **EXACT)[0], expected)


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_constant_image(value: float) -> None:
    _, trimap = case(classes=2)
    alpha, report = closed_form_matting(torch.full((1, 3, 12, 10), value), trimap.float(), return_report=True)
    assert alpha.isfinite().all()
    assert report.converged.all()
    expected = dense_mattes(levin(torch.full((3, 12, 10), value).double(), 1e-5), trimap[0])
    torch.testing.assert_close(alpha[0].double(), expected, rtol=0, atol=2e-3)


def test_empty_batch() -> None:
    image, trimap = case()
    alpha, report = closed_form_matting(image[:0], trimap[:0], return_report=True)
    assert alpha.shape == (0, 1, 12, 10)
    assert [len(part) for part in report] == [0, 0, 0]


def test_narrow_zones() -> None:
    """Those where no unknown pixel is more than 8 from every known one."""
    active = torch.zeros(40, 40, dtype=torch.bool)
    active[5:21, 5:35] = True
    assert is_narrow(active)
    active[5:22, 5:35] = True
    assert not is_narrow(active)
    strip = torch.zeros(40, 40, dtype=torch.bool)
    strip[:, :8] = True  # one-sided: beyond the border nothing is known
    assert is_narrow(strip)
    strip[:, 8] = True
    assert not is_narrow(strip)


@pytest.mark.parametrize(("zone", "one_step"), [(8, True), (30, False)])
def test_narrow_zones_take_one_step(zone: int, one_step: bool) -> None:
    """With Cholesky factors one step is all."""
    image, trimap = case(size=(40, 60))
    trimap.fill_(0)
    trimap[..., :20] = 1
    trimap[..., 20 : 20 + zone] = 0.5
    alpha, report = closed_form_matting(image, trimap, return_report=True)
    assert (report.iterations == 1) == one_step
    other = closed_form_matting(image, trimap, preconditioner="jacobi", **EXACT)
    torch.testing.assert_close(alpha, other, rtol=0, atol=1e-9 if one_step else 0.05)


def test_wider_zones_take_one_step_with_several_classes() -> None:
    """Classes share the Cholesky factors, which pay sooner."""
    image, trimap = case(classes=2, size=(40, 60))
    trimap.fill_(0)
    trimap[:, 0, :20, :20] = trimap[:, 1, 20:, :20] = 1
    trimap[..., 20:50] = 0.5
    alpha, report = closed_form_matting(image, trimap, return_report=True)
    assert report.iterations == 1
    other, report = closed_form_matting(image, trimap, preconditioner="jacobi", return_report=True, **EXACT)
    assert report.converged
    torch.testing.assert_close(alpha, other, rtol=0, atol=1e-9)


# ------------------------------------------------------------------- report, start, prior, gradients


def test_report() -> None:
    image, trimap = photo(48)
    alpha, report = closed_form_matting(image, trimap, clip=False, return_report=True)
    assert isinstance(report, MattingReport)
    assert report.converged.all()
    assert 0 < report.residual <= 1e-4
    u = (trimap == 0.5).flatten()
    matrix = levin(image[0], 1e-5)
    left = (matrix @ alpha.flatten())[u].norm()
    right = (matrix[u][:, ~u] @ trimap.flatten()[~u]).norm()
    torch.testing.assert_close(report.residual[0], left / right)
    assert torch.equal(closed_form_matting(image, trimap, clip=False), alpha)


def test_slow_convergence_is_told() -> None:
    image, trimap = photo(48)
    alpha, report = closed_form_matting(
        image, trimap, max_iter=2, preconditioner="jacobi", return_report=True
    )
    assert report.iterations == 2
    assert not report.converged
    assert report.residual > 1e-4
    assert alpha.isfinite().all()


def test_warm_start() -> None:
    image, trimap = photo()
    cold, first = closed_form_matting(image, trimap, clip=False, return_report=True)
    again, second = closed_form_matting(image, trimap, clip=False, x0=cold, return_report=True)
    assert first.iterations > 3
    assert second.iterations == 0
    torch.testing.assert_close(again, cold)
    other = (image + 0.01 * torch.rand(image.shape)).clamp(0, 1)
    _, third = closed_form_matting(other, trimap, x0=cold, return_report=True)
    assert third.iterations < first.iterations


def test_labels_at_the_default_tolerance() -> None:
    image, trimap = photo()
    unknown = trimap == 0.5
    converged, report = closed_form_matting(image, trimap, rtol=1e-9, return_report=True)
    assert report.converged.all()
    for preconditioner in ("v-cycle", "jacobi"):
        alpha = closed_form_matting(image, trimap, preconditioner=preconditioner, max_iter=2000)
        assert ((alpha > 0.5) == (converged > 0.5))[unknown].double().mean() >= 0.995


@given(seed=seeds, classes=st.integers(1, 3), weight=st.floats(1e-4, 10))
def test_prior(seed: int, classes: int, weight: float) -> None:
    image, trimap = case(seed, classes, (9, 8))
    prior = smooth(seed + 2, classes + 1, (9, 8)).softmax(0)[None, 1:]
    raw = closed_form_matting(image, trimap, prior=prior, prior_weight=weight, clip=False, **EXACT)
    expected = dense_mattes(levin(image[0], 1e-5), trimap[0], prior[0], weight)
    torch.testing.assert_close(raw[0], expected, rtol=0, atol=1e-6)


def test_prior_with_a_map_of_weights() -> None:
    image, trimap = case(classes=2)
    prior, weight = smooth(5, 3, (12, 10)).softmax(0)[None, 1:], smooth(6, 1, (12, 10))
    raw = closed_form_matting(image, trimap, prior=prior, prior_weight=weight, clip=False, **EXACT)
    expected = dense_mattes(levin(image[0], 1e-5), trimap[0], prior[0], weight[0])
    torch.testing.assert_close(raw[0], expected, rtol=0, atol=1e-7)


def test_prior_at_the_limits() -> None:
    image, trimap = case(classes=2)
    prior = smooth(5, 3, (12, 10)).softmax(0)[None, 1:]
    plain = closed_form_matting(image, trimap, **EXACT)
    none = closed_form_matting(image, trimap, prior=prior, prior_weight=0.0, **EXACT)
    torch.testing.assert_close(none, plain, rtol=0, atol=1e-7)
    all_of_it = closed_form_matting(image, trimap, prior=prior, prior_weight=1e9, **EXACT)
    unknown = trimap == 0.5
    torch.testing.assert_close(all_of_it[unknown], prior[unknown], rtol=0, atol=1e-6)
    assert torch.equal(all_of_it[~unknown], trimap[~unknown])
    too_much = closed_form_matting(image, trimap, prior=torch.ones_like(prior), prior_weight=1e9, **EXACT)
    torch.testing.assert_close(too_much[unknown], torch.full_like(too_much[unknown], 0.5), rtol=0, atol=1e-6)


def test_prior_instead_of_seeds() -> None:
    """With a prior nothing need be known."""
    image, _ = case()
    prior = smooth(5, 1, (12, 10))[None]
    trimap = torch.full_like(prior, 0.5)
    alpha, report = closed_form_matting(image, trimap, prior=prior, prior_weight=0.1, return_report=True)
    assert report.converged.all()
    assert alpha.isfinite().all()
    assert alpha.std() > 0
    constant = closed_form_matting(image, trimap, prior=torch.full_like(prior, 0.3))
    torch.testing.assert_close(constant, torch.full_like(prior, 0.3))


@pytest.mark.parametrize("classes", [1, 2])
def test_gradcheck(classes: int) -> None:
    """To the image, to the seeds, to the prior and to its confidence, on 8 x 8 pixels."""
    image, trimap = case(1, classes, (8, 8))
    soft = trimap.where(trimap == 0.5, 0.02 + 0.94 * trimap)  # seeds that may move either way
    prior, weight = smooth(5, classes + 1, (8, 8)).softmax(0)[None, 1:], smooth(6, 1, (8, 8)) + 0.1
    image = 0.1 + 0.8 * image

    def call(image: Tensor, trimap: Tensor, prior: Tensor, weight: Tensor) -> Tensor:
        return closed_form_matting(
            image, trimap, eps=1e-2, prior=prior, prior_weight=weight, rtol=1e-13, max_iter=500, clip=False
        )

    arguments = [each.requires_grad_() for each in (image, soft, prior, weight)]
    assert torch.autograd.gradcheck(call, arguments, fast_mode=True)


def test_gradients_equal_the_dense_ones() -> None:
    image, trimap = case(1, 2, (8, 8))
    prior, weight = smooth(5, 3, (8, 8)).softmax(0)[None, 1:], smooth(6, 1, (8, 8)) + 0.1
    arguments = [each.requires_grad_() for each in (image, trimap, prior, weight)]
    direction = torch.randn(2, 8, 8, dtype=torch.float64)
    raw = closed_form_matting(image, trimap, eps=1e-3, prior=prior, prior_weight=weight, clip=False, **EXACT)
    ours = torch.autograd.grad((raw[0] * direction).sum(), arguments)
    expected = dense_mattes(levin(image[0], 1e-3), trimap[0], prior[0], weight[0])
    theirs = torch.autograd.grad((expected * direction).sum(), arguments)
    ones = (trimap == 1).double()  # seeds of 0 count too, which the dense solution leaves out
    for name, one, other in zip(("image", "trimap", "prior", "weight"), ours, theirs, strict=True):
        assert other.abs().max() > 0, name
        some = ones if name == "trimap" else torch.ones_like(one)
        torch.testing.assert_close(
            one * some, other * some, rtol=1e-5, atol=1e-7, msg=lambda t, n=name: f"{n}: {t}"
        )


def test_no_graph_where_none_is_asked_for() -> None:
    image, trimap = case()
    assert not closed_form_matting(image, trimap).requires_grad
    with torch.no_grad():
        assert not closed_form_matting(image.requires_grad_(), trimap).requires_grad
    with torch.inference_mode():
        closed_form_matting(image.detach(), trimap)


# ---------------------------------------------------------------------------------- batch and dtypes


def test_batch_equals_singles() -> None:
    images, trimaps = zip(*(case(seed, 3) for seed in range(3)), strict=True)
    trimaps[1][:, 0] = 0  # absent there
    trimaps[2][trimaps[2] == 0.5] = 0  # nothing to do
    alpha, report = closed_form_matting(torch.cat(images), torch.cat(trimaps), return_report=True)
    for number in range(3):
        alone, its = closed_form_matting(images[number], trimaps[number], return_report=True)
        assert torch.equal(alpha[number], alone[0])
        assert [part[number] for part in report] == [part[0] for part in its]
    assert report.iterations[2] == 0


def test_single_and_double_precision_agree() -> None:
    image, trimap = photo()
    double = closed_form_matting(image, trimap, rtol=1e-6)
    single, report = closed_form_matting(image.float(), trimap.float(), rtol=1e-5, return_report=True)
    assert report.converged.all()
    assert ((single > 0.5) == (double > 0.5))[trimap == 0.5].double().mean() >= 0.995
    torch.testing.assert_close(single.double(), double, rtol=0, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    image, trimap = case(classes=2)
    alpha, report = closed_form_matting(image.to(dtype), trimap.to(dtype), return_report=True)
    assert alpha.dtype == dtype
    assert report.residual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact = closed_form_matting(image.to(dtype).double(), trimap, rtol=1e-6)
    torch.testing.assert_close(alpha.double(), exact, rtol=0, atol=1e-2)
    assert closed_form_matting(image.double(), trimap.to(dtype)).dtype == dtype


def test_under_autocast() -> None:
    image, trimap = (each.float() for each in case(classes=2))
    with torch.autocast("cpu", torch.bfloat16):
        alpha = closed_form_matting(image, trimap)
    assert torch.equal(alpha, closed_form_matting(image, trimap))


def test_without_mkl(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where PyTorch cannot multiply a sparse matrix and a vector, a matrix of one column takes its place."""
    image, trimap = photo(48)
    expected = closed_form_matting(image, trimap)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    monkeypatch.setattr(torch, "addmv", None)
    torch.testing.assert_close(closed_form_matting(image, trimap), expected)


def test_inputs_stay_as_they_are() -> None:
    image, trimap = case(classes=2)
    prior = trimap / 2
    given_ = [each.clone() for each in (image, trimap, prior)]
    closed_form_matting(image, trimap, prior=prior, x0=prior)
    assert all(torch.equal(now, then) for now, then in zip((image, trimap, prior), given_, strict=True))


def test_devices(device: torch.device) -> None:
    image, trimap = (each.float() for each in photo(48))
    trimap = torch.cat([trimap, trimap.flip(3)], 1).where(trimap == 0.5, trimap)
    alpha, report = closed_form_matting(image.to(device), trimap.to(device), rtol=1e-5, return_report=True)
    assert alpha.device.type == device.type
    assert all(part.device.type == device.type for part in report)
    expected = closed_form_matting(image, trimap, rtol=1e-5)
    torch.testing.assert_close(alpha.cpu(), expected, rtol=0, atol=5e-3)


# ------------------------------------------------------------------------------------------- energy


@given(seed=seeds, eps=st.sampled_from([1e-5, 1e-2]))
def test_energy(seed: int, eps: float) -> None:
    images = torch.stack([smooth(seed + number, 3, (6, 7)) for number in range(2)])
    alpha = torch.stack([smooth(seed + number, 4, (6, 7)) for number in (5, 9)])
    energy = matting_energy(alpha, images, eps=eps)
    for number in range(2):
        x = alpha[number].flatten(1)
        expected = torch.einsum("ci,ij,cj->c", x, levin(images[number], eps), x)
        torch.testing.assert_close(energy[number], expected)


def test_energy_of_what_the_colours_tell() -> None:
    image, _ = (each.float() for each in case(size=(20, 30)))
    told = 0.2 + 0.3 * image[:, :1] - 0.1 * image[:, 2:]
    assert matting_energy(torch.full_like(told, 0.7), image) <= 1e-6
    assert matting_energy(told, image) < 1e-2 * matting_energy(torch.rand_like(told), image)


def test_energy_gradients_and_dtypes() -> None:
    image, _ = case(size=(5, 6))
    alpha = torch.rand(1, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    call = lambda a, i: matting_energy(a, i, eps=1e-3)  # noqa: E731
    assert torch.autograd.gradcheck(call, (alpha, (0.1 + 0.8 * image).requires_grad_()), fast_mode=True)
    for dtype, out in ((torch.float16, torch.float32), (torch.float32, torch.float32), (torch.float64,) * 2):
        energy = matting_energy(alpha.detach().to(dtype), image.to(dtype))
        assert energy.dtype == out
        torch.testing.assert_close(energy.double(), matting_energy(alpha, image), rtol=0.02, atol=1e-2)


# ------------------------------------------------------------------------------------------- errors

IMAGE, TRIMAP = torch.rand(1, 3, 6, 7), torch.full((1, 2, 6, 7), 0.5)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: closed_form_matting(IMAGE[0], TRIMAP), ValueError, r"image: expected shape \(B, 3, H, W\)"),
        (lambda: closed_form_matting(IMAGE, TRIMAP[..., 1:]), ValueError, "trimap: .* with W=7 from image"),
        (lambda: closed_form_matting(IMAGE.long(), TRIMAP), TypeError, "image: expected a floating-point"),
        (lambda: closed_form_matting(IMAGE, TRIMAP > 0), TypeError, "trimap: expected a floating-point"),
        (lambda: closed_form_matting(255 * IMAGE, TRIMAP), ValueError, r"image: .*divide 8-bit values"),
        (
            lambda: closed_form_matting(IMAGE, 2 * TRIMAP + 0.5),
            ValueError,
            r"trimap: expected values in \[0, 1\]",
        ),
        (lambda: closed_form_matting(IMAGE, TRIMAP / 0), ValueError, r"trimap: expected values in \[0, 1\]"),
        (
            lambda: closed_form_matting(IMAGE[..., :2], TRIMAP[..., :2]),
            ValueError,
            r"image: expected at least 3 pixels a side, got \(1, 3, 6, 2\)",
        ),
        (lambda: closed_form_matting(IMAGE, TRIMAP, eps=0), ValueError, "eps: expected a finite number > 0"),
        (
            lambda: closed_form_matting(IMAGE, TRIMAP, rtol=0),
            ValueError,
            "rtol: expected a finite number > 0",
        ),
        (
            lambda: closed_form_matting(IMAGE, TRIMAP, max_iter=0),
            ValueError,
            "max_iter: expected an integer >= 1",
        ),
        (
            lambda: closed_form_matting(IMAGE, TRIMAP, preconditioner="ilu"),
            ValueError,
            r"preconditioner: expected one of \['v-cycle', 'jacobi'\], got 'ilu'",
        ),
        (lambda: closed_form_matting(IMAGE, TRIMAP, prior=TRIMAP[:, :1]), ValueError, "prior: .* with C=2"),
        (
            lambda: closed_form_matting(IMAGE, TRIMAP, prior=3 * TRIMAP),
            ValueError,
            "prior: expected values in",
        ),
        (
            lambda: closed_form_matting(IMAGE, TRIMAP, prior=TRIMAP, prior_weight=-1.0),
            ValueError,
            "prior_weight: expected a finite number >= 0",
        ),
        (
            lambda: closed_form_matting(IMAGE, TRIMAP, prior=TRIMAP, prior_weight=TRIMAP),
            ValueError,
            r"prior_weight: expected shape \(B, H, W\)",
        ),
        (
            lambda: closed_form_matting(IMAGE, TRIMAP, prior=TRIMAP, prior_weight=-TRIMAP[:, 0]),
            ValueError,
            "prior_weight: expected values >= 0, got -0.5",
        ),
        (lambda: closed_form_matting(IMAGE, TRIMAP, x0=TRIMAP[..., 1:]), ValueError, "x0: .* with W=7"),
        (lambda: closed_form_matting(IMAGE, TRIMAP, x0=TRIMAP / 0), ValueError, "x0: expected finite values"),
        (lambda: matting_energy(TRIMAP, IMAGE[..., 1:]), ValueError, "image: .* with W=7 from alpha"),
        (lambda: matting_energy(TRIMAP.long(), IMAGE), TypeError, "alpha: expected a floating-point"),
        (lambda: matting_energy(TRIMAP / 0, IMAGE), ValueError, "alpha: expected finite values"),
        (lambda: matting_energy(TRIMAP, IMAGE, eps=-1), ValueError, "eps: expected a finite number > 0"),
        (lambda: matting_energy(TRIMAP[..., :2], IMAGE[..., :2]), ValueError, "image: expected at least 3"),
    ],
)
def test_errors(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(("images", "classes"), [(2, 0), (0, 2), (0, 0)])
def test_energy_of_nothing(images: int, classes: int) -> None:
    alpha = torch.rand(images, classes, 4, 4, requires_grad=True)
    energy = matting_energy(alpha, torch.rand(images, 3, 4, 4))
    assert energy.shape == (images, classes)
    energy.sum().backward()
