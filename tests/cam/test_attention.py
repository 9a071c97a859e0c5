"""Attention caught from small networks written in the usual ways, and read as maps."""

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pseudolabel.cam import capture_attention, class_attention_map

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.softmax(q @ k.transpose(2, 3) * q.shape[-1] ** -0.5, dim=-1, dtype=torch.float64).to(q.dtype) @ v


def method(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q * q.shape[-1] ** -0.5 @ k.mT).softmax(dim=-1) @ v


def module(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return nn.Softmax(dim=-1)(q * q.shape[-1] ** -0.5 @ k.mT) @ v


def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q * q.shape[-1] ** -0.5 @ k.mT, 3) @ v


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


KINDS = [eager, method, module, function, fused]


class Attention(nn.Module):
    def __init__(self, kind: Callable[..., Tensor]) -> None:
        super().__init__()
        self.qkv, self.out, self.kind = nn.Linear(8, 24), nn.Linear(8, 8), kind

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(2, (2, 4)).transpose(1, 2) for part in self.qkv(x).chunk(3, 2))
        return self.out(self.kind(q, k, v).transpose(1, 2).flatten(2))

    def expected(self, x: Tensor) -> Tensor:
        q, k, _ = (part.unflatten(2, (2, 4)).transpose(1, 2) for part in self.qkv(x).chunk(3, 2))
        return (q @ k.mT / 2).softmax(-1)


class Tower(nn.Module):
    """Blocks of attention, with a classifier behind, whose softmax is no attention."""

    def __init__(self, kind: Callable[..., Tensor] = fused, depth: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Attention(kind) for _ in range(depth))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor, fail: bool = False) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        if fail:
            raise RuntimeError("half way")
        return self.head(x[:, 0]).softmax(1)

    def expected(self, x: Tensor) -> list[Tensor]:
        found = []
        for block in self.blocks:
            found.append(block.expected(x))
            x = x + block(x)
        return found


@pytest.fixture
def tokens(generator: torch.Generator) -> Tensor:
    return torch.randn(2, 7, 8, generator=generator, dtype=torch.float64)


def tower(kind: Callable[..., Tensor] = fused) -> Tower:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Tower(kind).double()


@pytest.mark.parametrize("kind", KINDS)
def test_all_ways_to_attend(kind: Callable[..., Tensor], tokens: Tensor) -> None:
    model = tower(kind)
    plain = model(tokens)
    with capture_attention(model) as attention:
        assert attention == []
        assert torch.equal(model(tokens), plain), "the network does as it did"
    assert len(attention) == 4
    for found, expected in zip(attention, model.expected(tokens), strict=True):
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(found.sum(3), torch.ones(2, 2, 7, dtype=found.dtype))
        assert not found.requires_grad


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ([0], [0]),
        ([-1], [3]),
        (range(-2, 0), [2, 3]),
        ([2, 0], [2, 0]),
        ([-3, 0, 3], [1, 0, 3]),
        ([-4], [0]),
        (iter([1]), [1]),
        ([], []),
    ],
)
def test_chosen_layers(layers: object, expected: list[int], tokens: Tensor) -> None:
    model = tower()
    with torch.no_grad(), capture_attention(model, layers) as attention:
        model(tokens)
        assert len(attention) == len(expected)
        model(tokens)
    layers_of = model.expected(tokens)
    assert len(attention) == len(expected)
    for found, layer in zip(attention, expected, strict=True):
        torch.testing.assert_close(found, layers_of[layer])


