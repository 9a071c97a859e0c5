"""Foreground of any class on real photos: saliency from frozen features, beside what else is at hand.

    python benchmarks/voc_saliency.py [--data FOLDER] [--limit N] [--json FILE]

Saliency comes from the features of a MobileNetV2 that has seen ImageNet labels, and from nothing else; the
class activation maps have been trained on the labels of these photos, and are masked by them. A threshold is
chosen on one half of the photos and scored on the other, both ways round, and the counts of both are added.

Data and weights are found as in `voc_animals.py`.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
import voc_animals as animals
from torch import Tensor, nn
from torch.nn import functional as F
from voc_segmenter import DEEP, features, saliency, sharpened

import pseudolabel as pl
from pseudolabel.refine import CRF_PRESETS, DenseCRF

THRESHOLDS = [step / 100 for step in range(100)]
HALF = THRESHOLDS.index(0.5)

Way = Callable[[animals.Photo], Tensor]


# ---------------------------------------------------------------------------------------------------- ways


def everything(photo: animals.Photo) -> Tensor:
    return torch.ones(photo.truth.shape)


def ellipse(photo: animals.Photo) -> Tensor:
    """A Gaussian in the middle of the photo. Its width does not matter where a threshold is chosen."""
    y, x = (torch.linspace(-1, 1, size) for size in photo.truth.shape[1:])
    return torch.exp(-(y[:, None] ** 2 + x**2))[None]


def activation(photo: animals.Photo) -> Tensor:
    return photo.cam.amax(1)


def about_the_mean(net: nn.Module, photo: animals.Photo) -> Tensor:
    """The first principal component as it is usually taken, about the mean of all positions."""
    x = features(net, photo.image * 2 - 1)[0, :DEEP].float()
    size, x = x.shape[1:], x.flatten(1)
    x = x - x.mean(1, keepdim=True)
    y = (torch.linalg.eigh(x @ x.T).eigenvectors[:, -1] @ x).view(1, 1, *size)
    inside = y[..., 1:-1, 1:-1].mean()
    y = y if inside > y.mean() else -y
    found = torch.sigmoid(y / y.std())
    return F.interpolate(found, size=photo.truth.shape[1:], mode="bilinear")[0]


def unit_length(net: nn.Module, photo: animals.Photo) -> Tensor:
    deep = F.normalize(features(net, photo.image * 2 - 1)[:, :DEEP].float(), dim=1)
    return in_size(pl.cam.saliency_from_features(deep), photo)


def last_layer(net: nn.Module, photo: animals.Photo) -> Tensor:
    """From the layer that the class activation maps come from."""
    with torch.inference_mode():
        return in_size(pl.cam.saliency_from_features(net.features(photo.image * 2 - 1)), photo)


def with_crf(net: nn.Module, crf: DenseCRF, photo: animals.Photo) -> Tensor:
    return sharpened(saliency(net, photo.image), photo.image, crf)


def in_size(found: Tensor, photo: animals.Photo) -> Tensor:
    return F.interpolate(found[:, None], size=photo.truth.shape[1:], mode="bilinear")[:, 0]


# ------------------------------------------------------------------------------------------------- scoring


def counts(way: Way, photo: animals.Photo) -> Tensor:
    """Background and foreground, true and predicted, of each threshold: (T,2,2)."""
    truth = photo.truth.where(photo.truth == 255, (photo.truth > 0).to(torch.uint8))
    return pl.metrics.background_sweep(way(photo)[:, None], truth, THRESHOLDS)


def score(name: str, found: Tensor, several: Tensor) -> dict:
    """Figures of the counts (N,T,2,2) of all photos."""
    halves = torch.arange(len(found)) % 2
    miou = torch.stack(
        [pl.metrics.iou_from_confusion(found[halves == half].sum(0)).mean(-1) for half in (0, 1)]
    )
    best = miou.argmax(1)
    chosen = best[1 - halves]  # each photo with the threshold of the other half
    scored = found[torch.arange(len(found)), chosen]
    iou = {
        "all": pl.metrics.iou_from_confusion(scored.sum(0)),
        "one": pl.metrics.iou_from_confusion(scored[~several].sum(0)),
        "several": pl.metrics.iou_from_confusion(scored[several].sum(0)),
        "half": pl.metrics.iou_from_confusion(found[:, HALF].sum(0)),
    }
    return {
        "way": name,
        "chosen": [THRESHOLDS[threshold] for threshold in best.tolist()],
        "miou": float(iou["all"].mean()),
        **{f"foreground_{part}": float(value[1]) for part, value in iou.items()},
    }


def table(rows: Sequence[dict]) -> Iterator[str]:
    yield "| foreground from | chosen | mIoU | foreground | one class | several | foreground at 0.5 |"
    yield "|---|---|---|---|---|---|---|"
    for row in rows:
        figures = [row["miou"], *(row[f"foreground_{part}"] for part in ("all", "one", "several", "half"))]
        cells = [row["way"], " / ".join(f"{value:g}" for value in row["chosen"])]
        yield "| " + " | ".join([*cells, *(f"{figure:.3f}".lstrip("0") for figure in figures)]) + " |"


def main() -> None:
    options = arguments()
    start = time.process_time()
    photos = animals.read_photos(options.data, options.limit, animals.read_classes(options.data))
    workers = animals.Workers(options.workers)
    net = animals.load_network(options.weights, 16)
    views = workers.map("features to train on", partial(animals.pooled_features, net), photos)
    labels = [photo.labels.float().expand(len(view), -1) for photo, view in zip(photos, views, strict=True)]
    weight = animals.train_classifier(torch.cat(views), torch.cat(labels))
    workers.map("class activation maps", partial(animals.add_maps, net, weight), photos)

    ways: dict[str, Way] = {
        "the whole photo": everything,
        "an ellipse in the middle": ellipse,
        "CAM, the largest of the present classes": activation,
        "first component about the mean": partial(about_the_mean, net),
        "`saliency_from_features`": lambda photo: saliency(net, photo.image),
        "of features of unit length": partial(unit_length, net),
        "of the features of the CAM": partial(last_layer, net),
        "and CRF `deeplab`": partial(with_crf, net, DenseCRF(**CRF_PRESETS["deeplab"])),
    }
    several = torch.tensor([bool(photo.labels.sum() > 1) for photo in photos])
    rows = [
        score(name, torch.stack(workers.map(name, partial(counts, way), photos)), several)
        for name, way in ways.items()
    ]
    print(f"\n{len(photos)} photos, {int(several.sum())} of several classes; ", end="")
    print(f"{time.process_time() - start:.0f} s of CPU in all\n")
    print("\n".join(table(rows)))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


def arguments() -> argparse.Namespace:
    data = Path(os.environ.get("PSEUDOLABEL_DATA", animals.SHARED)) / "voc-animals"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=data, help="folder of photos with masks")
    parser.add_argument("--limit", type=int, help="photos, for a quick look")
    parser.add_argument("--workers", type=int, default=2, help="threads")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    options.weights = Path(os.environ.get("PSEUDOLABEL_WEIGHTS", animals.SHARED / "weights"))
    for path in (options.data / "classes.txt", options.data / "masks", options.weights / "net.py"):
        if not path.exists():
            sys.exit(f"{path} is missing: name the data by PSEUDOLABEL_DATA and PSEUDOLABEL_WEIGHTS")
    return options


if __name__ == "__main__":
    main()
