"""Double decoupled CAM: sections 1.3 and 1.6 of the Mat-Label specification. There are no golden files."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from pseudolabel.cam import class_activation_map, normalize_cam
from pseudolabel.heads import (
    DoubleDecoupledCAM,
    d2cam_anchor_loss,
    d2cam_anchor_weight,
    d2cam_category_loss,
    d2cam_contrast_loss,
    d2cam_exclusivity_loss,
    d2cam_foreground_background_loss,
    d2cam_logits,
    d2cam_pool,
    d2cam_posterior,
    d2cam_triplet_loss,
)
from pseudolabel.masks import constant_background, dual_threshold_mask, scores_to_mask
from pseudolabel.metrics import confusion_matrix, iou_from_confusion

seeds = st.integers(0, 1000)
LABELS = torch.tensor([[1, 0, 1], [0, 1, 0]])


def case(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Features (2,5,4,6), class proxies (3,5), background proxies (2,5)."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(s, generator=generator, dtype=dtype) for s in ((2, 5, 4, 6), (3, 5), (2, 5)))


def losses(features: Tensor, classes: Tensor, backgrounds: Tensor, labels: Tensor) -> dict[str, Tensor]:
    logits = d2cam_logits(features, classes, backgrounds)
    posterior = d2cam_posterior(logits, labels)
    pooled = d2cam_pool(features, posterior)
    sides = d2cam_pool(features, torch.cat([posterior[:, :1], 1 - posterior[:, :1]], 1))
    seed = torch.zeros(logits[:, 0].shape, dtype=torch.int64)
    seed[:, :2] = 255
    return {
        "category": d2cam_category_loss(pooled, classes, labels),
        "margin": d2cam_foreground_background_loss(pooled, classes, backgrounds, labels),
        "triplet": d2cam_triplet_loss(features, posterior, classes, labels),
        "c2am": d2cam_contrast_loss(sides, labels),
        "anchor": d2cam_anchor_loss(logits, seed, labels),
        "exclusivity": d2cam_exclusivity_loss(posterior, labels),
    }


NAMES = ("category", "margin", "triplet", "c2am", "anchor", "exclusivity")


# ---------------------------------------------------------------------------------------- formulas, by hand


def test_logits_by_hand() -> None:
    z = torch.tensor([3.0, 4.0]).view(1, 2, 1, 1)  # unit: (0.6, 0.8)
    logits = d2cam_logits(z, torch.tensor([[2.0, 0.0]]), torch.eye(2), scale=10.0)
    background = math.log((math.exp(6) + math.exp(8)) / 2)
    torch.testing.assert_close(logits.flatten(), torch.tensor([background, 6.0]))


def test_category_by_hand() -> None:
    """Without a margin it is the cross-entropy of each labelled class's pooled feature."""
    features, classes, backgrounds = case()
    pooled = d2cam_pool(features, d2cam_posterior(d2cam_logits(features, classes, backgrounds), LABELS))
    images, labelled = LABELS.nonzero().T
    cosine = pooled[images, labelled + 1] @ F.normalize(classes, dim=1).T
    plain = d2cam_category_loss(pooled, classes, LABELS, scale=7.0, margin=0.0)
    torch.testing.assert_close(plain, F.cross_entropy(7 * cosine, labelled))
    cosine[range(3), labelled] -= 0.3
    with_margin = d2cam_category_loss(pooled, classes, LABELS, scale=7.0, margin=0.3)
    torch.testing.assert_close(with_margin, F.cross_entropy(7 * cosine, labelled))


def test_foreground_background_by_hand() -> None:
    features, classes, backgrounds = case()
    pooled = d2cam_pool(features, d2cam_posterior(d2cam_logits(features, classes, backgrounds), LABELS))
    w, u = F.normalize(classes, dim=1), F.normalize(backgrounds, dim=1)
    first, second = [], []
    for image in range(2):
        present = LABELS[image].nonzero()[:, 0].tolist()
        for c in present:
            v = pooled[image, c + 1]
            first.append(F.softplus((4 * u @ v).logsumexp(0) - 4 * (w[c] @ v - 0.1)))
        v = pooled[image, 0]
        own = (4 * (u @ v - 0.1)).logsumexp(0)
        second.append(F.softplus((4 * w[present] @ v).logsumexp(0) - own))
    expected = torch.stack(first).mean() + torch.stack(second).mean()
    found = d2cam_foreground_background_loss(pooled, classes, backgrounds, LABELS, scale=4.0, margin=0.1)
    torch.testing.assert_close(found, expected)