def test_layers_not_wanted_are_let_go(tokens: Tensor) -> None:
    """With the last two of four wanted, no more than two are ever kept; with the first one, just that."""
    for layers, most in ((range(-2, 0), 2), ([0], 1)):
        alive: list[weakref.ref] = []
        counts = []

        def watched(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            counts.append(sum(ref() is not None for ref in alive))  # noqa: B023
            probabilities = (q @ k.mT / 2).softmax(-1)
            alive.append(weakref.ref(probabilities))  # noqa: B023
            return probabilities @ v

        model = tower(watched)
        with torch.no_grad(), capture_attention(model, layers, detach=False) as attention:
            model(tokens)
        gc.collect()
        assert max(counts) <= most
        assert sum(ref() is not None for ref in alive) == len(attention) == most


def test_heads_may_be_averaged(tokens: Tensor) -> None:
    model = tower()
    with capture_attention(model, average_heads=True) as attention:
        model(tokens)
    for found, expected in zip(attention, model.expected(tokens), strict=True):
        torch.testing.assert_close(found, expected.mean(1, keepdim=True))


def test_list_is_of_the_last_run(tokens: Tensor) -> None:
    model = tower()
    with torch.no_grad(), capture_attention(model) as attention:
        model(tokens)
        first = list(attention)
        model(tokens[:1, :5])
        assert [layer.shape for layer in attention] == [(1, 2, 5, 5)] * 4
        tokens.flatten(0, 0).view(2, 1, 7, 8)[..., :7].softmax(-1)  # of the user, outside of the network
        fused(*[tokens[:, None]] * 3)
        assert len(attention) == 4
    assert first[0].shape == (2, 2, 7, 7)
    model(tokens)
    assert attention[0].shape == (1, 2, 5, 5), "nothing is caught any more"


def test_everything_is_restored(tokens: Tensor) -> None:
    model = tower().train()
    model.blocks[1].eval()
    modes = [module.training for module in model.modules()]
    with capture_attention(model) as attention:
        model(tokens)
        with pytest.raises(RuntimeError, match="half way"):
            model(tokens, fail=True)
        assert attention == []
        model(tokens)
        assert len(attention) == 4
    with pytest.raises(RuntimeError, match="half way"), capture_attention(model):
        model(tokens, fail=True)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert torch.overrides._get_current_function_mode() is None
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("kind", [eager, fused])
def test_gradients_on_demand(kind: Callable[..., Tensor], tokens: Tensor) -> None:
    model = tower(kind)
    tokens.requires_grad_()
    with capture_attention(model, [1], detach=False) as attention:
        model(tokens)
    loss = (attention[0] ** 2).sum()
    (found,) = torch.autograd.grad(loss, tokens)
    (expected,) = torch.autograd.grad((model.expected(tokens)[1] ** 2).sum(), tokens)
    torch.testing.assert_close(found, expected)
    with torch.no_grad(), capture_attention(model, [1], detach=False) as attention:
        model(tokens)
    assert not attention[0].requires_grad


def test_masks_scales_and_groups(tokens: Tensor) -> None:
    """All arguments of the fused attention, against values that read off the probabilities."""
    q, v = tokens.view(2, 7, 2, 4).transpose(1, 2), torch.eye(7, dtype=tokens.dtype).expand(2, 2, 7, 7)
    k = q.flip(2) * 1.7
    keep = torch.rand(7, 7, generator=torch.Generator().manual_seed(1)) > 0.3
    keep |= torch.eye(7, dtype=torch.bool)
    for settings in (
        {"scale": 0.1},
        {"is_causal": True},
        {"attn_mask": keep},
        {"attn_mask": torch.randn(2, 1, 7, 7, dtype=q.dtype), "scale": 0.3},
    ):
        model = nn.Module()
        model.forward = lambda settings=settings: F.scaled_dot_product_attention(q, k, v, **settings)
        with capture_attention(model) as attention:
            expected = model()
        torch.testing.assert_close(attention[0], expected)
    model.forward = lambda: F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], enable_gqa=True)
    with capture_attention(model) as attention:
        expected = model()
    torch.testing.assert_close(attention[0], expected)
    model.forward = lambda: F.scaled_dot_product_attention(q, k, v, dropout_p=0.9)
    with capture_attention(model) as attention:
        model()
    torch.testing.assert_close(attention[0], (q @ k.mT / 2).softmax(-1), msg="before dropout")


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("average", [False, True])
def test_multihead_attention(need_weights: bool, average: bool, tokens: Tensor) -> None:
    layer = nn.MultiheadAttention(8, 2, batch_first=True).double().eval()
    settings = {"need_weights": need_weights, "average_attn_weights": average}
    model = nn.Module()
    model.forward = lambda x: layer(x, x, x, **settings)
    plain, plain_weights = model(tokens)
    with torch.no_grad(), capture_attention(model) as attention:
        out, weights = model(tokens)
    torch.testing.assert_close(out, plain)
    assert (weights is None) == (plain_weights is None)
    if weights is not None:
        torch.testing.assert_close(weights, plain_weights)
    _, expected = layer(tokens, tokens, tokens, average_attn_weights=False)
    torch.testing.assert_close(attention[0], expected.detach())


