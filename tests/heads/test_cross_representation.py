"""Cross-representation refinement: sections 4, 13, 15 of the RTC specification."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from pseudolabel.heads import CrossRepresentationRefinement, cross_representation_refine
from pseudolabel.refine import cam_seed, pixel_correlation

seeds = st.integers(0, 1000)
WEIGHTS = {
    "reduce_shallow.0": "f8_3",
    "reduce_deep.0": "f8_4",
    "reduce_deep.1": "f8_5",
    "embed_deep": "f9_1",
    "embed_shallow": "f9_2",
}


def tensors(data: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(value) for name, value in data.items()}


def official(data: dict[str, torch.Tensor], **settings) -> CrossRepresentationRefinement:
    head = CrossRepresentationRefinement(
        [6], [7, 8], shallow_reduce=[4], deep_reduce=[5, 6], shallow_embed=4, deep_embed=5, **settings
    )
    head.load_state_dict({f"{ours}.weight": data[f"w_{theirs}"] for ours, theirs in WEIGHTS.items()})
    return head


def case(seed: int = 0, dtype: torch.dtype = torch.float64):
    """A small head with weights, its maps, taps of three sizes, and an image."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        head = CrossRepresentationRefinement(
            [3], [4, 2], shallow_reduce=[3], deep_reduce=[3, 2], shallow_embed=4, deep_embed=5
        ).to(dtype)
    cam = torch.randn(2, 3, 4, 6, generator=generator, dtype=dtype)
    shallow = [torch.randn(2, 3, 8, 12, generator=generator, dtype=dtype)]
    deep = [torch.randn(2, n, 4, 6, generator=generator, dtype=dtype) for n in (4, 2)]
    image = torch.randn(2, 3, 16, 24, generator=generator, dtype=dtype)
    return head, (cam, shallow, deep, image)


# ------------------------------------------------------------------------------------------ golden files


@pytest.mark.parametrize("chunk_size", [None, 50])
def test_golden(golden: Callable, chunk_size: int | None) -> None:
    data = tensors(golden("rtc/public_crr"))
    head = official(data, chunk_size=chunk_size)
    refined = head(data["cam_logits"][:, 1:], [data["conv4"]], [data["conv5"], data["conv6"]], data["image"])
    torch.testing.assert_close(refined, data["crr"], atol=1e-5, rtol=1e-4)
    refined.backward(data["grad_weight"])
    for name, weight in head.named_parameters():
        expected = data[f"grad_{WEIGHTS[name.removesuffix('.weight')]}"]
        torch.testing.assert_close(weight.grad, expected, atol=1e-4, rtol=1e-3)


def test_golden_function(golden: Callable) -> None:
    data = tensors(golden("rtc/public_crr"))
    features = [data["deep_feat"], data["shallow_feat"]]
    refined = cross_representation_refine(data["cam_seed"], features)
    torch.testing.assert_close(refined, data["crr"], atol=1e-5, rtol=1e-4)
    added = cross_representation_refine(data["cam_seed"], features, reduction="sum")
    torch.testing.assert_close(added, data["pcm_deep"] + data["pcm_shallow"], atol=2e-5, rtol=1e-4)


# ------------------------------------------------------------------------------------------ by hand


def test_hand_computed() -> None:
    seed = torch.tensor([[[[1.0, 0.0, 0.0]]]])
    deep = torch.tensor([[[[2.0, 3.0, 0.0]], [[0.0, 0.0, 1.0]]]])
    shallow = torch.tensor([[[[1.0, 0.0, 0.0]], [[0.0, 5.0, 1.0]]]])
    expected = torch.tensor([0.75, 0.25, 0.0])
    for features in ([deep, shallow], [shallow, deep]):
        refined = cross_representation_refine(seed, features)
        torch.testing.assert_close(refined.flatten(), expected, atol=1e-4, rtol=0)
        refined = cross_representation_refine(seed, features, reduction="sum")
        torch.testing.assert_close(refined.flatten(), 2 * expected, atol=1e-4, rtol=0)