def test_triplet_by_hand() -> None:
    features, classes, backgrounds = case()
    posterior = d2cam_posterior(d2cam_logits(features, classes, backgrounds), LABELS)
    z, w = F.normalize(features, dim=1), F.normalize(classes, dim=1)
    terms = []
    for image, c in LABELS.nonzero().tolist():
        q = posterior[image, c + 1]
        whole, covered, rest = (w @ (z[image] * m).mean((1, 2)) for m in (torch.ones_like(q), q, 1 - q))
        near, far = (1 - F.cosine_similarity(whole, other, dim=0) for other in (covered, rest))
        terms.append((1 + near - far).relu() + q.mean())
    torch.testing.assert_close(
        d2cam_triplet_loss(features, posterior, classes, LABELS), torch.stack(terms).mean()
    )


def test_contrast_by_hand() -> None:
    generator = torch.Generator().manual_seed(0)
    pooled = F.normalize(torch.rand(4, 2, 3, generator=generator, dtype=torch.float64), dim=2)
    labels = torch.tensor([[1], [1], [0], [1]])  # the third image has no label
    kept = pooled[[0, 1, 3]]
    negative, positive = [], []
    for i in range(3):
        negative += [-math.log(1 - min(float(kept[i, 0] @ kept[j, 1]), 0.9995)) for j in range(3)]
    for side in (0, 1):
        for i in range(3):
            likeness = sorted(min(float(kept[i, side] @ kept[j, side]), 0.9995) for j in range(3) if j != i)
            positive += [-math.exp(-0.25 * rank) * math.log(s) for rank, s in enumerate(likeness[::-1])]
    expected = sum(negative) / 9 + sum(positive) / 6
    assert float(d2cam_contrast_loss(pooled, labels)) == pytest.approx(expected)


def test_exclusivity_is_the_sum_of_products() -> None:
    features, classes, backgrounds = case()
    q = d2cam_posterior(d2cam_logits(features, classes, backgrounds), LABELS)
    products = sum(q[:, k] * q[:, m] for k in range(4) for m in range(k))
    torch.testing.assert_close(d2cam_exclusivity_loss(q, LABELS), products.mean())
    one_hot = F.one_hot(q.argmax(1), 4).permute(0, 3, 1, 2).double()
    assert float(d2cam_exclusivity_loss(one_hot, LABELS)) == 0


def test_anchor_is_cross_entropy_among_the_labelled() -> None:
    logits = torch.zeros(2, 4, 1, 2)
    seed = torch.tensor([[[0, 3]], [[2, 255]]])
    loss = d2cam_anchor_loss(logits, seed, LABELS)
    assert float(loss) == pytest.approx((2 * math.log(3) + math.log(2)) / 3)


def test_anchor_schedule_is_a_hard_cut() -> None:
    assert [d2cam_anchor_weight(step, 100) for step in (0, 99, 100, 10_000)] == [1.0, 1.0, 0.0, 0.0]
    assert d2cam_anchor_weight(0, 0) == 0.0


# ------------------------------------------------------------------------------------------- properties


@given(seeds)
def test_posterior_is_a_distribution(seed: int) -> None:
    features, classes, backgrounds = case(seed)
    q = d2cam_posterior(d2cam_logits(features, classes, backgrounds), LABELS)
    assert (q >= 0).all()
    torch.testing.assert_close(q.sum(1), torch.ones_like(q[:, 0]))
    assert not q[:, 1:][LABELS == 0].any(), "absent classes"


@given(seeds, st.floats(0.1, 10))
def test_lengths_do_not_matter(seed: int, factor: float) -> None:
    features, classes, backgrounds = case(seed)
    expected = losses(features, classes, backgrounds, LABELS)
    found = losses(factor * features, factor * classes, factor * backgrounds, LABELS)
    torch.testing.assert_close(found, expected)


@given(seeds, st.permutations(range(3)))
def test_order_of_classes_does_not_matter(seed: int, order: list[int]) -> None:
    features, classes, backgrounds = case(seed)
    found = losses(features, classes[order], backgrounds.flip(0), LABELS[:, order])
    torch.testing.assert_close(found, losses(features, classes, backgrounds, LABELS))


@given(seeds)
def test_a_background_proxy_counted_twice_changes_no_logit(seed: int) -> None:
    features, classes, backgrounds = case(seed)
    torch.testing.assert_close(
        d2cam_logits(features, classes, backgrounds.repeat(2, 1)),
        d2cam_logits(features, classes, backgrounds),
    )


