"""`find_classifier` and `find_target_layer`, on small imitations of known architectures."""

import pytest
import torch
from torch import nn

from pseudolabel.cam import CAM, find_classifier, find_target_layer


class Parts(nn.Module):
    """Named parts that run one after the other, some of them by a function."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part in self.children():
            x = part(x)
        return x


class Bottleneck(Parts):
    """A numbered block with 1x1 convolutions."""


class Block(Parts):
    """A transformer's block."""


def conv(kernel: int = 3) -> nn.Conv2d:
    return nn.Conv2d(4, 4, kernel)


def bottlenecks() -> nn.Sequential:
    return nn.Sequential(
        *(Bottleneck(conv1=conv(1), bn1=nn.BatchNorm2d(4), relu=nn.ReLU()) for _ in range(2))
    )


def block() -> Block:
    attention = Parts(qkv=nn.Linear(4, 12), proj=nn.Linear(4, 4))
    mlp = Parts(fc1=nn.Linear(4, 16), fc2=nn.Linear(16, 4))
    return Block(norm1=nn.LayerNorm(4), attn=attention, norm2=nn.LayerNorm(4), mlp=mlp)


def hf_block() -> Block:
    """Norms after the attention in the order of definition."""
    attention = Parts(q_proj=nn.Linear(4, 4), o_proj=nn.Linear(4, 4))
    return Block(attention=attention, layernorm_before=nn.LayerNorm(4), layernorm_after=nn.LayerNorm(4))


def blocks(kind=block) -> nn.ModuleList:
    return nn.ModuleList(kind() for _ in range(2))


def convnext_block() -> Block:
    return Block(dwconv=conv(), norm=nn.LayerNorm(4), pwconv1=nn.Linear(4, 16), pwconv2=nn.Linear(16, 4))


def se_block() -> Block:
    """Pools and convolves for its gate."""
    return Block(pool=nn.AdaptiveAvgPool2d(1), fc=conv(1), conv=conv())


def networks() -> dict[str, tuple[nn.Module, str | None, str | None, str]]:
    """Network, names of its classifier and target layer (None: refused), and what the latter returns."""
    pool, fc, identity = nn.AdaptiveAvgPool2d(1), nn.Linear(4, 3), nn.Identity()
    stages = [bottlenecks(), bottlenecks()]
    return {
        "ResNet": (
            Parts(conv1=conv(), layer1=stages[0], layer2=stages[1], avgpool=pool, fc=fc),
            "fc",
            "layer2",
            "maps",
        ),
        "ResNet with stages in a list": (
            Parts(
                resnet=Parts(
                    embedder=conv(),
                    encoder=Parts(
                        stages=nn.ModuleList(Parts(layers=nn.ModuleList(stage)) for stage in stages)
                    ),
                    pooler=pool,
                ),
                classifier=nn.Sequential(nn.Flatten(), fc),
            ),
            "classifier.1",
            "resnet.encoder.stages.1",
            "maps",
        ),
        "ResNet behind another head": (
            Parts(backbone=Parts(conv1=conv(), layer1=bottlenecks(), avgpool=pool, fc=identity), head=fc),
            "head",
            "backbone.layer1",
            "maps",
        ),
        "ResNet with a 1x1 convolution": (
            Parts(body=bottlenecks(), head=conv(1), pool=pool),
            "head",
            "body",
            "maps",
        ),
        "VGG": (
            Parts(
                features=nn.Sequential(conv(), nn.ReLU(), conv(), nn.ReLU(), nn.MaxPool2d(2)),
                avgpool=pool,
                classifier=nn.Sequential(
                    nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)
                ),
            ),
            "classifier.4",
            "features",
            "maps",
        ),
        "EfficientNet": (
            Parts(
                blocks=nn.Sequential(se_block(), se_block()), conv_head=conv(1), bn2=nn.BatchNorm2d(4), fc=fc
            ),
            "fc",
            "bn2",
            "maps",
        ),
        "one sequence": (
            nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU(), pool, nn.Flatten(), fc),
            "5",
            "2",
            "maps",
        ),
        "body and head in sequence": (
            nn.Sequential(nn.Sequential(conv(), nn.ReLU()), nn.Sequential(pool, nn.Flatten(), fc)),
            "1.2",
            "0",
            "maps",
        ),
        "ConvNeXt": (
            Parts(
                stages=nn.Sequential(convnext_block(), convnext_block()),
                head=Parts(norm=nn.LayerNorm(4), fc=fc),
            ),
            "head.fc",
            "stages",
            "maps",
        ),
        "ViT": (
            Parts(patch_embed=conv(), blocks=blocks(), norm=nn.LayerNorm(4), head=fc),
            "head",
            "blocks.1.norm1",
            "tokens",
        ),
        "ViT with named blocks": (
            Parts(encoder=Parts(encoder_layer_0=block(), encoder_layer_1=block()), heads=nn.Sequential(fc)),
            "heads.0",
            "encoder.encoder_layer_1.norm1",
            "tokens",
        ),
        "ViT with the norms defined late": (
            Parts(vit=Parts(layers=blocks(hf_block)), classifier=fc),
            "classifier",
            "vit.layers.1.layernorm_before",
            "tokens",
        ),
        "ViT with a 1x1 convolution": (
            Parts(patch_embed=conv(), blocks=blocks(), head=conv(1)),
            "head",
            "blocks.1.norm1",
            "tokens",
        ),
        "ViT in a sequence": (
            nn.Sequential(Parts(patch_embed=conv(), blocks=blocks()), fc),
            "1",
            "0.blocks.1.norm1",
            "tokens",
        ),
        "DeiT with two heads": (
            Parts(patch_embed=conv(), blocks=blocks(), head=fc, head_dist=nn.Linear(4, 3)),
            None,
            "blocks.1.norm1",
            "tokens",
        ),
        "Swin": (
            Parts(
                layers=nn.Sequential(Parts(blocks=blocks()), Parts(blocks=blocks())),
                norm=nn.LayerNorm(4),
                head=fc,
            ),
            "head",
            "layers.1.blocks.1",
            "tokens",
        ),
        "Swin with one block a stage": (
            Parts(layers=nn.Sequential(*(Parts(blocks=nn.ModuleList([block()])) for _ in range(3))), head=fc),
            "head",
            "layers.2.blocks.0",
            "tokens",
        ),
        "DINOv2": (
            Parts(embeddings=conv(), layer=blocks(), layernorm=nn.LayerNorm(4)),
            None,
            "layer.1.norm1",
            "tokens",
        ),
        "with a pooler": (
            Parts(layers=blocks(), pooler=Parts(dense=nn.Linear(4, 4))),
            None,
            "layers.1.norm1",
            "tokens",
        ),
        "CLIP vision tower": (
            Parts(pre_layernorm=nn.LayerNorm(4), layers=blocks(hf_block), post_layernorm=nn.LayerNorm(4)),
            None,
            "layers.1.layernorm_before",
            "tokens",
        ),
        "CLIP": (
            Parts(
                text_model=Parts(layers=blocks()),
                vision_model=Parts(layers=blocks()),
                visual_projection=nn.Linear(4, 3, bias=False),
            ),
            None,
            None,
            "",
        ),
        "convolutions behind the blocks": (
            Parts(
                stages=nn.Sequential(Parts(blocks=blocks(), fuse=conv())),
                final_conv=Parts(conv=conv()),
                fc=fc,
            ),
            "fc",
            "final_conv",
            "maps",
        ),
        "linear layers only": (nn.Sequential(nn.Linear(4, 4), nn.ReLU(), fc), "2", None, ""),
        "classifier only": (nn.Sequential(conv(1), pool), "0", None, ""),
        "nothing": (nn.Sequential(nn.ReLU()), None, None, ""),
    }


