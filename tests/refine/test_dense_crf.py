"""Dense CRF: parity with the C++ program, properties of the model, edge cases and errors."""

import builtins
import importlib
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pseudolabel.refine import CRF_PRESETS, DenseCRF, dense_crf, probs_from_mask

module = importlib.import_module("pseudolabel.refine.dense_crf")


def to_image(photo: np.ndarray, device: torch.device | str = "cpu") -> torch.Tensor:
    return torch.from_numpy(photo).permute(2, 0, 1)[None].float().div(255).to(device)


def assert_same_marginals(actual: torch.Tensor, expected: np.ndarray) -> None:
    """Labels on the axis before the last two. The tolerance that the C++ program itself allows."""
    found = actual.cpu().numpy()
    gap = np.abs(found - expected)
    assert gap.max() <= 2e-3
    assert np.quantile(gap, 0.999) <= 1e-4
    ordered = np.sort(expected, -3)
    decided = ordered[..., -1, :, :] - ordered[..., -2, :, :] > 4e-3
    assert bool((found.argmax(-3) == expected.argmax(-3))[decided].all())


def random_case(generator, labels=3, size=(9, 13), images=1):
    image = torch.rand(images, 3, *size, generator=generator)
    probs = torch.rand(images, labels, *size, generator=generator)
    return image, probs / probs.sum(1, keepdim=True)


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5])
def test_golden_crf(golden, device, number):
    case = golden(f"crf/public_{number}")
    probs = torch.from_numpy(np.exp(-case["unary"]))[None].to(device)
    refined = dense_crf(
        to_image(case["image"], device),
        probs,
        gaussian=(float(case["gauss_sxy"]), float(case["gauss_compat"])),
        bilateral=(float(case["bil_sxy"]), float(case["bil_srgb"]), float(case["bil_compat"])),
        iterations=int(case["iterations"]),
    )
    assert_same_marginals(refined[0], case["prob"])


@pytest.mark.parametrize("case", [0, 1, 2])
def test_golden_pmm(golden, device, case):
    data = {key[3:]: value for key, value in golden("pmm/public_crf").items() if key.startswith(f"c{case}_")}
    image = to_image(data["img"], device)
    probs = torch.from_numpy(data["probs"])[None].to(device)
    pmm = CRF_PRESETS["pmm"]
    assert_same_marginals(dense_crf(image, probs, **pmm)[0], data["refine_t10"])
    assert_same_marginals(dense_crf(image, probs, **{**pmm, "iterations": 1})[0], data["refine_t1"])
    assert_same_marginals(dense_crf(image, probs, **CRF_PRESETS["psa"])[0], data["imutils_t10"])
    softmax = torch.from_numpy(data["softmax"])[None].to(device)
    assert_same_marginals(dense_crf(image, softmax, **CRF_PRESETS["deeplab"])[0], data["seg_densecrf"])


def test_golden_binary_problems_share_a_lattice(golden, device):
    data = golden("pmm/public_ppmg_dense")
    checked = 0
    for case in range(int(data["n_cases"])):
        problems = torch.from_numpy(data[f"c{case}_crf_in"])[None].to(device)
        if problems.shape[1] == 0:
            continue
        refined = dense_crf(to_image(data[f"c{case}_img"], device), problems, **CRF_PRESETS["pmm"])
        assert_same_marginals(refined[0], data[f"c{case}_crf_out"])
        checked += problems.shape[1]
    assert checked >= 10


