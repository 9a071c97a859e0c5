"""Tokens, attention and position embeddings of real transformers, by whatever kernel they attend."""

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from pseudolabel.cam import (
    GradCAM,
    capture_attention,
    class_attention_map,
    interpolate_position_embedding,
    patch_token_cam,
    tokens_to_map,
)
from pseudolabel.refine import attention_affinity, box_mask, propagate_affinity

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries

SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}


class Case(NamedTuple):
    build: Callable[..., nn.Module]
    prefix: int
    patch: int = 16


def hf(name: str, **settings: Any) -> Callable[..., nn.Module]:
    def build(transformers: Any, kind: str) -> nn.Module:
        config = getattr(transformers, f"{name}Config")(**SMALL, **settings)
        config._attn_implementation = kind
        return getattr(transformers, f"{name}Model")(config)

    return build


def timm(name: str, **settings: Any) -> Callable[..., nn.Module]:
    def build(library: Any, kind: str) -> nn.Module:
        model = library.create_model(name, num_classes=3, depth=3, dynamic_img_size=True, **settings)
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = kind == "sdpa"
        return model

    return build


CASES = {
    "transformers": {
        "ViT": Case(hf("ViT", image_size=64), 1),
        "DeiT": Case(hf("DeiT", image_size=64), 2),
        "Dinov2": Case(hf("Dinov2", image_size=56, patch_size=14), 1, 14),
        "Dinov2WithRegisters": Case(hf("Dinov2WithRegisters", image_size=56, patch_size=14), 5, 14),
        "CLIP vision tower": Case(hf("CLIPVision", image_size=64, patch_size=16), 1),
    },
    "timm": {
        "vit_tiny_patch16_224": Case(timm("vit_tiny_patch16_224", img_size=64), 1),
        "deit_tiny_distilled_patch16_224": Case(timm("deit_tiny_distilled_patch16_224", img_size=64), 2),
        "vit_small_patch14_reg4_dinov2": Case(timm("vit_small_patch14_reg4_dinov2", img_size=56), 5, 14),
        "vit_base_patch16_clip_224": Case(timm("vit_base_patch16_clip_224", img_size=64, embed_dim=48), 1),
    },
}
ALL = [(library, name) for library in CASES for name in CASES[library]]