def test_encoder_of_torch(tokens: Tensor) -> None:
    """Whose fast path calls none of this: it is not taken meanwhile."""
    block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
    model = nn.TransformerEncoder(block, 3, enable_nested_tensor=False).double().eval()
    with torch.no_grad():
        plain = model(tokens)
        with capture_attention(model) as attention:
            torch.testing.assert_close(model(tokens), plain)
    assert [layer.shape for layer in attention] == [(2, 2, 7, 7)] * 3
    first = model.layers[0]
    x = first.norm1(tokens)
    _, expected = first.self_attn(x, x, x, average_attn_weights=False)
    torch.testing.assert_close(attention[0], expected.detach())


def test_what_is_no_self_attention_is_left_out(tokens: Tensor) -> None:
    class Pooled(Tower):
        def forward(self, x: Tensor, fail: bool = False) -> Tensor:
            super().forward(x)
            q, k = x[:, None, :3], x[:, None]
            fused(q[:, :, :1], k, k)  # a pooling head
            fused(q, k, k)  # cross attention
            F.softmax(x.view(2, 7, 2, 4), dim=1)  # over another axis
            return x.view(2, 1, 7, 8).softmax(-1)  # not square

    with capture_attention(Pooled().double()) as attention:
        pass
    model = Pooled().double()
    with capture_attention(model) as attention:
        model(tokens)
    assert len(attention) == 4


def test_a_part_of_the_network(tokens: Tensor) -> None:
    model = tower()
    with torch.no_grad(), capture_attention(model.blocks[2]) as attention:
        model(tokens)
    x = tokens + model.blocks[0](tokens)
    torch.testing.assert_close(attention[0], model.blocks[2].expected(x + model.blocks[1](x)).detach())
    assert len(attention) == 1


def test_two_at_once(tokens: Tensor) -> None:
    model = tower()
    with capture_attention(model) as outer, capture_attention(model, [-1]) as inner:
        model(tokens)
    assert torch.equal(outer[-1], inner[0])
    assert (len(outer), len(inner)) == (4, 1)


def test_capture_errors(tokens: Tensor) -> None:
    linear = nn.Linear(8, 8).double()
    with (
        capture_attention(linear),
        pytest.raises(ValueError, match=r"expected attention .* from Linear"),
    ):
        linear(tokens)
    model = tower()
    for layers in ([4], [-5]):
        with (
            capture_attention(model, layers) as attention,
            pytest.raises(ValueError, match=r"layers: expected indices in -4..3 of the 4 layers"),
        ):
            model(tokens)
        assert attention == []
    with (
        pytest.raises(ValueError, match="layers: expected integers, got 'last'"),
        capture_attention(model, ["last"]),
    ):
        pass
    assert not model._forward_hooks


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_capture_dtypes(dtype: torch.dtype, device: torch.device, tokens: Tensor) -> None:
    model, tokens = tower().to(device, dtype), tokens.to(device, dtype)
    with torch.no_grad(), capture_attention(model, average_heads=True) as attention:
        model(tokens)
    expected = model.double().expected(tokens.double())[0].mean(1, keepdim=True)
    assert attention[0].dtype == dtype
    torch.testing.assert_close(attention[0].double(), expected, atol=1e-2, rtol=1e-2)


# ------------------------------------------------------------------------------------------ maps