def test_one_feature_is_pixel_correlation() -> None:
    _, (cam, _, deep, _) = case()
    for reduction in ("mean", "sum"):
        refined = cross_representation_refine(cam, deep[:1], reduction=reduction)
        assert torch.equal(refined, pixel_correlation(cam, deep[0]))


def test_module_is_its_formula() -> None:
    head, (cam, shallow, deep, image) = case()
    near = F.interpolate(image, (4, 6), mode="bilinear", align_corners=True)
    g4 = F.interpolate(head.reduce_shallow[0](shallow[0]).relu(), (4, 6), mode="bilinear", align_corners=True)
    g5, g6 = (conv(tap).relu() for conv, tap in zip(head.reduce_deep, deep, strict=True))
    features = [head.embed_deep(torch.cat([g5, g6], 1)), head.embed_shallow(torch.cat([near, g4], 1))]
    assert any((f < 0).any() for f in features), "no ReLU after the embeddings"
    expected = cross_representation_refine(cam_seed(cam), features)
    torch.testing.assert_close(head(cam, shallow, deep, image), expected)


# ------------------------------------------------------------------------------------------ properties


@given(seed=seeds)
def test_properties(seed: int) -> None:
    head, (cam, shallow, deep, image) = case(seed)
    refined = head(cam, shallow, deep, image)
    assert refined.shape == (2, 4, 4, 6)
    assert refined.min() >= 0
    # Seeds and columns of the affinities sum to 1, but where ReLUs left a pixel no feature.
    assert refined.sum(1).max() <= 1
    every = cross_representation_refine(cam_seed(cam), [deep[0], deep[0].flip(1)])
    torch.testing.assert_close(every.sum(1), torch.ones_like(every[:, 0]), atol=1e-4, rtol=0)
    torch.testing.assert_close(head(3 * cam, shallow, deep, image), refined, atol=1e-4, rtol=0)
    order = [2, 0, 1]
    turned = head(cam[:, order], shallow, deep, image)
    torch.testing.assert_close(turned[:, 1:], refined[:, 1:][:, order])


@given(seed=seeds)
def test_order_of_features_does_not_matter(seed: int) -> None:
    _, (cam, _, deep, _) = case(seed)
    torch.testing.assert_close(
        cross_representation_refine(cam, deep), cross_representation_refine(cam, deep[::-1])
    )


def test_who_gets_a_gradient() -> None:
    """Exactly the five convolutions, and the image; the taps where they are not detached."""
    for detach in (True, False):
        head, (cam, shallow, deep, image) = case()
        head.detach = detach
        for value in (cam, *shallow, *deep, image):
            value.requires_grad_()
        head(cam, shallow, deep, image)[:, 1:].square().sum().backward()
        assert cam.grad is None
        assert len(list(head.parameters())) == 5
        assert all(weight.grad.abs().sum() > 0 for weight in head.parameters())
        assert image.grad.abs().sum() > 0
        for tap in (*shallow, *deep):
            assert tap.grad is None if detach else tap.grad.abs().sum() > 0


def test_gradcheck() -> None:
    head, (cam, shallow, deep, image) = case()
    names = [name for name, _ in head.named_parameters()]
    values = [value.detach()[:1].clone() for value in (cam, shallow[0], *deep, image)]

    def run(*weights: torch.Tensor) -> torch.Tensor:
        cam, near, far, farther, photo = values
        parameters = dict(zip(names, weights, strict=True))
        return torch.func.functional_call(head, parameters, (cam, [near], [far, farther], photo))

    assert torch.autograd.gradcheck(run, [p.detach().clone().requires_grad_() for p in head.parameters()])


@pytest.mark.parametrize("chunk_size", [1, 7, 100])
def test_chunks_change_nothing(chunk_size: int) -> None:
    head, arguments = case()
    whole = head(*arguments)
    head.chunk_size = chunk_size
    torch.testing.assert_close(head(*arguments), whole)


