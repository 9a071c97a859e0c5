"""Layers are found in real architectures, and their Grad-CAMs equal those of one class at a time."""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from pseudolabel.cam import CAM, GradCAM, find_classifier, find_target_layer, grad_cam

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries


class Case(NamedTuple):
    build: Callable[[Any], nn.Module]
    classifier: str | None
    target: str
    reshape: Callable[[Tensor], Tensor] | None = None
    size: int = 64


def grid(prefix: int) -> Callable[[Tensor], Tensor]:
    """Tokens behind the first few, as a square."""

    def reshape(x: Tensor) -> Tensor:
        x = x[:, prefix:].transpose(1, 2)
        return x.unflatten(2, (math.isqrt(x.shape[2]),) * 2)

    return reshape


def channels_first(x: Tensor) -> Tensor:
    return x.movedim(-1, 1)


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
STAGES = {"depths": [1, 1, 1, 1]}


def hf(name: str, **settings: Any) -> Callable[[Any], nn.Module]:
    def build(transformers: Any) -> nn.Module:
        config = getattr(transformers, f"{name}Config")(num_labels=3, **settings)
        return getattr(transformers, f"{name}ForImageClassification")(config)

    return build


def timm(name: str, **settings: Any) -> Callable[[Any], nn.Module]:
    return lambda library: library.create_model(name, num_classes=3, **settings)


def vision(name: str, **settings: Any) -> Callable[[Any], nn.Module]:
    return lambda library: getattr(library.models, name)(num_classes=3, **settings)


CASES = {
    "transformers": {
        "ResNet": Case(
            hf("ResNet", hidden_sizes=[8, 8, 8, 16], embedding_size=8, **STAGES),
            "classifier.1",
            "resnet.encoder.stages.3",
        ),
        "ConvNext": Case(
            hf("ConvNext", hidden_sizes=[8, 8, 8, 16], **STAGES), "classifier", "convnext.encoder.stages.3"
        ),
        "ViT": Case(
            hf("ViT", **SMALL, image_size=64), "classifier", "vit.layers.1.layernorm_before", grid(1)
        ),
        "DeiT": Case(
            hf("DeiT", **SMALL, image_size=64), "classifier", "deit.layers.1.layernorm_before", grid(2)
        ),
        "Dinov2": Case(
            hf("Dinov2", **SMALL, image_size=56), "classifier", "dinov2.encoder.layer.1.norm1", grid(1), 56
        ),
        "Swin": Case(
            hf("Swin", embed_dim=16, num_heads=[1, 1, 2, 2], window_size=2, image_size=64, **STAGES),
            "classifier",
            "swin.encoder.layers.3.blocks.0",
            grid(0),
        ),
        "CLIP": Case(
            lambda transformers: transformers.CLIPForImageClassification(
                transformers.CLIPConfig(
                    vision_config={**SMALL, "image_size": 64, "patch_size": 16},
                    text_config=SMALL,
                    num_labels=3,
                )
            ),
            "classifier",
            "vision_model.encoder.layers.1.layer_norm1",
            grid(1),
        ),
        "CLIP vision tower": Case(
            lambda transformers: transformers.CLIPVisionModelWithProjection(
                transformers.CLIPVisionConfig(**SMALL, image_size=64, patch_size=16, projection_dim=3)
            ),
            None,
            "vision_model.encoder.layers.1.layer_norm1",
            grid(1),
        ),
    },
    "timm": {
        "resnet18": Case(timm("resnet18"), "fc", "layer4"),
        "convnext_atto": Case(timm("convnext_atto"), "head.fc", "stages"),
        "efficientnet_b0": Case(timm("efficientnet_b0"), "classifier", "bn2"),
        "vit": Case(timm("vit_tiny_patch16_224", img_size=64, depth=2), "head", "blocks.1.norm1", grid(1)),
        "deit": Case(timm("deit_tiny_patch16_224", img_size=64, depth=2), "head", "blocks.1.norm1", grid(1)),
        "deit distilled": Case(
            timm("deit_tiny_distilled_patch16_224", img_size=64, depth=2), None, "blocks.1.norm1", grid(2)
        ),
        "dinov2 with registers": Case(
            timm("vit_small_patch14_reg4_dinov2", img_size=56, depth=2), "head", "blocks.1.norm1", grid(5), 56
        ),
        "swin": Case(
            timm(
                "swin_tiny_patch4_window7_224", img_size=64, window_size=2, depths=(1, 1, 1, 2), embed_dim=24
            ),
            "head.fc",
            "layers.3.blocks.1",
            channels_first,
        ),
    },
    "torchvision": {
        "resnet18": Case(vision("resnet18"), "fc", "layer4"),
        "vgg11": Case(vision("vgg11"), "classifier.6", "features"),
        "densenet121": Case(vision("densenet121"), "classifier", "features"),
        "mobilenet_v3_small": Case(vision("mobilenet_v3_small"), "classifier.3", "features"),
        "convnext_tiny": Case(vision("convnext_tiny"), "classifier.2", "features"),
        "vit_b_16": Case(
            vision("vit_b_16", image_size=64), "heads.head", "encoder.layers.encoder_layer_11.ln_1", grid(1)
        ),
        "swin_t": Case(vision("swin_t"), "head", "features.7.1", channels_first),
        "swin_v2_t": Case(vision("swin_v2_t"), "head", "features.7.1", channels_first),
    },
}