def probabilities(dtype: torch.dtype = torch.float64) -> Tensor:
    """Three layers of two heads, 2 + 3 x 4 tokens: (B,L,heads,N,N)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, 2, 14, 14, generator=generator, dtype=torch.float64).softmax(-1).to(dtype)


def test_class_rows() -> None:
    attention = probabilities()
    settings = {"grid": (3, 4), "num_prefix_tokens": 2}
    maps = class_attention_map(attention, **settings)
    expected = attention[:, :, :, :1, 2:].mean((1, 2)).view(2, 1, 3, 4)
    torch.testing.assert_close(maps, expected)
    layers = list(attention.unbind(1))
    torch.testing.assert_close(class_attention_map(layers, **settings), expected)
    torch.testing.assert_close(
        class_attention_map(tuple(layers), size=(48, 64), num_prefix_tokens=2), expected
    )
    last = class_attention_map(attention, layers=[-1], **settings)
    torch.testing.assert_close(last, class_attention_map(layers[2], **settings))
    both = class_attention_map(attention, num_class_tokens=2, **settings)
    torch.testing.assert_close(both, attention[:, :, :, :2, 2:].mean((1, 2)).view(2, 2, 3, 4))
    highest = class_attention_map(attention, layer_reduction="max", head_reduction="max", **settings)
    torch.testing.assert_close(highest, attention[:, :, :, :1, 2:].amax((1, 2)).view(2, 1, 3, 4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": (3, 3)}, "attention: expected 11 tokens, 2 in front and 3 x 3 = 9 patches, got 14"),
        ({"num_class_tokens": 3}, "num_class_tokens: expected at most the 2 tokens in front, got 3"),
        ({"num_class_tokens": 0}, "num_class_tokens: expected an integer >= 1, got 0"),
        ({"layers": [3]}, r"layers: expected indices in -3..2 of the 3 layers of attention, got \[3\]"),
        ({"layers": []}, "layers: expected indices in -3..2"),
        ({"head_reduction": "sum"}, r"head_reduction: expected one of \['mean', 'max'\], got 'sum'"),
        ({"layer_reduction": "sum"}, r"layer_reduction: expected one of \['mean', 'max'\], got 'sum'"),
    ],
)
def test_map_errors(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        class_attention_map(probabilities(), **{"grid": (3, 4), "num_prefix_tokens": 2, **change})


def test_wrong_attention() -> None:
    good = probabilities().unbind(1)
    settings = {"grid": (3, 4), "num_prefix_tokens": 2}
    with pytest.raises(ValueError, match=r"attention: expected values in \[0, 1\]"):
        class_attention_map([good[0], good[0] * 20], **settings)  # scores, not probabilities
    with pytest.raises(ValueError, match="attention: expected layers of one batch size and one number"):
        class_attention_map([good[0], good[1][:1]], **settings)
    with pytest.raises(ValueError, match=r"attention: expected shape \(B, heads, N, N\)"):
        class_attention_map([good[0][0]], **settings)
    with pytest.raises(ValueError, match=r"attention: expected shape \(B, heads, N, N\)"):
        class_attention_map(good[0][..., 1:], **settings)
    with pytest.raises(ValueError, match="attention: expected at least one layer, got none"):
        class_attention_map([], **settings)
    with pytest.raises(TypeError, match="attention: expected a floating-point tensor"):
        class_attention_map(good[0].long(), **settings)


@pytest.mark.parametrize("dtype", FLOATS)
def test_map_dtypes_and_one_graph(dtype: torch.dtype, device: torch.device) -> None:
    attention = probabilities(dtype).to(device)

    def read(a: Tensor) -> Tensor:
        return class_attention_map(a, (3, 4), num_prefix_tokens=2)

    maps = read(attention)
    assert (maps.dtype, maps.device) == (dtype, attention.device)
    torch.testing.assert_close(maps, read(attention.double()).to(dtype))
    torch.testing.assert_close(torch.compile(read, fullgraph=True, backend="eager")(attention), maps)


def test_map_gradcheck() -> None:
    attention = probabilities()[:1, :2].requires_grad_()
    for reduction in ("mean", "max"):
        assert torch.autograd.gradcheck(
            lambda a: class_attention_map(a, (3, 4), num_prefix_tokens=2, head_reduction=reduction),  # noqa: B023
            attention,
        )