@given(seeds)
def test_absent_classes_touch_the_category_loss_alone(seed: int) -> None:
    features, classes, backgrounds = case(seed)
    changed = classes.clone()
    changed[2] = -classes[2] + 1
    labels = torch.tensor([[1, 0, 0], [0, 1, 0]])
    one, other = (
        losses(features, classes, backgrounds, labels),
        losses(features, changed, backgrounds, labels),
    )
    different = {name for name in one if not torch.allclose(one[name], other[name])}
    assert different <= {"category", "triplet"}, "the triplet compares vectors of all class scores"


@pytest.mark.parametrize("name", NAMES)
def test_gradients(name: str) -> None:
    features, classes, backgrounds = case(3)
    features = features[..., :2, :2].clone()
    learned = [features, backgrounds] if name == "triplet" else [features, backgrounds, classes]
    for tensor in learned:
        tensor.requires_grad_()

    def loss(x: Tensor, u: Tensor, w: Tensor = classes) -> Tensor:
        return losses(x, w, u, LABELS)[name]

    assert torch.autograd.gradcheck(loss, learned)


@pytest.mark.parametrize("name", NAMES)
def test_no_label_at_all(name: str) -> None:
    features, classes, backgrounds = (tensor.requires_grad_() for tensor in case())
    loss = losses(features, classes, backgrounds, torch.zeros(2, 3))[name]
    assert float(loss.detach()) == 0
    loss.backward()
    assert torch.isfinite(features.grad).all()


def test_triplet_leaves_the_proxies_alone() -> None:
    features, classes, _ = case()
    classes.requires_grad_()
    posterior = torch.full((2, 4, 4, 6), 0.25, dtype=torch.float64, requires_grad=True)
    d2cam_triplet_loss(features, posterior, classes, LABELS).backward()
    assert classes.grad is None
    assert posterior.grad is not None


def test_valid_mask_keeps_padding_out() -> None:
    features, classes, backgrounds = case()
    valid = torch.ones(2, 4, 6, dtype=torch.bool)
    valid[:, :, 4:] = False
    found, cut = [], features[..., :4]
    for z, mask in ((features, valid), (cut, None)):
        q = d2cam_posterior(d2cam_logits(z, classes, backgrounds), LABELS)
        pooled = d2cam_pool(z, q, valid_mask=mask)
        found.append((pooled, d2cam_exclusivity_loss(q, LABELS, valid_mask=mask)))
    torch.testing.assert_close(*found)


# ------------------------------------------------------------------------------------------------ module


def head(**settings: object) -> DoubleDecoupledCAM:
    return DoubleDecoupledCAM(5, 3, dim=4, generator=torch.Generator().manual_seed(0), **settings).double()


@pytest.mark.parametrize("fb", ["margin", "triplet", "c2am"])
def test_module_equals_functions(fb: str) -> None:
    module, (features, *_) = head(fb=fb), case()
    seed = torch.tensor([[0, 1, 3], [0, 2, 255]]).repeat_interleave(2, 1)[:, None].expand(-1, 4, -1)
    out = module(features, LABELS, seed, anchor_weight=0.5)
    z = F.conv2d(features, module.projection.weight)
    logits = d2cam_logits(z, module.class_proxies, module.background_proxies)
    posterior = d2cam_posterior(logits, LABELS)
    torch.testing.assert_close(out.posterior, posterior)
    torch.testing.assert_close(out.logits, logits)
    expected = losses(z, module.class_proxies, module.background_proxies, LABELS)
    anchor = d2cam_anchor_loss(logits, seed, LABELS)
    terms = (expected["category"], expected[fb], anchor, expected["exclusivity"])
    torch.testing.assert_close(tuple(out.losses), terms)
    weights = (0.1, 1.0, 0.5, 1.0)
    torch.testing.assert_close(out.loss, sum(w * term for w, term in zip(weights, terms, strict=True)))


def test_eval_gives_maps_alone() -> None:
    module, (features, *_) = head().eval(), case()
    out = module(features, LABELS)
    assert out.loss is None
    assert out.losses is None
    for image in range(2):
        single = module(features[image : image + 1], LABELS[image : image + 1])
        torch.testing.assert_close(single.posterior[0], out.posterior[image])


def test_weights_of_zero_switch_off() -> None:
    module = head(category_weight=0, fb_weight=0, exclusivity_weight=0)
    loss = module(case()[0], LABELS).loss
    assert float(loss.detach()) == 0
    loss.backward()


def test_detach_pool() -> None:
    """Without a gradient through the weights of the pooling, the proxies of the background feel less."""
    features = case()[0]
    grads = []
    for detach in (False, True):
        module = head(detach_pool=detach, fb_weight=0, exclusivity_weight=0)
        module(features, LABELS).loss.backward()
        grads.append(module.background_proxies.grad)
    assert grads[0].abs().sum() > 0
    assert grads[1] is None or not grads[1].any()