def test_other_backbones() -> None:
    """Any number of taps of any size, the image or not."""
    cam = torch.randn(1, 2, 3, 5)
    head = CrossRepresentationRefinement(
        (2, 3), (4,), shallow_reduce=(2, 2), deep_reduce=(3,), use_image=False, reduction="sum"
    )
    shallow, deep = [torch.rand(1, 2, 9, 9), torch.rand(1, 3, 6, 10)], [torch.rand(1, 4, 2, 2)]
    assert head(cam, shallow, deep).shape == (1, 3, 3, 5)
    head = CrossRepresentationRefinement((), (4,), shallow_reduce=(), deep_reduce=(3,))
    assert head(cam, [], deep, torch.rand(1, 3, 20, 30)).shape == (1, 3, 3, 5)


def test_defaults_are_published() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = CrossRepresentationRefinement()
    shapes = {name: tuple(weight.shape[:2]) for name, weight in head.named_parameters()}
    assert shapes == {
        "reduce_shallow.0.weight": (64, 512),
        "reduce_deep.0.weight": (128, 1024),
        "reduce_deep.1.weight": (128, 4096),
        "embed_shallow.weight": (64, 67),
        "embed_deep.weight": (128, 256),
    }
    spread = {name: weight.std().item() for name, weight in head.named_parameters()}
    assert spread["reduce_deep.1.weight"] == pytest.approx((2 / 4096) ** 0.5, rel=0.05)
    assert spread["embed_shallow.weight"] == pytest.approx((2 / 131) ** 0.5, rel=0.05)
    assert spread["embed_deep.weight"] == pytest.approx(4 * (2 / 384) ** 0.5, rel=0.05)


def test_features_of_zeros_give_zeros() -> None:
    seed = torch.rand(1, 3, 2, 2)
    assert cross_representation_refine(seed, [torch.zeros(1, 4, 2, 2)] * 2).eq(0).all()


def test_batch_equals_singles() -> None:
    head, (cam, shallow, deep, image) = case()
    together = head(cam, shallow, deep, image)
    for one in (slice(0, 1), slice(1, 2)):
        alone = head(cam[one], [t[one] for t in shallow], [t[one] for t in deep], image[one])
        torch.testing.assert_close(together[one], alone)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    _, (cam, _, deep, _) = case(dtype=torch.float32)
    seed = cam_seed(cam).to(dtype)
    features = [tap.to(dtype) for tap in deep]
    refined = cross_representation_refine(seed, features)
    assert refined.dtype == dtype
    exact = cross_representation_refine(seed.float(), [f.float() for f in features])
    torch.testing.assert_close(refined.float(), exact, atol=1e-2, rtol=1e-2)