# End in pooling and one linear layer right behind the target layer.
POOLED = [
    ("transformers", "ResNet"),
    ("timm", "resnet18"),
    ("timm", "efficientnet_b0"),
    ("torchvision", "resnet18"),
]


@pytest.fixture(params=[(name, case) for name in CASES for case in CASES[name]], ids="-".join)
def case(request: pytest.FixtureRequest, library) -> Iterator[tuple[Case, nn.Module]]:
    name, kind = request.param
    found = CASES[name][kind]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = found.build(library(name)).eval()
        for parameter in model.parameters():
            if not parameter.any():  # some begin with a classifier of zeros
                nn.init.normal_(parameter, std=0.02)
        yield found, model


def logits(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    return output.logits if hasattr(output, "logits") else output.image_embeds


def test_layers_are_found(case: tuple[Case, nn.Module]) -> None:
    expected, model = case
    target = find_target_layer(model)
    assert target.name == expected.target
    assert (target.output == "tokens") == (expected.reshape is not None)
    if expected.classifier is None:
        with pytest.raises(ValueError, match="classifier: expected"):
            find_classifier(model)
    else:
        assert find_classifier(model).name == expected.classifier
    if expected.reshape is not None:
        with pytest.raises(ValueError, match="reshape: expected a function"):
            GradCAM(model)


@pytest.mark.parametrize("chunk_size", [1, 2])
def test_maps_equal_those_of_one_class_at_a_time(case: tuple[Case, nn.Module], chunk_size: int) -> None:
    expected, model = case
    image, labels = torch.rand(2, 3, expected.size, expected.size), torch.tensor([[1, 0, 1], [0, 1, 0]])
    score = None if expected.classifier else lambda output, _: logits(output)
    cam = GradCAM(model, reshape=expected.reshape, score=score, chunk_size=chunk_size)
    maps = cam(image, labels)
    assert maps.isfinite().all()

    kept: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        kept.append(output[0] if isinstance(output, tuple) else output)
        return output if isinstance(output, tuple) else output.clone()  # torchvision's go on in place

    handle = find_target_layer(model).module.register_forward_hook(keep)
    scores = logits(model(image))
    handle.remove()
    for c in range(3):
        (gradients,) = torch.autograd.grad(scores[:, c].sum(), kept[0], retain_graph=True)
        a, g = (
            value if expected.reshape is None else expected.reshape(value) for value in (kept[0], gradients)
        )
        plain = grad_cam(a.detach(), g[:, None])[:, 0]
        for b in range(2):
            wanted = plain[b] if labels[b, c] else torch.zeros_like(plain[b])
            torch.testing.assert_close(maps[b, c], wanted, rtol=1e-3, atol=1e-4 * plain.abs().max().item())
            assert bool(plain[b].any())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(("name", "kind"), POOLED)
def test_pooled_features_give_the_class_activation_map(name: str, kind: str, library) -> None:
    """Grad-CAM times the number of places is what `CAM` reads off the same network, which ends in pooling."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CASES[name][kind].build(library(name))
        image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        maps = CAM(model)(image)
        found = GradCAM(model)(image, torch.ones(1, 3))
    torch.testing.assert_close(found * maps[0, 0].numel(), maps, rtol=1e-3, atol=1e-4)