def test_state_dict_restores() -> None:
    one, other = head().eval(), DoubleDecoupledCAM(5, 3, dim=4).double().eval()
    other.load_state_dict(one.state_dict())
    features = case()[0]
    assert torch.equal(one(features, LABELS).posterior, other(features, LABELS).posterior)


def test_tokens_of_a_transformer() -> None:
    """Features are features: patch tokens (B,N,D) on their grid."""
    tokens = torch.randn(2, 4 * 6, 5, generator=torch.Generator().manual_seed(0)).double()
    grid = tokens.transpose(1, 2).unflatten(2, (4, 6))
    assert head()(grid, LABELS).posterior.shape == (2, 4, 4, 6)


# ----------------------------------------------------------------------------------- dtypes, devices, graphs


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype, device: torch.device) -> None:
    features, classes, backgrounds = (tensor.to(device, dtype) for tensor in case())
    labels = LABELS.to(device)
    logits = d2cam_logits(features, classes, backgrounds)
    posterior = d2cam_posterior(logits, labels)
    assert logits.dtype == posterior.dtype == dtype
    wide = torch.float32 if dtype.itemsize == 2 else dtype
    pooled = d2cam_pool(features, posterior)
    assert pooled.dtype == wide
    assert d2cam_category_loss(pooled, classes, labels).dtype == wide
    exact = d2cam_posterior(d2cam_logits(*case()), LABELS)
    torch.testing.assert_close(
        posterior.cpu().double(), exact, atol=0.08 if dtype.itemsize == 2 else 1e-5, rtol=0
    )


@pytest.mark.parametrize("fb", ["margin", "triplet", "c2am"])
def test_one_graph(fb: str) -> None:
    module, (features, *_) = head(fb=fb), case()
    seed = torch.zeros(2, 4, 6, dtype=torch.int64)

    def step(x: Tensor) -> Tensor:
        return module(x, LABELS, seed, anchor_weight=1.0).loss

    compiled = torch.compile(step, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(features), step(features))


# ----------------------------------------------------------------------------------------------- errors


def test_errors() -> None:
    features, classes, backgrounds = case()
    logits = d2cam_logits(features, classes, backgrounds)
    with pytest.raises(ValueError, match=r"labels: expected shape \(2, 3\) beside a background channel, got"):
        d2cam_posterior(logits, LABELS[:, :2])
    with pytest.raises(ValueError, match="labels: expected a multi-hot"):
        d2cam_posterior(logits, 2 * LABELS)
    with pytest.raises(ValueError, match="seed: expected background and labelled classes"):
        d2cam_anchor_loss(logits, torch.full((2, 4, 6), 2), LABELS)
    with pytest.raises(ValueError, match=r"seed: expected classes 0\.\.3 or ignore_index 255"):
        d2cam_anchor_loss(logits, torch.full((2, 4, 6), 9), LABELS)
    with pytest.raises(ValueError, match="seed: expected a label map"):
        head()(features, LABELS, anchor_weight=1.0)
    with pytest.raises(ValueError, match="scale: expected a finite number > 0, got 0"):
        d2cam_logits(features, classes, backgrounds, scale=0)
    with pytest.raises(ValueError, match="margin: expected a finite number >= 0, got -1"):
        head(margin=-1)
    with pytest.raises(ValueError, match="class_proxies: expected 3, one for each class of labels, got 2"):
        d2cam_category_loss(torch.ones(2, 4, 5), classes[:2], LABELS)
    with pytest.raises(ValueError, match="background_proxies: expected at least one, got none"):
        d2cam_logits(features, classes, backgrounds[:0])
    with pytest.raises(ValueError, match="fb: expected one of"):
        head(fb="other")
    with pytest.raises(TypeError, match="features: expected a floating-point tensor"):
        d2cam_logits(features.long(), classes, backgrounds)


# ------------------------------------------------------------------------------------------- what it learns
#
# Scenes of 12 x 12 positions: objects with a small part that tells their class and a body that all classes
# share, in front of one of five backgrounds, four times in five that of the class. So a CAM finds the part
# and some of the background; the body can only be found by what is alike within and between photos.

NUM_CLASSES, NUM_BACKGROUNDS, CHANNELS, SIDE, SCENES = 6, 5, 24, 12, 160
SEEDS = (1, 2, 3)
STEPS, WARM_UP = 250, 50


