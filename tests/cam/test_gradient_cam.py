"""`grad_cam`, `grad_cam_plus_plus`, `layer_cam`, their extractors, and `present_softmax`."""

import gc
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from pseudolabel.cam import (
    CAM,
    GradCAM,
    GradCAMPlusPlus,
    LayerCAM,
    grad_cam,
    grad_cam_plus_plus,
    layer_cam,
    multi_scale_cam,
    present_softmax,
)

FUNCTIONS = [grad_cam, grad_cam_plus_plus, layer_cam]
EXTRACTORS = [GradCAM, GradCAMPlusPlus, LayerCAM]
LABELS = torch.tensor([[1, 0, 1, 0, 1], [0, 0, 0, 1, 0], [0, 0, 0, 0, 0]])


def network(in_place: bool = True) -> nn.Sequential:
    """Ends in neither pooling nor one linear layer; goes on in place behind the target layer "1"."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=in_place),
        nn.Conv2d(6, 4, 3, stride=2),
        nn.Tanh(),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(4 * 2 * 3, 5),
    )


class Tokens(nn.Module):
    """A vision transformer's last block behind patches of 2x2, with a class token."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches = nn.Conv2d(3, 8, 2, 2)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.norm1 = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm2 = nn.LayerNorm(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), self.patches(x).flatten(2).transpose(1, 2)], 1)
        y = self.norm1(x)
        x = x + self.attention(y, y, y)[0]
        return self.head(self.norm2(x)[:, 0])


def to_grid(tokens: Tensor) -> Tensor:
    return tokens[:, 1:].transpose(1, 2).unflatten(2, (3, 4))


def photos(count: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(count, 3, 6, 8, generator=torch.Generator().manual_seed(1), dtype=dtype)


def plainly(model: nn.Module, layer: nn.Module, image: Tensor, index: int) -> tuple[Tensor, Tensor]:
    """Activations and gradients of one image and class, by backward through the whole network."""
    kept: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: tuple[Tensor], output: Tensor) -> Tensor:
        kept.append(output)
        return output.clone()

    handle = layer.register_forward_hook(keep)
    score = model.eval()(image[None])[0, index]
    handle.remove()
    kept[0].retain_grad()
    score.backward()
    gradient = kept[0].grad
    model.zero_grad()
    assert gradient is not None
    return kept[0].detach()[0], gradient[0]


def by_formula(function: Callable[..., Tensor], a: Tensor, g: Tensor) -> Tensor:
    """The papers' formulas, channel by channel, of one map."""
    cam = torch.zeros(a.shape[1:], dtype=a.dtype)
    for channel, gradient in zip(a, g, strict=True):
        if function is grad_cam:
            cam += gradient.mean() * channel
        elif function is layer_cam:
            cam += gradient.relu() * channel
        else:
            denominator = 2 * gradient**2 + gradient**3 * channel.sum()
            alpha = torch.where(gradient != 0, gradient**2 / denominator, 0)
            cam += (alpha * gradient.relu()).sum() * channel
    return cam


# ------------------------------------------------------------------------------------------ functions


def test_hand_computed() -> None:
    activations = torch.tensor([[[[1.0, 2.0]], [[3.0, 0.0]]]])
    gradients = torch.tensor([[[[[2.0, 0.0]], [[-1.0, 3.0]]], [[[-1.0, -1.0]], [[0.0, 0.0]]]]])
    # Means 1 and 1; -1 and 0.
    expected = torch.tensor([[[[4.0, 2.0]], [[-1.0, -2.0]]]])
    torch.testing.assert_close(grad_cam(activations, gradients), expected)
    # Channel sums 3 and 3: weights 2 / (2 + 6) and 3 / (2 + 9); the second class has no positive gradient.
    expected = torch.tensor([[[[0.25 + 9 / 11, 0.5]], [[0.0, 0.0]]]])
    torch.testing.assert_close(grad_cam_plus_plus(activations, gradients), expected)
    torch.testing.assert_close(
        layer_cam(activations, gradients), torch.tensor([[[[2.0, 0.0]], [[0.0, 0.0]]]])
    )