def test_iteration_by_hand():
    """Two far pixels of one colour, bilateral only, so wide that all pairs have weight 1: K' = 1/2.

    With Q = (0.8, 0.2) and (0.4, 0.6), K'Q = (0.6, 0.4) for both, and one update multiplies by exp(2 K'Q).
    """
    image = torch.full((1, 3, 1, 2), 0.5)
    probs = torch.tensor([[[[0.8, 0.4]], [[0.2, 0.6]]]])
    refined = dense_crf(image, probs, gaussian=None, bilateral=(1e4, 1e4, 2.0), iterations=1)
    odds = torch.tensor([0.8 / 0.2, 0.4 / 0.6]) * torch.tensor(2 * 0.2).exp()
    torch.testing.assert_close(refined[0, 0, 0], odds / (1 + odds), rtol=1e-3, atol=1e-3)
    # The same with an unlikely third label: the path of many labels.
    more = torch.cat([probs, torch.zeros(1, 1, 1, 2)], 1)
    three = dense_crf(image, more, gaussian=None, bilateral=(1e4, 1e4, 2.0), iterations=1)
    torch.testing.assert_close(three[:, :2], refined, rtol=1e-3, atol=1e-3)


@given(labels=st.integers(2, 6), height=st.integers(1, 9), width=st.integers(1, 9), seed=st.integers(0, 999))
def test_is_a_distribution_and_permutes_with_the_labels(labels, height, width, seed):
    generator = torch.Generator().manual_seed(seed)
    image, probs = random_case(generator, labels, (height, width))
    refined = dense_crf(image, probs, iterations=3)
    torch.testing.assert_close(refined.sum(1), torch.ones(1, height, width))
    assert float(refined.min()) >= 0
    order = torch.randperm(labels, generator=generator)
    torch.testing.assert_close(
        dense_crf(image, probs[:, order], iterations=3), refined[:, order], rtol=1e-3, atol=1e-5
    )


def test_two_labels_equal_two_of_three(generator):
    """A third label that is out of the question leaves the others as they were."""
    image, probs = random_case(generator, 2)
    third = torch.cat([probs, torch.zeros_like(probs[:, :1])], 1)
    two, three = dense_crf(image, probs), dense_crf(image, third)
    torch.testing.assert_close(three[:, :2], two, rtol=0, atol=2e-3)


def test_follows_the_edge_of_the_image(generator):
    image = torch.zeros(1, 3, 20, 30)
    image[..., 15:] = 1
    right = (image[:, 0] == 1).float()
    noisy = (0.3 + 0.4 * right + 0.5 * (torch.rand(1, 20, 30, generator=generator) - 0.5)).clamp(0, 1)
    probs = torch.stack([1 - noisy, noisy], 1)
    assert not torch.equal(probs.argmax(1), right.long())
    for preset in CRF_PRESETS.values():
        assert torch.equal(dense_crf(image, probs, **preset).argmax(1), right.long())