def test_autocast() -> None:
    head, arguments = case(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        refined = head(*arguments)
    assert refined.dtype == torch.float32
    torch.testing.assert_close(refined, head(*arguments), atol=3e-2, rtol=0)


def test_devices(device: torch.device) -> None:
    head, (cam, shallow, deep, image) = case(dtype=torch.float32)
    expected = head(cam, shallow, deep, image)
    head.to(device)
    refined = head(
        cam.to(device), [t.to(device) for t in shallow], [t.to(device) for t in deep], image.to(device)
    )
    assert refined.device.type == device.type
    torch.testing.assert_close(refined.cpu(), expected, atol=1e-4, rtol=1e-3)


def test_compiles_to_one_graph() -> None:
    head, arguments = case(dtype=torch.float32)
    torch.testing.assert_close(
        torch.compile(head, fullgraph=True, backend="eager")(*arguments), head(*arguments)
    )


def test_prints_its_settings() -> None:
    head = CrossRepresentationRefinement([2], [2], shallow_reduce=[2], deep_reduce=[2], chunk_size=5)
    told = "use_image=True, detach=True, reduction='mean', eps=1e-05, chunk_size=5"
    assert told in repr(head)


HEAD, ARGUMENTS = case()
CAM, SHALLOW, DEEP, IMAGE = ARGUMENTS


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: cross_representation_refine(CAM, []), ValueError, "features: expected at least one"),
        (
            lambda: cross_representation_refine(CAM, DEEP, reduction="max"),
            ValueError,
            "reduction: expected one of",
        ),
        (
            lambda: cross_representation_refine(CAM, [*DEEP, *SHALLOW]),
            ValueError,
            r"features\[2\]: expected shape \(B, Di, h, w\) with h=4 from features\[0\]",
        ),
        (lambda: cross_representation_refine(CAM, DEEP, eps=0), ValueError, "eps: expected a finite number"),
        (lambda: HEAD(CAM[0], SHALLOW, DEEP, IMAGE), ValueError, r"cam: expected shape \(B, C, h, w\)"),
        (lambda: HEAD(CAM.long(), SHALLOW, DEEP, IMAGE), TypeError, "cam: expected a floating-point"),
        (lambda: HEAD(CAM, SHALLOW, DEEP), ValueError, "image: expected images .* with use_image, got None"),
        (lambda: HEAD(CAM, SHALLOW, DEEP, IMAGE[:1]), ValueError, "image: .* with B=2 from cam"),
        (lambda: HEAD(CAM, [], DEEP, IMAGE), ValueError, "shallow: expected 1 taps, got 0"),
        (lambda: HEAD(CAM, SHALLOW, DEEP[:1], IMAGE), ValueError, "deep: expected 2 taps, got 1"),
        (
            lambda: HEAD(CAM, SHALLOW, DEEP[::-1], IMAGE),
            ValueError,
            r"deep\[0\]: expected shape \(B, 4, hi, wi\), got \(2, 2, 4, 6\)",
        ),
        (
            lambda: CrossRepresentationRefinement(
                [], [4], shallow_reduce=[], deep_reduce=[2], use_image=False
            ),
            ValueError,
            "shallow_channels: expected at least one tap without use_image",
        ),
        (
            lambda: CrossRepresentationRefinement([2], [], deep_reduce=[]),
            ValueError,
            "deep_channels: expected at least one tap",
        ),
        (
            lambda: CrossRepresentationRefinement([2, 3], [4]),
            ValueError,
            "shallow_reduce: expected 2 numbers as in shallow_channels, got 1",
        ),
        (
            lambda: CrossRepresentationRefinement([0]),
            ValueError,
            "shallow_channels: expected an integer >= 1",
        ),
        (lambda: CrossRepresentationRefinement(deep_embed=0), ValueError, "deep_embed: expected an integer"),
        (lambda: CrossRepresentationRefinement(chunk_size=0), ValueError, "chunk_size: expected an integer"),
        (lambda: CrossRepresentationRefinement(reduction="max"), ValueError, "reduction: expected one of"),
        (lambda: CrossRepresentationRefinement(eps=-1), ValueError, "eps: expected a finite number"),
    ],
)
def test_errors(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()


def test_image_without_use() -> None:
    head = CrossRepresentationRefinement([3], [2], shallow_reduce=[2], deep_reduce=[2], use_image=False)
    with pytest.raises(ValueError, match="image: expected None without use_image, got a tensor of shape"):
        head(CAM.float(), [t.float() for t in SHALLOW], [DEEP[1].float()], IMAGE.float())


def test_seed_is_called_by_its_name() -> None:
    features = [torch.rand(2, 3, 4, 4)]
    with pytest.raises(TypeError, match=r"seed: expected a floating-point tensor"):
        cross_representation_refine(torch.ones(2, 2, 4, 4).long(), features)
    with pytest.raises(ValueError, match=r"features\[0\]: expected shape .* with B=3 from seed"):
        cross_representation_refine(torch.rand(3, 2, 4, 4), features)
    with pytest.raises(TypeError, match=r"features: expected a list or tuple"):
        cross_representation_refine(torch.rand(2, 2, 4, 4), features[0])
