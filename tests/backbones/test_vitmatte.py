"""The matting adapter of ViTMatte, on the network of the package transformers, and beside its processor."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pseudolabel.matting import ViTMatte, vitmatte_matting

pytestmark = pytest.mark.filterwarnings("ignore")  # of the library


def network(transformers: Any) -> nn.Module:
    backbone = transformers.VitDetConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        image_size=64,
        num_channels=4,
        window_size=2,
        residual_block_indices=[0],
        out_features=["stage2"],
    )
    config = transformers.VitMatteConfig(
        backbone_config=backbone, hidden_size=24, fusion_hidden_sizes=[16, 12, 8, 4]
    )
    torch.manual_seed(0)
    return transformers.VitMatteForImageMatting(config).eval()


def case() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (2, 3, 50, 70), generator=generator) / 255
    trimap = torch.full((2, 2, 50, 70), 0.5)
    trimap[:, :, :10] = 0
    trimap[:, 0, 30:], trimap[:, 1, 30:] = 1, 0
    return image, trimap


def test_network_from_memory_and_from_a_folder(library: Callable, tmp_path: Path) -> None:
    model = network(library("transformers"))
    image, trimap = case()
    alpha = vitmatte_matting(image, trimap, model)
    assert alpha.shape == trimap.shape
    assert float(alpha[:, 0, 10:30].std()) > 0
    assert torch.equal(alpha[:, :, :10], trimap[:, :, :10])
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(ViTMatte(tmp_path)(image, trimap), alpha)


def test_sees_what_its_processor_makes(library: Callable) -> None:
    transformers = library("transformers")
    image, trimap = case()
    photo = (image[0] * 255).round().byte().permute(1, 2, 0).numpy()
    known = np.where(trimap[0, 0] == 0.5, 128, 255 * trimap[0, 0].numpy()).astype(np.uint8)
    processor = transformers.VitMatteImageProcessor()
    expected = processor(images=photo, trimaps=known, return_tensors="pt")["pixel_values"]
    seen = []

    class Watch(nn.Module):
        def forward(self, x: Tensor) -> Any:
            seen.append(x)
            return type("Output", (), {"alphas": x[:, 3:]})

    vitmatte_matting(image[:1], trimap[:1], Watch())
    height, width = image.shape[2:]
    assert seen[0].shape == expected.shape
    # 128 / 255 is their half
    torch.testing.assert_close(
        seen[0][:, :, :height, :width], expected[:, :, :height, :width], atol=2e-3, rtol=0
    )