def test_batch_equals_singles(generator, device):
    image, probs = random_case(generator, 3, images=3)
    image, probs = image.to(device), probs.to(device)
    together = dense_crf(image, probs)
    for index in range(3):
        alone = dense_crf(image[index : index + 1], probs[index : index + 1])
        torch.testing.assert_close(together[index : index + 1], alone, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("labels", [2, 4])
def test_batch_in_one_lattice_equals_singles(generator, labels):
    """What devices other than the CPU do."""
    image, probs = random_case(generator, labels, images=3)
    problems = torch.stack([probs, probs.flip(1)], 1)
    pixels = (image * 255).round()
    settings = ((3.0, 3.0), (20.0, 13.0, 10.0), 4)
    together = module._mean_field(pixels, problems, *settings)
    for index in range(3):
        part = slice(index, index + 1)
        alone = module._mean_field(pixels[part], problems[part], *settings)
        torch.testing.assert_close(together[part], alone, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("labels", [1, 2, 3])
def test_problems_equal_single_calls(generator, labels):
    image, first = random_case(generator, labels, images=2)
    second = torch.rand(first.shape, generator=generator)  # need not sum to 1
    together = dense_crf(image, torch.stack([first, second], 1))
    assert together.shape == (2, 2, labels, 9, 13)
    for problem, probs in enumerate((first, second)):
        torch.testing.assert_close(together[:, problem], dense_crf(image, probs), rtol=1e-4, atol=1e-5)


def test_module_equals_function(generator):
    image, probs = random_case(generator)
    settings = {"gaussian": (1.0, 3.0), "bilateral": (67.0, 3.0, 4.0), "iterations": 2}
    refiner = DenseCRF(**settings)
    assert torch.equal(refiner(image, probs), dense_crf(image, probs, **settings))
    assert torch.equal(partial(dense_crf, **settings)(image, probs), refiner(image, probs))
    assert repr(refiner) == (
        "DenseCRF(gaussian=(1.0, 3.0), bilateral=(67.0, 3.0, 4.0), iterations=2, backend='torch')"
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_are_computed_in_float32(generator, device, dtype):
    image, probs = random_case(generator)
    image, probs = image.to(device), probs.to(device, dtype)
    refined = dense_crf(image, probs)
    assert (refined.dtype, refined.device, refined.shape) == (dtype, probs.device, probs.shape)
    assert torch.equal(refined, dense_crf(image, probs.float()).to(dtype))


def test_surroundings_do_not_change_the_dtype(generator):
    image, probs = random_case(generator)
    expected = dense_crf(image, probs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(dense_crf(image, probs), expected)
    module._kept.clear()
    try:
        torch.set_default_dtype(torch.float64)
        assert torch.equal(dense_crf(image, probs), expected)
        assert probs_from_mask(torch.zeros(1, 2, 2, dtype=torch.long), 2).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_image_is_rounded_to_8_bits(generator):
    image, probs = random_case(generator)
    levels = (image * 255).round()
    nearby = (levels + 0.4) / 255
    assert torch.equal(dense_crf(levels / 255, probs), dense_crf(nearby.clamp(max=1), probs))
    assert not torch.equal(dense_crf(levels / 255, probs), dense_crf((levels * 0.9) / 255, probs))


def test_narrow_image_is_named(generator, device):
    """12-bit data divided by 65535: the warning says which image, and what it spans."""
    image, probs = random_case(generator, images=3)
    image[1:] *= 4095 / 65535
    image, probs = image.to(device), probs.to(device)
    low, high = float(image[1].min()), float(image[1].max())
    expected = rf"^image: image 1 of the batch spans only {low:g} to {high:g} of .*, as do 1 more, .* by 4095"
    with pytest.warns(UserWarning, match=expected) as caught:
        dense_crf(image, probs, iterations=1)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match=r"image 0 of the batch spans only \S+ to \S+ of \[0, 1\], so"):
        DenseCRF(iterations=1)(image[2:], probs[2:])


@pytest.mark.parametrize(("span", "narrow"), [(0.0, False), (31 / 256, True), (32 / 256, False)])
def test_what_is_narrow(span, narrow):
    image = torch.full((1, 3, 4, 5), 0.5)
    image[0, 1, 2, 3] += span
    arguments = (image, torch.full((1, 2, 4, 5), 0.5))
    if narrow:
        with pytest.warns(UserWarning, match="image 0 of the batch spans only 0.5 to 0.621094"):
            dense_crf(*arguments)
    else:
        dense_crf(*arguments)
    dense_crf(*arguments, bilateral=None)  # its colours are not looked at


@pytest.mark.parametrize(
    ("switch", "value"),
    [("pseudolabel._checks._VALUES", False), ("torch.compiler.is_compiling", lambda: True)],
)
def test_unchecked_images_are_not_looked_at(monkeypatch, switch, value):
    monkeypatch.setattr(switch, value)
    image = torch.full((1, 3, 4, 5), 0.5)
    image[0, 0, 0, 0] = 0.51
    dense_crf(image, torch.full((1, 2, 4, 5), 0.5))


def test_values_of_the_image_are_read_once(monkeypatch):
    """One pass over the pixels serves the range and the warning."""
    seen = []
    aminmax = torch.aminmax
    monkeypatch.setattr(
        torch, "aminmax", lambda value, **named: seen.append(value) or aminmax(value, **named)
    )
    image, probs = torch.rand(2, 3, 4, 5), torch.full((2, 2, 4, 5), 0.5)
    dense_crf(image, probs, iterations=0)
    assert sum(value.numel() for value in seen if value.shape[-3:] == (3, 4, 5)) == image.numel()


@pytest.mark.parametrize("index", [0, 1])
def test_bad_image_among_good_ones(index):
    image = torch.rand(2, 3, 4, 5)
    image[index, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="image: expected values in"):
        dense_crf(image, torch.full((2, 2, 4, 5), 0.5))


def test_leaves_arguments_gradients_and_threads_alone(generator):
    image, probs = random_case(generator)
    copies, threads = (image.clone(), probs.clone()), torch.get_num_threads()
    refined = dense_crf(image, probs.requires_grad_())
    assert not refined.requires_grad
    assert torch.equal(image, copies[0])
    assert torch.equal(probs.detach(), copies[1])
    assert torch.get_num_threads() == threads
    with torch.inference_mode():  # the lattice that is kept serves both
        module._kept.clear()
        dense_crf(image, probs)
    assert torch.equal(dense_crf(image, probs), refined)


def test_non_contiguous_arguments(generator):
    image, probs = random_case(generator)
    expected = dense_crf(image, probs)
    channels_last = probs.to(memory_format=torch.channels_last)
    assert torch.equal(
        dense_crf(image.permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1), channels_last), expected
    )
    assert torch.equal(dense_crf(image, probs.repeat(1, 1, 1, 2)[..., :13]), expected)


def test_without_kernels_or_iterations_the_maps_are_normalised(generator):
    image, _ = random_case(generator)
    probs = torch.rand(1, 3, 9, 13, generator=generator)
    probs[0, :, 0, 0] = 0
    clipped = probs.clamp(1e-5, 1)
    expected = clipped / clipped.sum(1, keepdim=True)
    torch.testing.assert_close(dense_crf(image, probs, iterations=0), expected)
    torch.testing.assert_close(dense_crf(image, probs, gaussian=None, bilateral=None), expected)
    torch.testing.assert_close(
        dense_crf(image, probs[:, :2], iterations=0), clipped[:, :2] / clipped[:, :2].sum(1, keepdim=True)
    )


def test_one_kernel_alone(generator):
    image, probs = random_case(generator)
    both = dense_crf(image, probs)
    spatial, colour = dense_crf(image, probs, bilateral=None), dense_crf(image, probs, gaussian=None)
    assert not torch.allclose(spatial, colour)
    assert not torch.allclose(spatial, both)
    assert torch.equal(dense_crf(image.flip(1), probs, bilateral=None), spatial)


def test_large_compat_does_not_overflow(generator):
    image, probs = random_case(generator)
    refined = dense_crf(image, probs, gaussian=(3.0, 500.0), bilateral=(80.0, 13.0, 900.0))
    assert bool(torch.isfinite(refined).all())
    torch.testing.assert_close(refined.sum(1), torch.ones(1, 9, 13))


def test_row_maximum_changes_nothing(generator):
    logits = torch.randn(8, 6, generator=generator)
    expected = (logits.view(8, 2, 3) * np.log(2)).softmax(2).view(8, 6)
    torch.testing.assert_close(module._softmax2_(logits.clone(), 3, bounded=True), expected)
    torch.testing.assert_close(
        module._softmax2_(logits.clone() + 500, 3, bounded=False), expected, rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("labels", [1, 2, 3])
def test_single_pixel(labels):
    image = torch.tensor([0.0, 0.5, 1.0]).view(1, 3, 1, 1)
    refined = dense_crf(image, torch.full((1, labels, 1, 1), 0.5))
    torch.testing.assert_close(refined, torch.full((1, labels, 1, 1), 1 / labels))


def test_one_label_is_certain(generator):
    image, _ = random_case(generator)
    assert torch.equal(
        dense_crf(image, torch.rand(1, 1, 9, 13, generator=generator)), torch.ones(1, 1, 9, 13)
    )


@pytest.mark.parametrize("shape", [(0, 2, 4, 4), (1, 0, 2, 4, 4)])
def test_nothing_to_do(shape):
    assert dense_crf(torch.rand(shape[0], 3, 4, 4), torch.zeros(shape)).shape == shape


@pytest.fixture
def built(monkeypatch):
    """Sizes of the lattices of positions that are built from now on."""
    module._kept.clear()
    sizes, build = [], module._new_spatial_filter

    def count(*size):
        sizes.append(size)
        return build(*size)

    monkeypatch.setattr(module, "_new_spatial_filter", count)
    yield sizes
    module._kept.clear()


def kept_widths() -> list[int]:
    return [size[2] for size in module._kept]


def test_gaussian_lattice_is_kept(generator, built):
    image, probs = random_case(generator)
    for _ in range(3):
        dense_crf(image, probs)
    assert built == [(1, 9, 13, 3.0, image.device)]
    for width in (5, 6, 7, 13, 8):
        dense_crf(image[..., :width], probs[..., :width])
    assert kept_widths() == [6, 7, 13, 8]  # the four last used
    assert len(built) == 5


@pytest.mark.parametrize("sxy", [0.1, 1.0, 3.0, 80.0])
def test_bytes_of_a_lattice(sxy):
    """It counts all that it holds; what blurs share, more than once."""
    kernel = module._new_spatial_filter(1, 60, 80, sxy, torch.device("cpu"))
    matrices = (kernel._slice, kernel._splat, *kernel._blurs)
    parts = [part for rows in matrices for part in vars(rows).values() if isinstance(part, torch.Tensor)]
    memory = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in parts}
    assert len(parts) == 15
    assert sum(memory.values()) <= kernel.nbytes <= 320 * 60 * 80
    assert kernel.nbytes <= 1.3 * sum(memory.values())


def test_lattices_that_are_kept_are_bounded_in_bytes(generator, built, monkeypatch):
    image, probs = random_case(generator, size=(9, 40))
    sizes = [module._new_spatial_filter(1, 9, width, 3.0, image.device).nbytes for width in (6, 7, 20)]
    monkeypatch.setattr(module, "_MOST_BYTES_KEPT", sum(sizes))
    for width in (5, 6, 20):
        dense_crf(image[..., :width], probs[..., :width])
    assert kept_widths() == [5, 6, 20]
    dense_crf(image[..., :7], probs[..., :7])
    assert kept_widths() == [6, 20, 7]
    expected = dense_crf(image, probs, gaussian=(0.5, 3.0))  # too large alone, which costs the others nothing
    assert kept_widths() == [6, 20, 7]
    module._kept.clear()
    monkeypatch.undo()
    assert torch.equal(dense_crf(image, probs, gaussian=(0.5, 3.0)), expected)


def test_a_photo_of_a_camera_leaves_no_lattice(built, monkeypatch):
    """12 million pixels: by the bytes that a pixel takes, and without building it."""

    class Large:
        nbytes = 61 * 3000 * 4000

    monkeypatch.setattr(module, "_new_spatial_filter", lambda *_: Large())
    assert isinstance(module._spatial_filter(1, 3000, 4000, 3.0, torch.device("cpu")), Large)
    assert not module._kept


def test_errors_leave_no_lattice(generator, built, monkeypatch):
    image, probs = random_case(generator)
    expected = dense_crf(image, probs)
    module._kept.clear()
    with monkeypatch.context() as patch:
        patch.setattr(module, "PermutohedralFilter", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            dense_crf(image, probs)
    assert not module._kept
    assert torch.equal(dense_crf(image, probs), expected)


def test_lattices_in_threads(generator):
    """Threads that come upon new sizes together, and push out one another's."""
    cases = [random_case(generator, size=(7, width)) for width in range(4, 12)]
    expected = [dense_crf(*case) for case in cases]
    module._kept.clear()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda case: dense_crf(*case), cases * 15))
    finally:
        sys.setswitchinterval(interval)
    assert all(map(torch.equal, found, expected * 15))
    assert len(module._kept) <= 4


def test_presets_are_read_only():
    assert set(CRF_PRESETS) == {"psa", "irn_label", "deeplab", "pmm"}
    assert CRF_PRESETS["irn_label"] == {
        "gaussian": (3.0, 3.0),
        "bilateral": (50.0, 5.0, 10.0),
        "iterations": 10,
    }
    with pytest.raises(TypeError, match="does not support item assignment"):
        CRF_PRESETS["mine"] = CRF_PRESETS["psa"]


def test_probs_from_mask(device):
    mask = torch.tensor([[[0, 2], [255, 1]]], device=device)
    probs = probs_from_mask(mask, 3, confidence=0.8)
    assert probs.shape == (1, 3, 2, 2)
    expected = torch.tensor([[0.8, 0.1, 1 / 3, 0.1], [0.1, 0.1, 1 / 3, 0.8], [0.1, 0.8, 1 / 3, 0.1]])
    torch.testing.assert_close(probs[0].flatten(1).cpu(), expected)
    assert torch.equal(probs.sum(1), torch.ones_like(probs[:, 0])) or torch.allclose(
        probs.sum(1), torch.ones_like(probs[:, 0])
    )


def test_probs_from_mask_restores_noisy_labels(generator):
    image = torch.zeros(1, 3, 16, 24)
    image[..., 12:] = 1
    truth = (image[:, 0] == 1).long()
    noise = torch.rand(truth.shape, generator=generator)
    mask = torch.where(noise < 0.1, 1 - truth, truth).masked_fill(noise > 0.9, 255)
    refined = dense_crf(image, probs_from_mask(mask, 2), **CRF_PRESETS["irn_label"])
    assert torch.equal(refined.argmax(1), truth)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_classes": 1}, ValueError, "num_classes: expected a finite number >= 2, got 1"),
        ({"confidence": 1.0}, ValueError, "confidence: expected"),
        ({"confidence": 0.0}, ValueError, "confidence: expected"),
        ({"mask": torch.tensor([[[0, 7]]])}, ValueError, r"mask: expected labels 0 to 2 or 255, got \[7\]"),
        ({"mask": torch.tensor([[[0, -1]]])}, ValueError, r"mask: expected labels 0 to 2 or 255, got \[-1\]"),
        ({"mask": torch.zeros(1, 2, 2)}, TypeError, "mask: expected an integer tensor"),
        ({"mask": torch.zeros(2, 2, dtype=torch.long)}, ValueError, r"mask: expected shape \(B, H, W\)"),
    ],
)
def test_probs_from_mask_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        probs_from_mask(**{"mask": torch.zeros(1, 2, 2, dtype=torch.long), "num_classes": 3, **arguments})


