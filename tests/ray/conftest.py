"""A Ray cluster of this machine, where Ray is installed: `make test-ray` installs it."""

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from pseudolabel import io
from pseudolabel.cli._scenes import CLASSES, draw_scenes
from pseudolabel.cli.demo import classifier

PHOTOS = 20
NETWORK = """
import os, time
from pathlib import Path
from torch import nn
from pseudolabel.cli import demo

HERE = Path(__file__).parent


class Watched(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = demo.classifier()

    def forward(self, images):
        if os.getpid() != {driver}:
            time.sleep(0.02)  # so that a run has a middle
            for kill in HERE.glob("kill*"):  # whose name says after how many masks
                if len(list((HERE / "ray").glob("*.png"))) >= int(kill.suffix[1:]):
                    kill.unlink()  # fails in all workers but one
                    os.kill(os.getpid(), 9)
        return self.net(images + len(images) / 50)  # so that it can be told what went together


def network():
    with (HERE / "opened").open("a") as file:
        file.write(f"{{os.getpid()}}\\n")
    if os.getpid() != {driver} and (HERE / "refuse").exists():
        raise RuntimeError("not here")
    return Watched()
"""


@pytest.fixture(scope="session")
def ray() -> Iterator[ModuleType]:
    """Ray, connected to a cluster of three processes for workers."""
    try:
        import ray
        import ray.data
    except Exception as error:  # noqa: BLE001  (a broken one fails in its own ways)
        pytest.skip(f"ray cannot be imported ({error}): run `make test-ray`")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(
        address="local",
        num_cpus=3,
        num_gpus=1,  # which nothing but shares of it is asked of
        object_store_memory=100 * 2**20,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    yield ray
    ray.shutdown()


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Photos of two sizes, labels, and in the current folder a network with its weights."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    module = f"nets_{tmp_path.name}"  # imported by this process, too, once a test
    (tmp_path / "photos").mkdir()
    names, rows = [f"photo{index:02d}" for index in range(PHOTOS)], []
    for half, size in enumerate(((40, 48), (48, 40))):
        images, _, labels = draw_scenes(PHOTOS // 2, size, generator=torch.Generator().manual_seed(half))
        for image, name in zip(images, names[half::2], strict=True):
            pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
            Image.fromarray(np.ascontiguousarray(pixels)).save(tmp_path / "photos" / f"{name}.png")
        rows.append(labels)
    labels = torch.stack(rows, 1).flatten(0, 1)
    labels[3] = 0
    io.write_labels(tmp_path / "labels.csv", io.ImageLabels(tuple(names), CLASSES[1:], labels))
    (tmp_path / f"{module}.py").write_text(NETWORK.format(driver=os.getpid()))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = classifier().state_dict()
    torch.save({f"net.{key}": value for key, value in state.items()}, tmp_path / "weights.pt")

    def generate(out: str, *more: str) -> list[str]:
        return [
            *("generate", "photos", "--labels", "labels.csv", "--model", f"{module}:network"),
            *("--weights", "weights.pt", "--out", out, "--save-cams", f"{out}_cams"),
            *("--scales", "1", "0.5", "--no-crf", *more),
        ]

    def opened() -> list[int]:
        """Process ids of the workers that have opened the network, once for each time."""
        file = tmp_path / "opened"
        pids = [int(line) for line in file.read_text().split()] if file.exists() else []
        return [pid for pid in pids if pid != os.getpid()]

    return SimpleNamespace(
        root=tmp_path, names=names, model=f"{module}:network", generate=generate, opened=opened
    )


@pytest.fixture
def files():
    """The files of a run by name: masks, maps, settings; the journal's lines in any order."""

    def read(root: Path, out: str) -> dict[str, object]:
        found = {
            f"{folder}/{path.name}": path.read_bytes()
            for folder in ("", "_cams")
            for path in (root / f"{out}{folder}").iterdir()
            if not path.name.startswith(".")
        }
        return {
            name: sorted(content.splitlines()) if name.endswith(".jsonl") else content
            for name, content in found.items()
        }

    return read