@pytest.fixture(params=["sdpa", "eager"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=ALL, ids="-".join)
def case(request: pytest.FixtureRequest, library, kind: str) -> Iterator[tuple[str, Case, nn.Module]]:
    name, which = request.param
    found = CASES[name][which]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield name, found, found.build(library(name), kind).eval()


class Features(nn.Module):
    """Tokens (B,N,D) behind the last block, at any image size."""

    def __init__(self, name: str, model: nn.Module) -> None:
        super().__init__()
        self.name, self.model = name, model

    def forward(self, image: Tensor) -> Tensor:
        if self.name == "timm":
            return self.model.forward_features(image)
        return self.outputs(image).last_hidden_state

    def outputs(self, image: Tensor, **settings: bool) -> Any:
        """Of transformers; some networks interpolate their positions on demand, others always."""
        if "interpolate_pos_encoding" in inspect.signature(self.model.forward).parameters:
            settings["interpolate_pos_encoding"] = True
        return self.model(image, **settings)


def test_attention_is_that_of_the_network(case: tuple[str, Case, nn.Module], kind: str) -> None:
    """Fused or not, at a size with another grid than the network was made for; the output stays the same."""
    name, expected, model = case
    grid = (3, 5)
    image = torch.rand(2, 3, grid[0] * expected.patch, grid[1] * expected.patch)
    features = Features(name, model)
    with torch.no_grad():
        plain = features(image)
        with capture_attention(features) as attention:
            assert torch.equal(features(image), plain)
    tokens = expected.prefix + grid[0] * grid[1]
    heads = {layer.shape[1] for layer in attention}
    assert [layer.shape for layer in attention] == [(2, heads.pop(), tokens, tokens)] * 3
    for layer in attention:
        torch.testing.assert_close(layer.sum(3), torch.ones(layer.shape[:3]))
    if name == "transformers" and kind == "eager":
        given = features.outputs(image, output_attentions=True).attentions
        for found, layer in zip(attention, given, strict=True):
            torch.testing.assert_close(found, layer)

    maps = tokens_to_map(plain, grid, num_prefix_tokens=expected.prefix)
    assert maps.shape == (2, plain.shape[2], 3, 5)
    assert torch.equal(maps, tokens_to_map(plain, size=image.shape[2:], num_prefix_tokens=expected.prefix))
    seen = class_attention_map(attention, grid, num_prefix_tokens=expected.prefix)
    assert seen.shape == (2, 1, 3, 5)
    affinity = attention_affinity(attention, layers=range(-2, 0), num_prefix_tokens=expected.prefix)
    labels = torch.tensor([[1, 0, 1], [0, 1, 0]])
    settings = {"cosine": True, "background": torch.randn(2, plain.shape[2]), "temperature": 0.1}
    cam = patch_token_cam(maps, torch.randn(3, plain.shape[2]), labels, **settings)
    spread = propagate_affinity(cam, affinity, labels, boxes=box_mask(cam, 0.4, labels))
    assert spread.shape == (2, 3, 3, 5)
    assert spread.isfinite().all()
    assert spread.flatten(2).any(2).tolist() == labels.bool().tolist()


@pytest.mark.parametrize("library_name", ["transformers", "timm"])
def test_fused_and_written_out_attention_agree(library_name: str, library) -> None:
    for found in CASES[library_name].values():
        caught = []
        image = torch.rand(1, 3, 4 * found.patch, 4 * found.patch)
        for kind in ("sdpa", "eager"):
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model = Features(library_name, found.build(library(library_name), kind).eval())
            with torch.no_grad(), capture_attention(model) as attention:
                model(image)
            caught.append(attention)
        for fused, eager in zip(*caught, strict=True):
            torch.testing.assert_close(fused, eager, atol=1e-5, rtol=1e-3)


def test_torchvision(library) -> None:
    model = library("torchvision").models.vit_b_16(image_size=64, num_classes=3).eval()
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        plain = model(image)
        with capture_attention(model, [-1], average_heads=True) as attention:
            torch.testing.assert_close(model(image), plain)
    assert [layer.shape for layer in attention] == [(1, 1, 17, 17)]


def test_swin(library) -> None:
    """Attention in windows, an element of the batch each; maps with channels last, or no token in front."""
    swin = library("timm").create_model(
        "swin_tiny_patch4_window7_224", img_size=64, window_size=2, depths=(1, 1, 1, 2), embed_dim=24
    )
    image = torch.rand(2, 3, 64, 64)
    with torch.no_grad(), capture_attention(swin.eval()) as attention:
        last = swin(image)
        maps = tokens_to_map(swin.forward_features(image))
    assert last.shape == (2, 1000)
    assert maps.shape == (2, 192, 2, 2)
    assert [tuple(layer.shape[2:]) for layer in attention] == [(4, 4)] * 5
    transformers = library("transformers")
    config = transformers.SwinConfig(
        embed_dim=16, depths=[1, 1], num_heads=[1, 2], window_size=2, image_size=64
    )
    tokens = transformers.SwinModel(config).eval()(image).last_hidden_state
    assert tokens_to_map(tokens, (8, 8), num_prefix_tokens=0).shape == (2, 32, 8, 8)


def test_gradient_cam_of_tokens(library) -> None:
    """`tokens_to_map` as the `reshape` of gradient CAMs, at two sizes with one setting."""
    model = library("timm").create_model(
        "vit_tiny_patch16_224", img_size=64, depth=2, num_classes=3, dynamic_img_size=True
    )
    size = (64, 96)
    cam = GradCAM(model, reshape=partial(tokens_to_map, size=size))
    for scale in (1, 2):
        image = torch.rand(2, 3, size[0] * scale, size[1] * scale)
        maps = cam(image, torch.tensor([[1, 0, 1], [0, 1, 0]]))
        assert maps.shape == (2, 3, 4 * scale, 6 * scale)
        assert maps.flatten(2).any(2).tolist() == [[True, False, True], [False, True, False]]


@pytest.mark.parametrize("new", [(5, 7), (2, 3), (4, 4)])
def test_positions_as_in_timm(new: tuple[int, int], library) -> None:
    library("timm")
    from timm.layers import resample_abs_pos_embed

    embedding = torch.randn(1, 1 + 16, 8)
    expected = resample_abs_pos_embed(embedding, list(new), [4, 4])
    torch.testing.assert_close(interpolate_position_embedding(embedding, (4, 4), new), expected)


@pytest.mark.parametrize("new", [(5, 7), (2, 3), (4, 4)])
def test_positions_as_in_transformers(new: tuple[int, int], library) -> None:
    embeddings = CASES["transformers"]["Dinov2"].build(library("transformers"), "sdpa").embeddings
    tokens = torch.zeros(1, 1 + new[0] * new[1], 32)
    expected = embeddings.interpolate_pos_encoding(tokens, 14 * new[0], 14 * new[1])
    found = interpolate_position_embedding(embeddings.position_embeddings, (4, 4), new, antialias=False)
    torch.testing.assert_close(found, expected)