def test_plus_plus_of_one_channel_is_the_papers_alpha() -> None:
    """alpha = g^2 / (2 g^2 + g^3 sum A), with g = 0.5 at both places and sum A = 4: 0.25 / (0.5 + 0.5)."""
    cam = grad_cam_plus_plus(torch.tensor([[[[1.0, 3.0]]]]), torch.full((1, 1, 1, 1, 2), 0.5))
    torch.testing.assert_close(cam, torch.tensor([[[[0.25, 0.75]]]]))


@given(st.integers(0, 1000))
def test_formulas(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    activations = torch.rand(2, 3, 2, 4, generator=generator, dtype=torch.float64)
    gradients = torch.randn(2, 2, 3, 2, 4, generator=generator, dtype=torch.float64)
    for function in FUNCTIONS:
        cam = function(activations, gradients)
        for b in range(2):
            for c in range(2):
                expected = by_formula(function, activations[b], gradients[b, c])
                torch.testing.assert_close(cam[b, c], expected)
        torch.testing.assert_close(function(activations, gradients, relu=True), cam.relu())


def test_sign_is_kept() -> None:
    activations, gradients = torch.ones(1, 1, 1, 1), -torch.ones(1, 1, 1, 1, 1)
    assert grad_cam(activations, gradients).item() == -1
    assert grad_cam(activations, gradients, relu=True).item() == 0
    assert layer_cam(-activations, -gradients).item() == -1
    assert layer_cam(-activations, -gradients, relu=True).item() == 0


def test_tiny_gradients_keep_their_weights() -> None:
    """Their squares are zero in float32."""
    cam = grad_cam_plus_plus(torch.ones(1, 1, 1, 1), torch.full((1, 1, 1, 1, 1), 1e-30))
    torch.testing.assert_close(cam, torch.full((1, 1, 1, 1), 5e-31), rtol=1e-5, atol=0)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_gradcheck(function: Callable[..., Tensor], generator: torch.Generator) -> None:
    activations = torch.rand(1, 2, 2, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    gradients = torch.randn(1, 2, 2, 2, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (activations, gradients))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_accumulates_in_float32(function: Callable[..., Tensor], dtype: torch.dtype) -> None:
    # 4096 places of 1 and one of 4096: half precision could not count on.
    activations = torch.ones(1, 4097, 1, 1, dtype=dtype)
    gradients = torch.ones(1, 1, 4097, 1, 1, dtype=dtype)
    exact = function(activations.float(), gradients.float())
    cam = function(activations, gradients)
    assert cam.dtype == dtype
    torch.testing.assert_close(cam.float(), exact.to(dtype).float(), rtol=0, atol=0)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_compiles(function: Callable[..., Tensor]) -> None:
    compiled = torch.compile(function, fullgraph=True, backend="eager")
    activations, gradients = torch.rand(1, 4, 3, 3), torch.randn(1, 2, 4, 3, 3)
    torch.testing.assert_close(compiled(activations, gradients), function(activations, gradients))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_function_errors(function: Callable[..., Tensor]) -> None:
    activations, gradients = torch.rand(1, 4, 3, 3), torch.rand(1, 2, 4, 3, 3)
    with pytest.raises(ValueError, match=r"activations: expected shape \(B, D, h, w\)"):
        function(activations[0], gradients)
    with pytest.raises(ValueError, match=r"gradients: expected shape \(B, C, D, h, w\), got \(2, 4, 3, 3\)"):
        function(activations, gradients[0])
    with pytest.raises(ValueError, match=r"gradients: .* with D=4 from activations"):
        function(activations, gradients[:, :, 1:])
    with pytest.raises(TypeError, match="gradients: expected a floating-point tensor"):
        function(activations, gradients.long())


# ------------------------------------------------------------------------------------------ present_softmax


def test_present_softmax_by_hand() -> None:
    logits = torch.tensor(
        [[1.0, 9.0, 2.0, 3.0], [0.5, 0.0, 1.0, -1.0]], requires_grad=True
    )  # 3 classes, 1 prompt
    scores = present_softmax(logits, torch.tensor([[1, 0, 1], [0, 0, 0]]))
    expected = F.softmax(torch.tensor([1.0, 2.0, 3.0]), 0)
    torch.testing.assert_close(scores[0], torch.stack([expected[0], torch.tensor(0.0), expected[1]]))
    assert not scores[1].any()
    scores.sum().backward()
    assert logits.grad is not None
    assert logits.grad[0, 1] == 0  # an absent class has no part in it
    assert logits.grad.isfinite().all()


@pytest.mark.filterwarnings("ignore:Anomaly Detection:UserWarning")
def test_present_softmax_without_class_and_background() -> None:
    logits = torch.rand(1, 2, requires_grad=True)
    with torch.autograd.detect_anomaly(check_nan=True):
        scores = present_softmax(logits, torch.zeros(1, 2))
        assert scores.tolist() == [[0, 0]]
        scores.sum().backward()
    assert logits.grad is not None
    assert logits.grad.tolist() == [[0, 0]]


def test_present_softmax_gradcheck(generator: torch.Generator) -> None:
    logits = torch.randn(2, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[1, 0, 1], [0, 1, 0]])
    assert torch.autograd.gradcheck(lambda x: present_softmax(x, labels), logits)


def test_present_softmax_errors() -> None:
    with pytest.raises(ValueError, match=r"logits: expected at least C=3 columns from labels, got \(1, 2\)"):
        present_softmax(torch.rand(1, 2), torch.ones(1, 3))
    with pytest.raises(ValueError, match="labels: expected a multi-hot tensor"):
        present_softmax(torch.rand(1, 2), torch.full((1, 2), 2))
    with pytest.raises(ValueError, match=r"labels: .* with B=1"):
        present_softmax(torch.rand(1, 2), torch.ones(2, 2))
    with pytest.raises(TypeError, match="logits: expected a floating-point"):
        present_softmax(torch.ones(1, 2, dtype=torch.int64), torch.ones(1, 2))


# ------------------------------------------------------------------------------------------ extractors


@pytest.mark.parametrize("chunk_size", [1, 2, 8])
@pytest.mark.parametrize("target", ["1", "2", "4"])
@pytest.mark.parametrize(("extractor", "function"), list(zip(EXTRACTORS, FUNCTIONS, strict=True)))
def test_equals_one_class_at_a_time(extractor, function, target: str, chunk_size: int) -> None:
    model, image = network(), photos()
    maps = extractor(model, target, chunk_size=chunk_size)(image, LABELS)
    assert maps.shape[:2] == (3, 5)
    for b in range(3):
        for c in range(5):
            if not LABELS[b, c]:
                assert not maps[b, c].any()
                continue
            activations, gradients = plainly(model, model[int(target)], image[b], c)
            expected = function(activations[None], gradients[None, None])[0, 0]
            assert expected.any()
            torch.testing.assert_close(maps[b, c], expected)


@pytest.mark.parametrize("extractor", EXTRACTORS)
def test_tokens(extractor) -> None:
    model, image = Tokens(), photos()
    maps = extractor(model, reshape=to_grid)(image, LABELS)  # finds norm1: the model itself is the last block
    assert maps.shape == (3, 5, 3, 4)
    activations, gradients = plainly(model, model.norm1, image[0], 2)
    expected = by_formula(
        {GradCAM: grad_cam, GradCAMPlusPlus: grad_cam_plus_plus, LayerCAM: layer_cam}[extractor],
        to_grid(activations[None])[0],
        to_grid(gradients[None])[0],
    )
    torch.testing.assert_close(maps[0, 2], expected)
    assert maps[0, 2].any()
    torch.testing.assert_close(extractor(model, reshape=to_grid, chunk_size=3)(image, LABELS), maps)


def test_channels_last() -> None:
    class Last(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.movedim(1, -1)

    class First(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.movedim(-1, 1)

    plain = network()
    moved = nn.Sequential(*plain[:2], Last(), First(), *plain[2:])
    maps = GradCAM(moved, "2", reshape=First())(photos(), LABELS)
    torch.testing.assert_close(maps, GradCAM(plain, "1")(photos(), LABELS))


def test_pooled_features_give_the_class_activation_map() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)
    )
    maps = GradCAM(model)(photos())  # all classes
    torch.testing.assert_close(maps * 24, CAM(model)(photos()))
    torch.testing.assert_close(GradCAM(model, relu=True)(photos()), maps.relu())


@pytest.mark.parametrize("extractor", EXTRACTORS)
def test_batch_equals_singles(extractor) -> None:
    cam, image = extractor(network(), "4"), photos()
    singles = [cam(one[None], labels[None]) for one, labels in zip(image, LABELS, strict=True)]
    torch.testing.assert_close(cam(image, LABELS), torch.cat(singles))


@pytest.mark.parametrize("labels", [LABELS.bool(), LABELS.float(), LABELS.to(torch.uint8)])
def test_dtypes_of_labels(labels: Tensor) -> None:
    cam = GradCAM(network())
    assert torch.equal(cam(photos(), labels), cam(photos(), LABELS))


def test_no_label_at_all() -> None:
    maps = GradCAM(network(), "4")(photos(), torch.zeros(3, 5))
    assert maps.shape == (3, 5, 2, 3)
    assert not maps.any()
    assert not maps.requires_grad


def test_multi_scale() -> None:
    model = nn.Sequential(*network()[:3], nn.Conv2d(6, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with GradCAM(model, "2") as cam:
        maps = multi_scale_cam(lambda view: cam(view, LABELS), photos(), LABELS, scales=(1.0,), flip=False)
        torch.testing.assert_close(maps, cam(photos(), LABELS))


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("kind", [GradCAM, LayerCAM])
def test_multi_scale_hands_on_the_labels(kind: type[GradCAM], flip: bool) -> None:
    """Views are the plain images and then the mirrored ones: each gets the labels of its own image."""
    model = nn.Sequential(*network()[:3], nn.Conv2d(6, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    image, seen = photos(), []

    def score(logits: Tensor, labels: Tensor) -> Tensor:
        seen.append(labels)
        return logits

    with kind(model, "2", score=score) as cam:
        maps = multi_scale_cam(cam, image, LABELS, scales=(1.0, 2.0), flip=flip)
        assert [labels.tolist() for labels in seen] == [LABELS.tolist() * (2 if flip else 1)] * 2
        singles = [
            multi_scale_cam(
                lambda view, b=b: cam(view, LABELS[b : b + 1].expand(len(view), -1)),
                image[b : b + 1],
                LABELS[b : b + 1],
                scales=(1.0, 2.0),
                flip=flip,
            )
            for b in range(len(image))
        ]
    torch.testing.assert_close(maps, torch.cat(singles))
    assert maps.flatten(2).any(2).tolist() == LABELS.bool().tolist()


def test_multi_scale_without_labels_takes_all_classes() -> None:
    model = nn.Sequential(*network()[:3], nn.Conv2d(6, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    everything = torch.ones_like(LABELS)
    with GradCAM(model, "2") as cam:
        torch.testing.assert_close(multi_scale_cam(cam, photos()), multi_scale_cam(cam, photos(), everything))


def test_one_forward_and_as_many_backwards_as_classes_of_an_image() -> None:
    model = network()
    forwards, backwards = [], []

    class Count(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx, gradient: Tensor) -> Tensor:
            backwards.append(gradient)
            return gradient

    model[0].register_forward_hook(lambda *_: forwards.append(1))
    model[4].register_forward_hook(lambda _module, _inputs, output: Count.apply(output))
    GradCAM(model, "2")(photos(), LABELS)
    assert len(forwards) == 1
    assert len(backwards) == 3  # of 5 classes, 4 of them present somewhere


def test_nothing_in_front_of_the_layer_keeps_a_graph() -> None:
    model = network()
    seen = []
    model[0].register_forward_hook(lambda _module, _inputs, output: seen.append(output.requires_grad))
    model[3].register_forward_hook(lambda _module, _inputs, output: seen.append(output.requires_grad))
    maps = GradCAM(model, "1")(photos(), LABELS)
    assert seen == [False, True]
    assert not maps.requires_grad


@pytest.mark.parametrize("frozen", [False, True])
def test_parameters_get_no_gradient(frozen: bool) -> None:
    model = network().requires_grad_(not frozen)
    image = photos().requires_grad_()
    maps = GradCAM(model)(image, LABELS)
    assert maps[0, 0].any()
    assert image.grad is None
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.requires_grad is not frozen for parameter in model.parameters())


@pytest.mark.parametrize("chunk_size", [1, 4])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_caller_without_gradients(mode, chunk_size: int) -> None:
    cam = GradCAM(network(), "1", chunk_size=chunk_size)
    trained = GradCAM(network(), "1", create_graph=True, chunk_size=chunk_size)
    expected = cam(photos(), LABELS)
    with mode():
        image = photos()
        maps = cam(image, LABELS)
        assert not torch.is_grad_enabled()
    assert not maps.requires_grad
    assert not image.requires_grad
    torch.testing.assert_close(maps, expected)
    with mode():
        maps = trained(photos(), LABELS)
    assert not maps.requires_grad
    torch.testing.assert_close(maps, expected)
    assert torch.is_grad_enabled()


def test_network_with_its_own_no_grad() -> None:
    class Probe(nn.Module):
        """A frozen body under no_grad, and a head to train."""

        def __init__(self) -> None:
            super().__init__()
            self.body = network()[:3]
            self.head = nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                x = self.body(x)
            return self.head(x.amax((2, 3)))

    model = Probe()
    with pytest.raises(ValueError, match=r"target_layer: .* without a path .* create_graph=True keeps"):
        GradCAM(model)(photos(), LABELS)
    maps = GradCAM(model, create_graph=True)(photos(), LABELS)
    activations = model.body.eval()(photos())
    places = activations.flatten(2)
    gradients = (places == places.amax(2, keepdim=True)).float().view_as(activations)
    gradients = gradients[:, None] * model.head.weight[:, :, None, None]
    expected = grad_cam(activations, gradients) * LABELS[:, :, None, None]
    torch.testing.assert_close(maps, expected)


@pytest.mark.parametrize("chunk_size", [1, 4])
@pytest.mark.parametrize("extractor", EXTRACTORS)
def test_create_graph(extractor, chunk_size: int) -> None:
    """Gradients of the maps to the image and to parameters on both sides of the layer."""
    model = network(in_place=False).double()
    cam = extractor(model, "2", create_graph=True, chunk_size=chunk_size)
    image = photos(2, torch.float64).requires_grad_()

    def maps(image: Tensor, *_: Tensor) -> Tensor:
        return 1000 * cam(image, LABELS[:2])  # larger than the tolerance

    torch.testing.assert_close(maps(image), 1000 * extractor(model, "2")(image, LABELS[:2]))
    assert torch.autograd.gradcheck(maps, (image, model[0].weight, model[3].weight), fast_mode=True)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_create_graph_with_frozen_parameters() -> None:
    model = network().requires_grad_(False)
    maps = GradCAM(model, "2", create_graph=True)(photos(), LABELS)
    torch.testing.assert_close(maps, GradCAM(model, "2")(photos(), LABELS))


def test_training_through_the_maps_changes_them() -> None:
    model = network(in_place=False)
    cam = GradCAM(model, "2", create_graph=True)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    sums = []
    for _ in range(3):
        optimiser.zero_grad()
        loss = cam(photos(), LABELS).square().sum()
        loss.backward()
        optimiser.step()
        sums.append(loss.item())
    assert sums[2] < sums[1] < sums[0]


@pytest.mark.parametrize("chunk_size", [1, 4])
def test_autocast(chunk_size: int) -> None:
    cam = GradCAM(network(), "2", chunk_size=chunk_size)
    expected = cam(photos(), LABELS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = GradCAM(network(), "3", chunk_size=chunk_size)(photos(), LABELS)
        maps = cam(photos(), LABELS)
    assert low.dtype == torch.bfloat16
    error = (maps.float() - expected).abs().max() / expected.abs().max()
    assert error < 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    expected = GradCAM(network(), "2")(photos(), LABELS)
    maps = GradCAM(network().to(dtype), "2")(photos().to(dtype), LABELS)
    assert maps.dtype == dtype
    error = (maps.float() - expected).abs().max() / expected.abs().max()
    assert error < 0.05


def test_modes_hooks_come_back() -> None:
    model = network().train()
    model[1].eval()  # a frozen batch norm keeps its own mode
    modes = [module.training for module in model.modules()]
    with GradCAM(model, "2") as cam:
        for _ in range(2):
            cam(photos(), LABELS)
            assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == modes
    cam(photos(), LABELS)
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks for module in model.modules())


def test_everything_comes_back_on_error() -> None:
    model = network().train()
    cam = GradCAM(model, "2")
    with pytest.raises(RuntimeError), cam:
        cam(torch.rand(1, 4, 6, 8), LABELS[:1])  # four colour channels
    with pytest.raises(RuntimeError):
        cam(torch.rand(1, 3, 9, 9), LABELS[:1])  # fails behind the layer
    with pytest.raises(ZeroDivisionError):
        GradCAM(model, "2", score=lambda output, labels: 1 / 0)(photos(), LABELS)
    with torch.no_grad(), pytest.raises(RuntimeError):
        cam(torch.rand(1, 3, 9, 9), LABELS[:1])
    assert torch.is_grad_enabled()
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


def test_eval_mode_can_be_left_alone() -> None:
    model = network().train()
    with GradCAM(model, eval_mode=False):
        assert all(module.training for module in model.modules())


def test_nothing_stays_behind() -> None:
    """No call leaves a tensor."""
    model, image = network(), photos()
    cam = GradCAM(model, "2")

    def tensors() -> int:
        return sum(issubclass(type(value), Tensor) for value in gc.get_objects())

    cam(image, LABELS)
    gc.collect()
    gc.disable()  # freed at once, not by the collector
    try:
        before = tensors()
        for _ in range(5):
            cam(image, LABELS)
        assert tensors() == before
    finally:
        gc.enable()


def test_score_of_softmax() -> None:
    """Against the gradient of a softmax by hand: p (onehot - p), over present classes and background."""
    model, image = network(), photos(1)
    labels = torch.tensor([[1, 0, 1]])  # three classes, two background prompts
    maps = GradCAM(model, "4", score=present_softmax)(image, labels)
    assert maps.shape == (1, 3, 2, 3)
    logits = model.eval()(image)[0]
    taken = [0, 2, 3, 4]
    p = logits[taken].softmax(0)
    raw = GradCAM(model, "4")(image, torch.ones(1, 5))[0, taken]
    for position, c in ((0, 0), (1, 2)):
        onehot = torch.eye(4)[position]
        expected = torch.einsum("k,khw->hw", p[position] * (onehot - p), raw)
        torch.testing.assert_close(maps[0, c], expected)
    assert not maps[0, 1].any()


def test_score_function_sees_the_output_and_labels() -> None:
    class Dictionary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()

        def forward(self, x: Tensor, factor: float = 1.0) -> dict[str, Tensor]:
            return {"answer": self.inner(x) * factor}

    model = Dictionary()
    cam = GradCAM(model, "inner.4", score=lambda output, labels: output["answer"] * labels)
    expected = GradCAM(model.inner, "4")(photos(), LABELS)
    torch.testing.assert_close(cam(photos(), LABELS), expected)
    torch.testing.assert_close(cam(photos(), LABELS, factor=2.0), expected * 2)
    with pytest.raises(ValueError, match=r"score: expected a function .* the output is a dict"):
        GradCAM(model, "inner.4")(photos(), LABELS)
    with pytest.raises(ValueError, match=r"labels: expected image-level labels .* beside a score function"):
        cam(photos())


def test_output_with_logits_and_layer_with_a_tuple() -> None:
    """As the models of transformers have them."""

    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, str]:
            return x, "attention"

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()
            self.pair = Pair()

        def forward(self, x: Tensor) -> SimpleNamespace:
            x, word = self.pair(self.inner[:5](x))
            assert word == "attention"
            return SimpleNamespace(logits=self.inner[5:](x))

    model = Model()
    torch.testing.assert_close(
        GradCAM(model, "pair")(photos(), LABELS), GradCAM(model.inner, "4")(photos(), LABELS)
    )


def test_layer_that_runs_twice_counts_the_last_time() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()
            self.relu = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            x = self.relu(self.inner[:2](x))
            return self.inner[5:](self.relu(self.inner[3:5](x)))

    model = Twice()
    plain = nn.Sequential(*model.inner[:5], nn.ReLU(), *model.inner[5:])
    expected = GradCAM(plain, "5")(photos(), LABELS)
    torch.testing.assert_close(GradCAM(model, "relu")(photos(), LABELS), expected)
    torch.testing.assert_close(GradCAM(model, "relu", create_graph=True)(photos(), LABELS), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target_layer": "nope"}, "target_layer: expected the name of a module, got 'nope'; modules: .*'7'"),
        ({"target_layer": nn.ReLU()}, "target_layer: expected a module of the model"),
        ({"chunk_size": 0}, "chunk_size: expected an integer >= 1"),
    ],
)
def test_constructor_errors(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        GradCAM(network(), **arguments)


def test_tokens_ask_for_a_reshape() -> None:
    with pytest.raises(ValueError, match=r"reshape: expected a function .* a LayerNorm, returns \(tokens"):
        GradCAM(Tokens())
    with pytest.raises(ValueError, match=r"reshape: expected a function .* a LayerNorm, returns \(tokens"):
        GradCAM(Tokens(), "norm2")
    with pytest.raises(ValueError, match=r"target_layer: expected activations \(3, D, h, w\), got \(3, 5\)"):
        GradCAM(network(), "7")(photos(), LABELS)
    with pytest.raises(ValueError, match=r"reshape: expected activations \(3, D, h, w\), got \(3, 8, 12\)"):
        GradCAM(Tokens(), reshape=lambda x: x[:, 1:].transpose(1, 2))(photos(), LABELS)
    with pytest.raises(
        ValueError, match=r"reshape: expected activations \(3, D, h, w\), got \(1, 3, 13, 8\)"
    ):
        GradCAM(Tokens(), reshape=lambda x: x[None])(photos(), LABELS)


def test_call_errors() -> None:
    cam = GradCAM(network())
    with pytest.raises(ValueError, match=r"labels: expected shape \(B, C\), got \(5,\)"):
        cam(photos(), LABELS[0])
    with pytest.raises(ValueError, match=r"labels: .* with B=3 from scores, got \(2, 5\)"):
        cam(photos(), LABELS[:2])
    with pytest.raises(ValueError, match=r"labels: .* with C=5 from scores, got \(3, 4\)"):
        cam(photos(), LABELS[:, :4])
    with pytest.raises(ValueError, match="labels: expected a multi-hot tensor"):
        cam(photos(), LABELS * 2)
    with pytest.raises(ValueError, match=r"scores: expected shape \(B, C\)"):
        GradCAM(network()[:5], "1")(photos(), LABELS)


def test_layers_that_cannot_be_looked_at() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()
            self.unused = nn.Conv2d(3, 3, 1)
            self.dead = nn.Identity()
            self.whole = nn.Identity()
            self.words = Words()

        def forward(self, x: Tensor) -> Tensor:
            self.dead(x)
            self.whole(x.long())
            self.words(x)
            return self.inner(x)

    class Words(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"x": x}

    with pytest.raises(ValueError, match="target_layer: expected a layer that the network runs"):
        GradCAM(Odd(), "unused")(photos(), LABELS)
    with pytest.raises(ValueError, match=r"target_layer: .* without a path"):
        GradCAM(Odd(), "dead")(photos(), LABELS)
    with pytest.raises(ValueError, match=r"target_layer: .* without a path"):
        GradCAM(Odd().requires_grad_(False), "dead")(photos(), LABELS)
    with pytest.raises(TypeError, match=r"target_layer: expected a layer that returns .* got Tensor"):
        GradCAM(Odd(), "whole")(photos(), LABELS)
    with pytest.raises(TypeError, match=r"target_layer: expected a layer that returns .* got dict"):
        GradCAM(Odd(), "words")(photos(), LABELS)


@pytest.mark.parametrize("extractor", EXTRACTORS)
def test_devices(extractor, device: torch.device) -> None:
    model = network().to(device)
    for chunk_size in (1, 4):
        maps = extractor(model, "4", chunk_size=chunk_size)(photos().to(device), LABELS)
        assert maps.device.type == device.type
        torch.testing.assert_close(
            maps.cpu(), extractor(network(), "4")(photos(), LABELS), atol=1e-4, rtol=1e-3
        )