NAMES = list(networks())


@pytest.mark.parametrize("name", NAMES)
def test_classifier(name: str) -> None:
    model, expected, _, _ = networks()[name]
    if expected is None:
        with pytest.raises(ValueError, match="classifier: expected"):
            find_classifier(model)
        return
    found = find_classifier(model)
    assert found.name == expected
    assert found.module is dict(model.named_modules())[expected]
    assert found.output == "logits"
    assert expected in found.reason


@pytest.mark.parametrize("name", NAMES)
def test_target_layer(name: str) -> None:
    model, _, expected, output = networks()[name]
    if expected is None:
        with pytest.raises(ValueError, match="target_layer: expected"):
            find_target_layer(model)
        return
    found = find_target_layer(model)
    assert found.name == expected
    assert found.module is dict(model.named_modules())[expected]
    assert found.output == output
    assert expected in found.reason


def test_messages_list_candidates() -> None:
    made = networks()
    with pytest.raises(ValueError, match=r"got \['head', 'head_dist'\] side by side, all of shape \(3, 4\)"):
        find_classifier(made["DeiT with two heads"][0])
    with pytest.raises(ValueError, match=r"got none but those inside repeated blocks.*layer\.1\.mlp\.fc2"):
        find_classifier(made["DINOv2"][0])
    with pytest.raises(ValueError, match=r"got none; give classifier and target_layer; modules: \['0'\]"):
        find_classifier(made["nothing"][0])
    towers = r"\['text_model\.layers\.\*', 'vision_model\.layers\.\*'\]"
    with pytest.raises(ValueError, match=rf"one tower .* got {towers}.*'vision_model\.layers\.1\.norm1'"):
        find_target_layer(made["CLIP"][0])
    with pytest.raises(ValueError, match=r"got neither; name a layer, such as one of \['0', '1', '2'\]"):
        find_target_layer(made["linear layers only"][0])


def test_square_layers_may_follow_one_another() -> None:
    """Two layers of one shape are a chain where they keep the number of channels."""
    model = Parts(body=conv(), first=nn.Linear(4, 4), second=nn.Linear(4, 4))
    assert find_classifier(model).name == "second"


def test_a_model_that_is_a_layer() -> None:
    layer = nn.Conv2d(3, 4, 3)
    assert find_target_layer(layer)[:2] == ("", layer)
    assert find_classifier(nn.Linear(4, 3)).name == ""


def test_cam_finds_its_classifier_here() -> None:
    """A classifier that is defined before the body is not the last linear layer."""

    class Reversed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)
            self.body = nn.Sequential(nn.Conv2d(3, 4, 3), bottlenecks())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(self.body(x).mean((2, 3)))

    model = Reversed()
    assert CAM(model).classifier is model.fc
    assert CAM(model)(torch.rand(1, 3, 6, 6)).shape == (1, 3, 4, 4)
    with pytest.raises(ValueError, match="side by side"):
        CAM(networks()["DeiT with two heads"][0])