BAD = {
    "image range": (
        {"image": torch.full((1, 3, 4, 5), 200.0)},
        ValueError,
        "image: .*divide 8-bit values by 255",
    ),
    "image nan": ({"image": torch.full((1, 3, 4, 5), float("nan"))}, ValueError, "image: expected values in"),
    "image uint8": (
        {"image": torch.zeros(1, 3, 4, 5, dtype=torch.uint8)},
        TypeError,
        "image: expected a floating",
    ),
    "image grey": ({"image": torch.zeros(1, 1, 4, 5)}, ValueError, "image: expected shape"),
    "sizes": ({"image": torch.zeros(1, 3, 4, 6)}, ValueError, "probs: expected shape .* with W=6 from image"),
    "batch": ({"image": torch.zeros(2, 3, 4, 5)}, ValueError, "probs: expected shape .* with B=2 from image"),
    "probs dims": ({"probs": torch.zeros(2, 4, 5)}, ValueError, "probs: expected shape"),
    "probs range": (
        {"probs": torch.full((1, 2, 4, 5), -3.0)},
        ValueError,
        r"probs: expected values in \[0, 1\]",
    ),
    "probs inf": ({"probs": torch.full((1, 2, 4, 5), float("inf"))}, ValueError, "probs: expected values in"),
    "probs int": (
        {"probs": torch.zeros(1, 2, 4, 5, dtype=torch.long)},
        TypeError,
        "probs: expected a floating",
    ),
    "iterations": ({"iterations": -1}, ValueError, "iterations: expected a whole number >= 0, got -1"),
    "iterations float": (
        {"iterations": 2.5},
        ValueError,
        "iterations: expected a whole number >= 0, got 2.5",
    ),
    "backend": ({"backend": "cuda"}, ValueError, "backend: expected one of"),
    "gaussian pair": ({"gaussian": (3.0,)}, ValueError, r"gaussian: expected \(sxy, compat\) or None"),
    "gaussian sxy": (
        {"gaussian": (0.0, 3.0)},
        ValueError,
        "gaussian sxy: expected a finite number > 0, got 0.0",
    ),
    "gaussian compat": (
        {"gaussian": (1.0, -3.0)},
        ValueError,
        "gaussian compat: expected a finite number >= 0",
    ),
    "bilateral pair": ({"bilateral": (80.0, 13.0)}, ValueError, r"bilateral: expected \(sxy, srgb, compat\)"),
    "bilateral srgb": (
        {"bilateral": (80.0, float("nan"), 1.0)},
        ValueError,
        "bilateral srgb: expected a finite",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_errors(name):
    arguments, error, message = BAD[name]
    with pytest.raises(error, match=message):
        dense_crf(**{"image": torch.zeros(1, 3, 4, 5), "probs": torch.full((1, 2, 4, 5), 0.5), **arguments})


def test_module_checks_its_settings_at_once():
    with pytest.raises(ValueError, match="bilateral sxy: expected a finite number > 0"):
        DenseCRF(bilateral=(-1.0, 13.0, 10.0))


def test_rounding_noise_beyond_one_is_tolerated(generator):
    image, probs = random_case(generator)
    assert torch.equal(dense_crf(image, (probs * 0 + 1) + 1e-4), dense_crf(image, probs * 0 + 1))


@pytest.mark.parametrize("labels", [2, 4])
def test_backends_agree(generator, labels):
    pytest.importorskip("pydensecrf.densecrf", reason="the extra pseudolabel[crf] is not installed")
    image, probs = random_case(generator, labels, (24, 31), images=2)
    problems = torch.stack([probs, probs.flip(1)], 1)
    expected = dense_crf(image, problems, backend="pydensecrf")
    assert_same_marginals(dense_crf(image, problems), expected.numpy())
    for settings in ({"gaussian": None}, {"bilateral": None}, {"iterations": 0}):
        ours, peer = (
            dense_crf(image, probs, backend=backend, **settings) for backend in ("torch", "pydensecrf")
        )
        assert_same_marginals(ours, peer.numpy())


@pytest.mark.parametrize("error", [ImportError("no module"), RuntimeError("numpy ABI changed")])
def test_missing_or_broken_pydensecrf(monkeypatch, error):
    real = builtins.__import__

    def fail(name, *rest, **named):
        if name.startswith("pydensecrf"):
            raise error
        return real(name, *rest, **named)

    for name in [name for name in sys.modules if name.startswith("pydensecrf")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", fail)
    with pytest.raises(
        ImportError, match=r'pip install "pseudolabel\[crf\]" .*C\+\+ compiler.*backend="torch"'
    ):
        dense_crf(torch.zeros(1, 3, 2, 2), torch.full((1, 2, 2, 2), 0.5), backend="pydensecrf")
