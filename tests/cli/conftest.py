"""A small data set on disk: drawn scenes, labels, truth, and an untrained classifier of them."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pseudolabel import io
from pseudolabel.cli._scenes import CLASSES, draw_scenes
from pseudolabel.cli.demo import classifier

MODEL = "pseudolabel.cli.demo:classifier"


@pytest.fixture
def data(tmp_path: Path) -> SimpleNamespace:
    images, truth, labels = draw_scenes(5, (40, 48), generator=torch.Generator().manual_seed(3))
    names = [f"photo{index}" for index in range(5)]
    folders = SimpleNamespace(root=tmp_path, names=names, labels=labels, truth_maps=truth)
    for folder in ("images", "truth"):
        (tmp_path / folder).mkdir()
        setattr(folders, folder, tmp_path / folder)
    pixels = (images * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()
    for name, photo, mask in zip(names, pixels, truth, strict=True):
        from PIL import Image

        Image.fromarray(photo).save(tmp_path / "images" / f"{name}.png")
        io.write_mask(tmp_path / "truth" / f"{name}.png", mask)
    folders.csv = tmp_path / "labels.csv"
    write_labels(folders, names, labels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = classifier()
    folders.weights = tmp_path / "classifier.pt"
    torch.save(model.state_dict(), folders.weights)
    folders.out = tmp_path / "masks"
    folders.generate = lambda *more, out=folders.out: [
        *("generate", str(folders.images), "--labels", str(folders.csv), "--model", MODEL),
        *("--weights", str(folders.weights), "--out", str(out), "--scales", "1", "--no-crf", *more),
    ]
    folders.write_labels = lambda names, labels: write_labels(folders, names, labels)
    return folders


def write_labels(folders: SimpleNamespace, names: list[str], labels: torch.Tensor) -> None:
    io.write_labels(folders.csv, io.ImageLabels(tuple(names), CLASSES[1:], labels))