def scenes(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Features (B,D,h,w), labels (B,C) and true masks (B,h,w)."""
    generator = torch.Generator().manual_seed(seed)

    def unit(count: int) -> Tensor:
        return F.normalize(torch.randn(count, CHANNELS, generator=generator), dim=1)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    def chance(share: float) -> bool:
        return bool(torch.rand(1, generator=generator) < share)

    parts, fur, backgrounds = unit(NUM_CLASSES), unit(1), unit(NUM_BACKGROUNDS)
    bodies = F.normalize(0.3 * parts + 0.95 * fur, dim=1)
    features = torch.empty(SCENES, CHANNELS, SIDE, SIDE)
    truth = torch.zeros(SCENES, SIDE, SIDE, dtype=torch.int64)
    labels = torch.zeros(SCENES, NUM_CLASSES)
    for x, mask, label in zip(features, truth, labels, strict=True):
        classes = torch.randperm(NUM_CLASSES, generator=generator)[: 1 + chance(0.3)]
        ground = classes[0] % NUM_BACKGROUNDS if chance(0.8) else integer(0, NUM_BACKGROUNDS)
        x[:] = backgrounds[ground][:, None, None]
        label[classes] = 1
        for c in classes.tolist():
            height, width = integer(5, 8), integer(5, 8)
            top, left = integer(0, SIDE - height + 1), integer(0, SIDE - width + 1)
            x[:, top : top + height, left : left + width] = bodies[c][:, None, None]
            mask[top : top + height, left : left + width] = c + 1
            y0, x0 = top + integer(0, height - 2), left + integer(0, width - 2)
            x[:, y0 : y0 + 3, x0 : x0 + 3] = parts[c][:, None, None]
    features += 0.15 * torch.randn(features.shape, generator=generator)
    return features, labels, truth


def frozen_cam(features: Tensor, labels: Tensor) -> Tensor:
    """Normalised maps of a logistic regression on the mean features."""
    pooled = features.mean((2, 3))
    weight = torch.zeros(NUM_CLASSES, CHANNELS, requires_grad=True)
    bias = torch.zeros(NUM_CLASSES, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=50, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        error = F.binary_cross_entropy_with_logits(F.linear(pooled, weight, bias), labels)
        value = error + 1e-4 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    cam = class_activation_map(features, weight.detach()).clamp(min=0)
    return normalize_cam(cam * labels[:, :, None, None])


def miou(mask: Tensor, truth: Tensor) -> float:
    return float(iou_from_confusion(confusion_matrix(mask, truth, 1 + NUM_CLASSES)).mean())


def learnt(seed: int, warm_up: int = WARM_UP, **settings: float) -> float:
    """The mIoU of a head that has been trained on the scenes of a seed."""
    features, labels, truth = scenes(seed)
    cam = frozen_cam(features, labels)
    certain = dual_threshold_mask(cam, labels=labels, high=0.5, low=0.1)
    generator = torch.Generator().manual_seed(seed)
    module = DoubleDecoupledCAM(CHANNELS, NUM_CLASSES, dim=24, generator=generator, **settings)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    for step in range(STEPS):
        batch = torch.randint(SCENES, (16,), generator=generator)
        weight = d2cam_anchor_weight(step, warm_up)
        loss = module(features[batch], labels[batch], certain[batch], anchor_weight=weight).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return miou(module.eval()(features, labels).posterior.argmax(1), truth)


def mean_learnt(**settings: float) -> float:
    return sum(learnt(seed, **settings) for seed in SEEDS) / len(SEEDS)


def best_threshold(seed: int) -> float:
    features, labels, truth = scenes(seed)
    cam = frozen_cam(features, labels)
    return max(miou(scores_to_mask(constant_background(cam, step / 20)), truth) for step in range(1, 19))


@pytest.fixture(scope="module")
def whole() -> float:
    return mean_learnt()


def test_learns_more_than_the_frozen_cam_knows(whole: float) -> None:
    """.80 after .44, that at the best threshold of all."""
    assert whole > 0.2 + sum(map(best_threshold, SEEDS)) / len(SEEDS)


@pytest.mark.parametrize(
    ("without", "loses"),
    [({"exclusivity_weight": 0.0}, 0.02), ({"category_weight": 0.0}, 0.06), ({"fb_weight": 0.0}, 0.08)],
    ids=["exclusivity", "category", "foreground-background"],
)
def test_each_term_is_needed(whole: float, without: dict[str, float], loses: float) -> None:
    """Without it: .75, .64, .59."""
    assert mean_learnt(**without) < whole - loses


def test_without_the_anchor_sides_swap(whole: float) -> None:
    assert mean_learnt(warm_up=0) < whole - 0.3
