"""`class_activation_map` and `CAM`."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pseudolabel.cam import CAM, class_activation_map


def linear_head() -> nn.Sequential:
    """Linear after pooling, all modules."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(8, 5),
    )


class Functional(nn.Module):
    """Activation and pooling as function calls; the head is a 1x1 convolution before or after the pooling."""

    def __init__(self, pool_first: bool, use_mean: bool = False) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 8, 3, stride=2)
        self.gate = nn.Conv2d(8, 8, 1)
        self.head = nn.Conv2d(8, 5, 1)
        self.pool_first = pool_first
        self.use_mean = use_mean

    def features(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu6(self.body(x))
        squeezed = F.adaptive_avg_pool2d(x, 1)  # a squeeze-and-excitation gate pools as well
        return x * torch.sigmoid(self.gate(squeezed))

    def pool(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3), keepdim=True) if self.use_mean else F.adaptive_avg_pool2d(x, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.features(x)
        return (self.head(self.pool(x)) if self.pool_first else self.pool(self.head(x))).flatten(1)


def test_hand_computed() -> None:
    features = torch.tensor([[[[1.0, 2.0]], [[3.0, -1.0]]]])
    weight = torch.tensor([[1.0, 1.0], [0.0, -2.0]])
    expected = torch.tensor([[[[4.0, 1.0]], [[-6.0, 2.0]]]])
    torch.testing.assert_close(class_activation_map(features, weight), expected)
    torch.testing.assert_close(class_activation_map(features, weight[:, :, None, None]), expected)
    torch.testing.assert_close(
        class_activation_map(features, weight, torch.tensor([10.0, 0.5])),
        expected + torch.tensor([10.0, 0.5])[:, None, None],
    )


def test_gradcheck(generator: torch.Generator) -> None:
    features = torch.randn(2, 3, 2, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(class_activation_map, (features, weight, bias))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_accumulates_in_float32(dtype: torch.dtype) -> None:
    # 4000 channels that cancel: their running sum would lose the remainder in half precision.
    features = torch.ones(1, 4001, 1, 1, dtype=dtype)
    weight = torch.tensor([[1.0, -1.0]]).repeat(1, 2000)
    weight = torch.cat([weight * 1000, torch.ones(1, 1)], dim=1)
    assert class_activation_map(features, weight).dtype == dtype
    assert class_activation_map(features, weight).item() == 1.0


def test_compiles() -> None:
    compiled = torch.compile(class_activation_map, fullgraph=True, backend="eager")
    features, weight = torch.rand(1, 4, 3, 3), torch.rand(2, 4)
    torch.testing.assert_close(compiled(features, weight), class_activation_map(features, weight))


@pytest.mark.parametrize(
    ("features", "weight", "bias", "error", "message"),
    [
        (torch.rand(4, 3, 3), torch.rand(2, 4), None, ValueError, r"features: expected shape \(B, D, h, w\)"),
        (torch.rand(1, 4, 3, 3), torch.rand(2, 5), None, ValueError, r"weight: .* with D=4 from features"),
        (torch.rand(1, 4, 3, 3), torch.rand(2, 4, 3, 3), None, ValueError, r"weight: .*got \(2, 4, 3, 3\)"),
        (
            torch.rand(1, 4, 3, 3),
            torch.rand(2, 4),
            torch.rand(3),
            ValueError,
            r"bias: .* with C=2 from weight",
        ),
        (
            torch.ones(1, 4, 3, 3, dtype=torch.int64),
            torch.rand(2, 4),
            None,
            TypeError,
            "features: expected a float",
        ),
        ([1.0], torch.rand(2, 4), None, TypeError, "features: expected a tensor"),
    ],
)
def test_errors(features, weight, bias, error, message) -> None:
    with pytest.raises(error, match=message):
        class_activation_map(features, weight, bias)


@pytest.mark.parametrize(
    "model",
    [
        linear_head(),
        Functional(pool_first=True),
        Functional(pool_first=False),
        Functional(True, use_mean=True),
    ],
    ids=["linear", "conv-after-pool", "conv-before-pool", "conv-after-mean"],
)
def test_maps_average_to_the_logits(model: nn.Module) -> None:
    """The definition of a class activation map: found right or not at all."""
    x = torch.rand(2, 3, 9, 11)
    maps = CAM(model, bias=True)(x)
    torch.testing.assert_close(maps.mean((2, 3)), model.eval()(x))
    assert maps.shape[1] == 5
    assert min(maps.shape[2:]) > 1


def test_squeeze_gates_are_not_taken_for_the_features() -> None:
    model = Functional(pool_first=True)
    x = torch.rand(1, 3, 9, 9)
    expected = class_activation_map(model.features(x), model.head.weight)
    torch.testing.assert_close(CAM(model)(x), expected)


def test_other_averages_are_not_taken_for_the_pooling() -> None:
    class Busy(Functional):
        def pool(self, x: torch.Tensor) -> torch.Tensor:
            pooled = super().pool(x)
            F.avg_pool2d(x + 1, 2)  # still smaller maps, no global pooling
            (x + 1).mean(1)
            return pooled

    model = Busy(pool_first=True)
    x = torch.rand(1, 3, 9, 9)
    torch.testing.assert_close(CAM(model, bias=True)(x).mean((2, 3)), model(x))


def test_as_many_classes_as_channels() -> None:
    """The pooling of the class maps, after the classifier, looks like that of features."""
    model = Functional(pool_first=False)
    model.head = nn.Conv2d(8, 8, 1)
    x = torch.rand(1, 3, 9, 9)
    torch.testing.assert_close(CAM(model, bias=True)(x).mean((2, 3)), model(x))


@pytest.mark.parametrize("target", ["2", 2], ids=["by name", "by module"])
def test_told_the_layer(target: str | int) -> None:
    model = linear_head()
    x = torch.rand(1, 3, 6, 6)
    layer = model[target] if isinstance(target, int) else target
    torch.testing.assert_close(CAM(model, layer)(x), CAM(model)(x))
    torch.testing.assert_close(CAM(model, layer, model[6].weight)(x), CAM(model)(x))
    torch.testing.assert_close(CAM(model, layer, "6")(x), CAM(model)(x))


def test_other_layers_give_other_maps() -> None:
    model = linear_head()
    x = torch.rand(1, 3, 6, 6) - 0.5
    assert not torch.allclose(CAM(model, "1")(x), CAM(model)(x))


def test_modes_hooks_and_grad_come_back() -> None:
    model = linear_head().train()
    model[1].eval()  # a frozen batch norm keeps its own mode
    modes = [module.training for module in model.modules()]
    with CAM(model) as cam:
        assert not any(module.training for module in model.modules())
        cam(torch.rand(1, 3, 6, 6))
        cam(torch.rand(1, 3, 6, 6))
        assert not any(module.training for module in model.modules()), (
            "a call inside the block leaves eval mode"
        )
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks for module in model.modules())
    cam(torch.rand(1, 3, 6, 6))
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())


