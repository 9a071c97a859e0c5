"""`pseudolabel generate` on real architectures, from a folder and from a file of weights; no hub is asked."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from pseudolabel import io
from pseudolabel.cam import GradCAM, multi_scale_cam, normalize_cam, tokens_to_map
from pseudolabel.cli import main

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries

CLASSES = ("cat", "dog")
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
STAGES = {"hidden_sizes": [8, 8, 8, 16], "depths": [1, 1, 1, 1]}
NAMES = {0: "house", 1: "dog", 2: "cat, true cat"}


def hf(name: str, **settings: Any) -> Callable[[ModuleType], nn.Module]:
    def build(transformers: ModuleType) -> nn.Module:
        config = getattr(transformers, f"{name}Config")(id2label=NAMES, **settings)
        return getattr(transformers, f"{name}ForImageClassification")(config)

    return build


def clip(transformers: ModuleType) -> nn.Module:
    vision = {**SMALL, "image_size": 64, "patch_size": 16}
    config = transformers.CLIPConfig(vision_config=vision, text_config=SMALL, id2label=NAMES)
    return transformers.CLIPForImageClassification(config)


# What the message says about the maps.
HF = {
    "ResNet": (hf("ResNet", embedding_size=8, **STAGES), "CAM of .* logit"),
    "ConvNext": (hf("ConvNext", **STAGES), "Grad-CAM at .* because something stands between features"),
    "ViT": (hf("ViT", **SMALL, image_size=64), "4 x 4 places, 1 in front"),
    "DeiT": (hf("DeiT", **SMALL, image_size=64), "4 x 4 places, 2 in front"),
    "Dinov2": (hf("Dinov2", **SMALL, image_size=56), "4 x 4 places, 1 in front"),
    "Swin": (
        hf(
            "Swin",
            embed_dim=16,
            depths=[1, 1, 1, 2],
            num_heads=[1, 1, 2, 2],
            window_size=2,
            image_size=64,
        ),
        "2 x 2 places, 0 in front.*of sides below 64",
    ),
    "CLIP": (clip, "4 x 4 places, 1 in front"),
}
TIMM = {
    "resnet18": "CAM of .* logit",
    "convnext_atto": "Grad-CAM at .* because something stands between features",
    "efficientnet_b0": "CAM of .* logit",
    "vit_tiny_patch16_224": "14 x 14 places, 1 in front",
    "deit_tiny_distilled_patch16_224": "14 x 14 places, 2 in front",
    "swin_tiny_patch4_window7_224": "7 x 7 places, 0 in front",
    "mixer_s32_224": "7 x 7 places, 0 in front.*takes 224 x 224 alone",
}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    rng = np.random.default_rng(0)
    for name, size in (("a", (80, 100, 3)), ("b", (70, 96, 3))):
        Image.fromarray(rng.integers(0, 255, size, dtype=np.uint8)).save(tmp_path / "photos" / f"{name}.png")
    labels = io.ImageLabels(("a", "b"), CLASSES, torch.tensor([[1, 1], [0, 1]]))
    io.write_labels(tmp_path / "labels.csv", labels)
    return tmp_path


def filled(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        if not parameter.any():  # some begin with a classifier of zeros
            nn.init.normal_(parameter, std=0.02)
    return model.eval()


def generate(root: Path, model: str, *more: str, out: str = "masks") -> list[str]:
    return [
        *("generate", str(root / "photos"), "--labels", str(root / "labels.csv"), "--model", model),
        *("--method", "cam", "--scales", "1", "0.5", "--out", str(root / out)),
        *("--save-cams", str(root / f"{out}_cams"), *more),
    ]


def maps_of(root: Path, out: str = "masks") -> list[torch.Tensor]:
    return [io.read_cam(root / f"{out}_cams" / f"{name}.npz").dense(3).float() for name in "ab"]


def check(maps: list[torch.Tensor]) -> None:
    """Of a network by chance a map may be negative all over, but not all of them."""
    assert [tuple(found.shape) for found in maps] == [(2, 80, 100), (2, 70, 96)]
    assert not maps[1][0].any()  # an absent class
    assert maps[0].any() or maps[1].any()


@pytest.mark.parametrize("name", HF)
def test_transformers(name, library, photos, capsys):
    build, said = HF[name]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = filled(build(library("transformers")))
    model.save_pretrained(photos / "net")
    assert main(generate(photos, f"hf:{photos / 'net'}", "--workers", "2")) == 0
    err = " ".join(capsys.readouterr().err.split())
    assert re.search(said, err), err
    assert "2 of the network's 3 classes, by name" in err
    maps = maps_of(photos)
    check(maps)
    # Alone and in another order, photos get the same maps.
    assert main(generate(photos, f"hf:{photos / 'net'}", "--workers", "1", out="again")) == 0
    for found, again in zip(maps, maps_of(photos, "again"), strict=True):
        torch.testing.assert_close(found, again, atol=2e-3, rtol=0)
    # The same weights as a file, into the network of the folder's configuration.
    weights = ["--weights", str(photos / "net" / "model.safetensors")]
    assert main(generate(photos, f"hf:{photos / 'net'}", *weights, out="file")) == 0
    for found, again in zip(maps, maps_of(photos, "file"), strict=True):
        torch.testing.assert_close(found, again, atol=2e-3, rtol=0)


def test_vit_by_hand(library, photos):
    """The maps are those of the parts: positions interpolated, whole patches, classes at their places."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = filled(HF["ViT"][0](library("transformers")))
    model.save_pretrained(photos / "net")
    processor = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.5, 0.5], "do_normalize": True}
    (photos / "net" / "preprocessor_config.json").write_text(json.dumps(processor))
    assert main(generate(photos, f"hf:{photos / 'net'}", "--scales", "1")) == 0
    image = io.read_image(photos / "photos" / "a.png")[None]  # 80 x 100, so 80 x 96 of whole patches
    image = (image - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / 0.5

    def views_maps(views: torch.Tensor) -> torch.Tensor:
        views = nn.functional.interpolate(views, (80, 96), mode="bilinear", antialias=True)
        labels = torch.tensor([[0, 1, 1]]).expand(len(views), -1)
        return cam(views, labels, interpolate_pos_encoding=True)[:, [2, 1]]

    with GradCAM(model, reshape=lambda tokens: tokens_to_map(tokens, (5, 6))) as cam:
        wanted = normalize_cam(multi_scale_cam(views_maps, image, None, (1.0,)))
    torch.testing.assert_close(maps_of(photos)[0], wanted[0], atol=2e-3, rtol=0)


def test_an_untrained_head_is_refused(library, photos, capsys):
    transformers = library("transformers")
    config = transformers.ViTConfig(**SMALL, image_size=64)
    transformers.ViTModel(config, add_pooling_layer=False).save_pretrained(photos / "net")
    assert main(generate(photos, f"hf:{photos / 'net'}")) == 2
    assert "is no trained classifier: it lacks 2 weights" in capsys.readouterr().err


class Harm:
    def __reduce__(self):
        return (os.mkdir, ("should_not_be_made",))


@pytest.mark.parametrize("kind", ["hf", "timm"])
def test_folders_are_not_unpickled(kind, library, photos, capsys, monkeypatch):
    """Old files of weights in a folder are pickles: what they would run is not run."""
    monkeypatch.chdir(photos)
    if kind == "hf":
        HF["ViT"][0](library("transformers")).save_pretrained(photos / "net")
    else:
        timm = library("timm")
        timm.models.save_for_hf(timm.create_model("resnet18", num_classes=2), photos / "net")
    for path in (photos / "net").glob("*.safetensors"):
        path.unlink()
    torch.save({"classifier.weight": Harm()}, photos / "net" / "pytorch_model.bin")
    assert main(generate(photos, f"{kind}:{photos / 'net'}")) == 2
    assert "cannot be loaded from this folder" in capsys.readouterr().err
    assert not Path("should_not_be_made").exists()


@pytest.mark.parametrize("name", ["hf:someone/no-such-net", "timm:hf-hub:someone/no-such-net"])
def test_a_hub_out_of_reach(name, library, photos, capsys, monkeypatch):
    library("transformers"), library("timm")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(generate(photos, name)) == 2
    err = capsys.readouterr().err
    assert "is no folder here, and cannot be had from the library or its hub" in err


@pytest.mark.parametrize("name", TIMM)
def test_timm(name, library, photos, capsys):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = filled(library("timm").create_model(name, num_classes=2))
    torch.save(model.state_dict(), photos / "w.pth")
    more = ["--weights", str(photos / "w.pth"), "--scales", "1"]
    assert main(generate(photos, f"timm:{name}", *more)) == 0
    err = " ".join(capsys.readouterr().err.split())
    assert re.search(TIMM[name], err), err
    assert "2 of the network's 2 classes, in order" in err
    mean = model.pretrained_cfg["mean"]
    assert f"mean {mean}" in err
    check(maps_of(photos))


def test_timm_folder(library, photos, capsys):
    timm = library("timm")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model("resnet18", num_classes=2)
    timm.models.save_for_hf(model, photos / "net", model_config={"label_names": ["dog", "cat"]})
    assert main(generate(photos, f"timm:{photos / 'net'}", "--scales", "1")) == 0
    assert "2 of the network's 2 classes, by name" in " ".join(capsys.readouterr().err.split())


def test_timm_names_of_imagenet(library):
    from pseudolabel.cli._models import _timm_classes, class_places

    timm = library("timm")
    names = _timm_classes(timm, timm.create_model("resnet18"))
    assert len(names) == 1000
    assert class_places(["tench", "Toilet tissue"], names, 1000) == [0, 999]
