"""`recipes.rtc` and `recipes.RTCLoss`: sections 2, 10, 14 of the RTC specification."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from pseudolabel import losses
from pseudolabel.cam import make_views, normalize_cam
from pseudolabel.heads import Compensator, CrossTransformRegularization, TopK
from pseudolabel.masks import dual_threshold_mask
from pseudolabel.recipes import RTCLoss, RTCOutput, ViewOutput, rtc
from pseudolabel.refine import varm

OUTPUTS = ("cam1_low", "rv1_low", "feat1", "seg_logits", "cam2_low", "rv2_low", "feat2")
LABELS = torch.tensor([[1, 0, 1], [0, 1, 0]])
PARTS = {
    "equivariance": "er",
    "equivariant_cross": "ecr",
    "intra_view": "intra_nce",
    "cross_label": "cross_nce1",
    "cross_prototype": "cross_nce2",
    "compensation": "struct",
    "segmentation": "seg",
}


def case(seed: int = 0, dtype: torch.dtype = torch.float32, classes: int = 3):
    """Outputs of a network on two views, and the images."""
    generator = torch.Generator().manual_seed(seed)

    def maps(channels: int, *size: int) -> Tensor:
        return torch.rand(2, channels, *size, generator=generator, dtype=dtype)

    cam = maps(classes, 6, 8) - 0.4, maps(classes, 3, 4) - 0.4
    view1 = ViewOutput(cam[0], maps(1 + classes, 6, 8), maps(5, 6, 8), (48, 64), maps(1 + classes, 12, 16))
    view2 = ViewOutput(cam[1], maps(1 + classes, 3, 4), maps(5, 3, 4), (24, 32))
    return view1, view2, maps(3, 48, 64)


# ------------------------------------------------------------------------------------------ golden files


@pytest.mark.parametrize("epoch", [0, 7])
def test_golden_step(golden: Callable, epoch: int) -> None:
    """A whole training step: every loss, and the gradient of every output of the network."""
    data = {name: torch.from_numpy(value) for name, value in golden("rtc/public_step").items()}
    outputs = {name: data[name].clone().requires_grad_() for name in OUTPUTS}
    cam1, refined1, features1, logits, cam2, refined2, features2 = outputs.values()
    # The classifier has a channel for the background, which no loss looks at.
    view1 = ViewOutput(cam1[:, 1:], refined1, features1, (int(data["crop"]),) * 2, logits)
    view2 = ViewOutput(cam2[:, 1:], refined2, features2, (int(data["view2"]),) * 2)
    loss_fn = RTCLoss()
    ctr = loss_fn.contrast(refined1, refined2, features1, features2, data["label"])
    topk = tuple(
        TopK(scores.movedim(1, 0).flatten(1).gather(1, indices), indices)
        for scores, indices in (
            (ctr.scores1, data["top_indices1"]),
            (ctr.scores2, data["top_indices2"]),
        )
    )
    out = loss_fn(
        view1,
        view2,
        data["label"],
        data["image01_u8"].float() / 255,
        data["img_box"][:, [0, 2, 1, 3]],
        epoch=epoch,
        topk=topk,
    )

    def official(name: str) -> Tensor:
        return data[f"ep{epoch}_{name}"]

    close = {"atol": 1e-5, "rtol": 1e-4}
    torch.testing.assert_close(out.loss, official("loss"), **close)
    for ours, theirs in PARTS.items():
        torch.testing.assert_close(out.terms[ours], official(f"loss_{theirs}"), **close)
    spread = (official("loss_rvmin1") + official("loss_rvmin2")) / 2
    torch.testing.assert_close(out.terms["min_pooling"], spread, **close)
    torch.testing.assert_close(out.terms["classification"], official("loss_cls") - spread, **close)
    assert len(out.terms) == len(PARTS) + 2

    torch.testing.assert_close(out.ctr.prototypes1, data["prototypes1"], **close)
    torch.testing.assert_close(out.ctr.prototypes2, data["prototypes2"], **close)
    assert torch.equal(out.ctr.targets1.flatten(), data["pseudo1"])
    assert torch.equal(out.ctr.targets2.flatten(), data["pseudo2"])
    if epoch < 7:
        assert out.mask is None
    else:
        assert (out.mask == data["seg_label"]).float().mean() >= 0.999

    out.loss.backward()
    for name, output in outputs.items():
        expected = official(f"grad_{name.removesuffix('_low').removesuffix('_logits')}")
        if epoch < 7 and name == "seg_logits":
            assert output.grad is None
            assert expected.numel() == 0
        else:
            torch.testing.assert_close(
                output.grad, expected, rtol=1e-2, atol=1e-3 * expected.abs().max().item()
            )
    assert cam1.grad[:, 0].eq(0).all()


def test_golden_inference(golden: Callable) -> None:
    data = golden("rtc/public_infer")
    seen = []

    def network(view: Tensor) -> tuple[Tensor, Tensor]:
        number = len(seen)
        seen.append(view)
        assert view.shape[2:] == tuple(data[f"size_{number}"].tolist())
        cam = torch.from_numpy(data[f"cam_low_{number}"])[:, 1:]
        return cam, torch.from_numpy(data[f"seg_logits_{number}"])

    image = torch.rand(1, 3, *data["orig_size"].tolist(), generator=torch.Generator().manual_seed(0))
    mask = rtc(image, network, crf=None)
    assert (mask[0].numpy() == data["pred"]).mean() >= 0.999
    for view, expected in zip(seen, make_views(image), strict=True):
        assert torch.equal(view, expected)


# ------------------------------------------------------------------------------------------ inference


def brightness(x: Tensor) -> tuple[Tensor, Tensor]:
    """A network: classes are green and blue, the background is red."""
    return 20 * x[:, 1:], 20 * x


def test_hand_computed() -> None:
    image = torch.full((1, 3, 1, 4), 0.4)
    image[0, 1, 0] = torch.tensor([0.8, 0.6, 0.0, 0.1])
    image[0, 2, 0] = torch.tensor([0.0, 0.0, 0.0, 0.7])
    run = lambda *labels: rtc(image, brightness, *labels, scales=(1.0,), crf=None).flatten().tolist()  # noqa: E731
    assert run() == [1, 1, 0, 2]
    assert run(torch.tensor([[1, 0]])) == [1, 1, 0, 0]
    assert run(torch.tensor([[0, 0]])) == [0, 0, 0, 0]


@given(seed=st.integers(0, 1000))
def test_properties(seed: int) -> None:
    image = torch.rand(2, 3, 8, 12, generator=torch.Generator().manual_seed(seed))
    settings = {"scales": (1.0, 1.5), "crf": None}
    masks = [rtc(image, brightness, background=value, **settings) for value in (0.1, 0.3)]
    assert (masks[1][masks[0] == 0] == 0).all(), "raising the background never removes it"
    for one in (slice(0, 1), slice(1, 2)):
        assert torch.equal(rtc(image[one], brightness, background=0.1, **settings), masks[0][one])
    mirrored = rtc(image.flip(3), brightness, background=0.1, **settings).flip(2)
    assert (mirrored == masks[0]).float().mean() > 0.97


def test_crf_sees_the_mask() -> None:
    image = torch.rand(1, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    seen = []

    def crf(photo: Tensor, probs: Tensor) -> Tensor:
        assert photo is image
        seen.append(probs)
        return probs

    mask = rtc(image, brightness, crf=crf)
    assert torch.equal(mask, rtc(image, brightness, crf=None))
    expected = F.one_hot(mask, 3).movedim(3, 1) * 0.55 + 0.15
    torch.testing.assert_close(seen[0], expected)


def test_default_crf_smooths() -> None:
    image = torch.zeros(1, 3, 24, 32)
    image[:, 0] = 0.4
    image[:, 1, 6:18, 8:24] = 0.8
    image[:, 1, 2, 2] = 0.8
    plain, smooth = rtc(image, brightness, scales=(1.0,), crf=None), rtc(image, brightness, scales=(1.0,))
    assert plain[0, 2, 2] == 1
    assert smooth.dtype == torch.int64
    assert set(smooth.unique().tolist()) <= {0, 1}
    assert (smooth[0, 8:16, 10:22] == 1).all()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: rtc(torch.rand(3, 4, 4), brightness), ValueError, r"image: expected shape \(B, 3, H, W\)"),
        (
            lambda: rtc(torch.ones(1, 3, 4, 4).long(), brightness),
            TypeError,
            "image: expected a floating-point",
        ),
        (lambda: rtc(torch.rand(1, 3, 4, 4), brightness, background=2), ValueError, "background: expected"),
        (
            lambda: rtc(torch.rand(1, 3, 4, 4), brightness, scales=()),
            ValueError,
            "scales: expected at least one",
        ),
        (
            lambda: rtc(torch.rand(1, 3, 4, 4), lambda x: (x, x)),
            ValueError,
            "logits: expected 4 channels, the background and the classes of cam, got 3",
        ),
        (
            lambda: rtc(torch.rand(1, 3, 4, 4), brightness, torch.ones(1, 3)),
            ValueError,
            r"labels|cams\[0\]",
        ),
    ],
)
def test_errors(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()


# ------------------------------------------------------------------------------------------ the loss


def test_loss_is_the_sum_of_its_terms() -> None:
    view1, view2, image = case()
    out = RTCLoss()(view1, view2, LABELS, image, epoch=7)
    assert isinstance(out, RTCOutput)
    torch.testing.assert_close(out.loss, sum(out.terms.values()))
    assert all(term.ndim == 0 and term >= 0 for term in out.terms.values())


def test_loss_is_its_parts() -> None:
    """Written out on all classes, without the gathering of present ones."""
    view1, view2, image = case(dtype=torch.float64)
    out = RTCLoss()(view1, view2, LABELS, image.double(), epoch=7)

    def up(maps: Tensor, size: tuple[int, int]) -> Tensor:
        return F.interpolate(maps, size, mode="bilinear", align_corners=True)

    def compared(maps: Tensor, view: ViewOutput) -> Tensor:
        return up(normalize_cam(up(maps, view.input_size), "minmax-zero"), (24, 32))

    (cam1, target1), (cam2, target2) = (
        [compared(maps, view) for maps in (view.cam, view.refined)] for view in (view1, view2)
    )
    mean = [up(view.cam, view.input_size).mean((2, 3)) for view in (view1, view2)]
    fill = [
        losses.min_pooling_loss(up(view.refined, view.input_size)[:, 1:], LABELS) for view in (view1, view2)
    ]
    ctr = CrossTransformRegularization()(view1.refined, view2.refined, view1.features, view2.features, LABELS)
    mask = dual_threshold_mask(
        up(normalize_cam(view1.refined[:, 1:], "minmax-zero"), (48, 64)),
        image.double(),
        labels=LABELS,
        high=0.55,
        low=0.2,
        refine=varm,
        softmax=True,
        downscale=2,
    )
    expected = {
        "classification": sum(F.multilabel_soft_margin_loss(m, LABELS.double()) for m in mean) / 2,
        "min_pooling": sum(fill) / 2,
        "equivariance": losses.equivariance_loss(cam1, cam2, LABELS, mean_over="all"),
        "equivariant_cross": losses.equivariant_cross_loss(cam2, target1, LABELS)
        + losses.equivariant_cross_loss(cam1, target2, LABELS),
        **ctr.losses,
        "compensation": Compensator()(cam1, cam2, ctr, LABELS),
        "segmentation": losses.balanced_mask_cross_entropy(view1.logits, mask, LABELS),
    }
    assert torch.equal(out.mask, mask)
    assert out.terms.keys() == expected.keys()
    for name, term in out.terms.items():
        torch.testing.assert_close(term, expected[name])


def test_schedule() -> None:
    """The segmentation loss starts at its epoch; nothing else changes there."""
    view1, view2, image = case()
    loss_fn = RTCLoss(seg_start_epoch=2)
    before, after = (loss_fn(view1, view2, LABELS, image, epoch=epoch) for epoch in (1, 2))
    assert before.mask is None
    assert before.terms["segmentation"] == 0
    assert set(after.mask.unique().tolist()) <= {0, 1, 2, 3, 255}
    for name, term in before.terms.items():
        assert name == "segmentation" or term == after.terms[name]
    without = loss_fn(view1._replace(logits=None), view2, LABELS, image, epoch=1)
    assert without.loss == before.loss
    assert "seg_start_epoch=2" in repr(loss_fn)


def test_present_pairs_alone() -> None:
    """Maps of absent classes do not matter where labels decide: only classifier and prototypes see them."""
    view1, view2, image = case()
    absent = (LABELS == 0)[:, :, None, None]
    other1 = view1._replace(cam=view1.cam.masked_fill(absent, 3.0))
    other2 = view2._replace(cam=view2.cam.masked_fill(absent, 3.0))
    expected, out = RTCLoss()(view1, view2, LABELS, image), RTCLoss()(other1, other2, LABELS, image)
    for name in ("min_pooling", "equivariance", "equivariant_cross", "compensation"):
        torch.testing.assert_close(out.terms[name], expected.terms[name])
    assert out.terms["classification"] > expected.terms["classification"]


def test_absent_classes_cost_nothing() -> None:
    """What the backward pass keeps at the size of the view grows with the present classes."""
    largest = {}
    for classes in (3, 30):
        view1, view2, image = case(classes=classes)
        view1 = view1._replace(cam=view1.cam.requires_grad_(), input_size=(192, 256))
        view1 = view1._replace(refined=view1.refined.requires_grad_())
        labels = torch.zeros(2, classes)
        labels[:, 1] = 1
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):  # noqa: B023
            RTCLoss()(view1, view2, labels, image)
        largest[classes] = max(kept)
    assert largest[3] == largest[30] == 2 * 2 * 192 * 256  # two images, the background and one class


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float16, torch.float64])
def test_labels_of_any_dtype(dtype: torch.dtype) -> None:
    view1, view2, image = case()
    expected = RTCLoss()(view1, view2, LABELS.float(), image, epoch=7)
    out = RTCLoss()(view1, view2, LABELS.to(dtype), image, epoch=7)
    torch.testing.assert_close(out.loss, expected.loss)


@given(seed=st.integers(0, 1000))
def test_classes_may_change_places(seed: int) -> None:
    view1, view2, image = case(seed, torch.float64)
    order = [2, 0, 1]
    turned = [
        view._replace(cam=view.cam[:, order], refined=view.refined[:, [0, 3, 1, 2]])
        for view in (view1, view2)
    ]
    loss_fn = RTCLoss()
    expected = loss_fn(view1, view2, LABELS, image)
    out = loss_fn(*turned, LABELS[:, order], image)
    for name, term in out.terms.items():
        torch.testing.assert_close(term, expected.terms[name])


def test_padding_is_ignored_by_the_mask_alone() -> None:
    view1, view2, image = case()
    boxes = torch.tensor([[0, 0, 40, 64], [8, 16, 48, 64]])
    plain, boxed = (RTCLoss()(view1, view2, LABELS, image, b, epoch=7) for b in (None, boxes))
    assert boxed.mask[0, 40:].eq(255).all()
    assert boxed.mask[1, :8].eq(255).all()
    assert boxed.mask[1, :, :16].eq(255).all()
    inside = boxed.mask[1, 8:, 16:]
    assert torch.equal(inside, plain.mask[1, 8:, 16:])
    for name in plain.terms.keys() - {"segmentation"}:
        assert plain.terms[name] == boxed.terms[name]


def test_parts_of_your_own() -> None:
    view1, view2, image = case()
    contrast = CrossTransformRegularization(temperature=0.5, background_ranking="complement")
    made = []

    def make_mask(cam: Tensor, photo: Tensor, labels: Tensor, boxes: Tensor | None) -> Tensor:
        made.append((cam, photo, labels, boxes))
        return (cam.amax(1) > 0.5).long()

    loss_fn = RTCLoss(contrast=contrast, compensator=Compensator(keep_ratio=0.5), make_mask=make_mask)
    out = loss_fn(view1, view2, LABELS, image, epoch=7)
    cam, photo, labels, boxes = made[0]
    assert photo is image
    assert labels is LABELS
    assert boxes is None
    assert cam.shape == (2, 3, 48, 64)
    assert cam.max() <= 1
    assert not cam.requires_grad
    assert torch.equal(out.mask, (cam.amax(1) > 0.5).long())
    default = RTCLoss()(view1, view2, LABELS, image)
    for name in ("intra_view", "compensation"):
        assert out.terms[name] != default.terms[name]


@pytest.mark.parametrize("labels", [torch.zeros(2, 3), torch.tensor([[0, 0, 0], [0, 1, 1]])])
def test_images_without_label(labels: Tensor) -> None:
    view1, view2, image = case()
    view1, view2 = (
        view._replace(
            cam=view.cam.requires_grad_(),
            refined=view.refined.requires_grad_(),
            features=view.features.requires_grad_(),
        )
        for view in (view1, view2)
    )
    out = RTCLoss()(view1, view2, labels, image, epoch=7)
    out.loss.backward()
    assert all(term.isfinite() for term in out.terms.values())
    for view in (view1, view2):
        assert all(output.grad.isfinite().all() for output in (view.cam, view.refined, view.features))
    assert out.mask[0].eq(0).all()


def test_no_class_at_all() -> None:
    view1, view2, image = case(classes=1)
    out = RTCLoss()(view1, view2, torch.zeros(2, 1), image, epoch=7)
    assert out.loss.isfinite()


def test_half_precision() -> None:
    view1, view2, image = case()
    half = [
        ViewOutput(*(x.bfloat16() if isinstance(x, Tensor) else x for x in view)) for view in (view1, view2)
    ]
    full = [ViewOutput(*(x.float() if isinstance(x, Tensor) else x for x in view)) for view in half]
    out, expected = RTCLoss()(*half, LABELS, image), RTCLoss()(*full, LABELS, image)
    assert out.loss.dtype == torch.float32
    for name in out.terms:
        torch.testing.assert_close(out.terms[name], expected.terms[name], atol=1e-2, rtol=1e-2)


def test_devices(device: torch.device) -> None:
    view1, view2, image = case()
    loss_fn = RTCLoss(contrast=CrossTransformRegularization(background_ranking="complement"))
    expected = loss_fn(view1, view2, LABELS, image, epoch=7)
    moved = [ViewOutput(*(x.to(device) if isinstance(x, Tensor) else x for x in v)) for v in (view1, view2)]
    out = loss_fn(*moved, LABELS.to(device), image.to(device), epoch=7)
    assert out.loss.device.type == device.type
    torch.testing.assert_close(out.loss.cpu(), expected.loss, atol=1e-3, rtol=1e-3)


V1, V2, IMAGE = case()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: RTCLoss(seg_start_epoch=-1), ValueError, "seg_start_epoch: expected a finite number >= 0"),
        (lambda: RTCLoss()(V1, V2, LABELS, IMAGE, epoch=-1), ValueError, "epoch: expected a finite number"),
        (
            lambda: RTCLoss()(V1._replace(logits=None), V2, LABELS, IMAGE, epoch=7),
            ValueError,
            "view1.logits: expected logits from epoch 7 on, got None",
        ),
        (lambda: RTCLoss()(V1, V2, LABELS[:, 1:], IMAGE), ValueError, "labels: .* with C=3 from view1.cam"),
        (
            lambda: RTCLoss()(V1._replace(refined=V1.refined[:, 1:]), V2, LABELS, IMAGE),
            ValueError,
            "view1.refined: expected 4 channels",
        ),
        (
            lambda: RTCLoss()(V1, V2._replace(cam=V2.cam[:1]), LABELS, IMAGE),
            ValueError,
            "labels: .* with B=1 from view2.cam",
        ),
        (
            lambda: RTCLoss()(V1, V2._replace(cam=V2.cam.long()), LABELS, IMAGE),
            TypeError,
            "view2.cam: expected a floating-point",
        ),
        (lambda: RTCLoss()(V1, V2, 2 * LABELS, IMAGE), ValueError, "labels: expected a multi-hot"),
    ],
)
def test_loss_errors(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()


def test_network_returns_a_pair() -> None:
    with pytest.raises(ValueError, match=r"network\(image\): expected a pair, maps and logits, got NoneType"):
        rtc(torch.rand(1, 3, 8, 8), lambda view: None, crf=None)
    with pytest.raises(TypeError, match=r"network: expected a callable"):
        rtc(torch.rand(1, 3, 8, 8), None, crf=None)