def test_modes_and_hooks_come_back_on_error() -> None:
    model = linear_head().train()
    with pytest.raises(RuntimeError), CAM(model) as cam:
        cam(torch.rand(1, 4, 6, 6))  # four colour channels
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(RuntimeError):
        cam(torch.rand(1, 4, 6, 6))
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


def test_eval_mode_can_be_left_alone() -> None:
    model = linear_head().train()
    with CAM(model, eval_mode=False):
        assert all(module.training for module in model.modules())


def test_differentiable_to_input_and_weights() -> None:
    model = linear_head()
    x = torch.rand(1, 3, 6, 6, requires_grad=True)
    CAM(model)(x).sum().backward()
    assert x.grad is not None
    assert model[0].weight.grad is not None
    assert model[6].weight.grad is not None


def test_no_graph_is_kept_under_no_grad() -> None:
    with torch.no_grad():
        assert not CAM(linear_head())(torch.rand(1, 3, 6, 6)).requires_grad


def test_one_forward_for_all_classes() -> None:
    model = linear_head()
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    CAM(model)(torch.rand(2, 3, 6, 6))
    assert len(calls) == 1


def test_batch_equals_singles() -> None:
    model = linear_head()
    x = torch.rand(3, 3, 6, 6)
    with CAM(model) as cam:
        torch.testing.assert_close(cam(x), torch.cat([cam(one[None]) for one in x]))


def test_autocast() -> None:
    model = linear_head()
    x = torch.rand(1, 3, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = CAM(model)(x)
    torch.testing.assert_close(low.float(), CAM(model)(x), atol=0.05, rtol=0.05)


def test_one_pixel_feature_map() -> None:
    model = Functional(pool_first=False)
    assert CAM(model)(torch.rand(1, 3, 3, 3)).shape == (1, 5, 1, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target_layer": "nope"}, "target_layer: expected the name of a module, got 'nope'; modules: .*'6'"),
        ({"classifier": "nope"}, "classifier: expected the name of a module"),
        (
            {"classifier": "0"},
            r"classifier: expected nn.Linear or a 1x1 nn.Conv2d, got Conv2d; candidates: \['6'\]",
        ),
        ({"classifier": "2"}, "classifier: expected nn.Linear .* got ReLU"),
        ({"target_layer": nn.ReLU()}, "target_layer: expected a module of the model"),
        ({"classifier": torch.rand(5, 8)}, "classifier: expected a target_layer beside a weight tensor"),
        (
            {"classifier": torch.rand(5, 8), "target_layer": "2", "bias": True},
            "classifier: expected no bias beside a weight tensor",
        ),
    ],
)
def test_constructor_errors(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        CAM(linear_head(), **arguments)


def test_no_classifier() -> None:
    with pytest.raises(ValueError, match=r"classifier: expected an nn\.Linear or a 1x1"):
        CAM(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()))


def test_features_that_do_not_fit() -> None:
    model = linear_head()
    with pytest.raises(ValueError, match=r"target_layer: expected \(B, 8, h, w\).* got \[\(1, 8\)\]"):
        CAM(model, "4")(torch.rand(1, 3, 6, 6))
    flattened = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 5))
    with pytest.raises(ValueError, match=r"features .*: expected \(B, 128, h, w\).*give target_layer"):
        CAM(flattened)(torch.rand(1, 3, 6, 6))


def test_devices(device: torch.device) -> None:
    model = linear_head().to(device)
    assert CAM(model)(torch.rand(1, 3, 6, 6, device=device)).device.type == device.type
