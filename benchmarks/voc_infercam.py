"""Class-conditional inference on real photos: what looking again adds to maps and masks, and what it costs.

    python benchmarks/voc_infercam.py [--scales S ...] [--limit N] [--variants] [--json FILE]

Photos, classifier, halves and scores are those of `voc_animals.py`, whose options `--train` and `--limit` and
whose environment variables are the same here. Maps from one scale, from several, and from class-conditional
inference at those same scales are scored against a threshold, and followed by smoothing and proportional
masks (with the CRF `deeplab`). `--variants` adds rows that change the inference, and leaves out what follows
the maps.
"""

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import voc_animals as animals
from torch import Tensor, nn

import pseudolabel as pl
from pseudolabel.refine import CRF_PRESETS, DenseCRF

VARIANTS: dict[str, dict[str, object]] = {
    "1 pass": {"max_passes": 1},
    "2 passes": {"max_passes": 2},
    "no split": {"split": False},
    "no split, 2 passes": {"split": False, "max_passes": 2},
    "stop at 0.01": {"stop_fraction": 0.01},
    "erase from 0.5": {"erase_threshold": 0.5},
    "erase from 0.9": {"erase_threshold": 0.9},
    "classes alone": {"joint": False},
    "the full image as well": {"include_full_image": True},
    "least response 10": {"min_response": 10.0},
    "least response 20": {"min_response": 20.0},
}


def identity(cam: Tensor) -> Tensor:
    return cam


def look(
    net: nn.Module, weight: Tensor, see: Callable[..., tuple[Tensor, float]], photo: animals.Photo
) -> tuple[animals.Photo, float, int]:
    """The photo with normalised maps, the mean passes of a patch, and the views that the network got."""
    views = 0

    def cam_fn(image: Tensor) -> Tensor:
        nonlocal views
        views += len(image)
        return pl.cam.class_activation_map(net.features(image), weight[photo.labels[0]]).clamp(min=0)

    start = time.thread_time()
    with torch.inference_mode():
        present = photo.labels[:, photo.labels[0]]
        maps, passes = see(cam_fn, photo.image * 2 - 1, present)
        seen = dataclasses.replace(photo, maps=maps.clone())
    seen.seconds = time.thread_time() - start
    return seen, passes, views


def multi_scale(
    cam_fn: Callable, image: Tensor, labels: Tensor, *, scales: tuple[float, ...]
) -> tuple[Tensor, float]:
    return pl.cam.normalize_cam(pl.cam.multi_scale_cam(cam_fn, image, labels, scales)), 1.0


def infer(cam_fn: Callable, image: Tensor, labels: Tensor, **settings: object) -> tuple[Tensor, float]:
    found = pl.cam.infer_response_map(cam_fn, image, labels, **settings)
    return found.response, found.passes.double().mean().item()


def table(rows: list[dict]) -> Iterator[str]:
    """The table of `voc_animals.py` with the cost of the maps."""
    for number, line in enumerate(animals.table(rows)):
        if number == 0:
            yield f"{line} passes | views | s/image, maps |"
        elif number == 1:
            yield f"{line}---|---|---|"
        else:
            row = rows[number - 2]
            yield f"{line} {row['passes']:.1f} | {row['views']:.0f} | {row['map_seconds']:.2f} |"


def main() -> None:
    options = arguments()
    start = time.perf_counter()
    classes = animals.read_classes(options.train[0])
    trained = [animals.read_photos(folder, options.limit, classes) for folder in options.train]
    photos = trained[0]
    workers = animals.Workers(options.workers)
    net = animals.load_network(options.weights, stride=16)
    training = [photo for folder in trained for photo in folder]
    features = workers.map("features to train on", partial(animals.pooled_features, net), training)
    labels = [
        photo.labels.float().expand(len(seen), -1) for photo, seen in zip(training, features, strict=True)
    ]
    weight = animals.train_classifier(torch.cat(features), torch.cat(labels))

    scales = tuple(options.scales)
    sights: dict[str, Callable] = {
        "CAM, scale 1": partial(multi_scale, scales=(1.0,)),
        f"CAM, scales {', '.join(f'{scale:g}' for scale in scales)}": partial(multi_scale, scales=scales),
        "class-conditional": partial(infer, scales=scales),
    }
    if options.variants:
        sights |= {name: partial(infer, scales=scales, **changed) for name, changed in VARIANTS.items()}
    rows = []
    for name, see in sights.items():
        found = workers.map(name, partial(look, net, weight, see), photos)
        seen = [photo for photo, _, _ in found]
        halves = seen[0::2], seen[1::2]
        cost = {
            "passes": statistics.fmean(passes for _, passes, _ in found),
            "views": statistics.fmean(views for _, _, views in found),
            "map_seconds": statistics.fmean(photo.seconds for photo in seen),
        }
        ways = [animals.Way(name, partial(animals.threshold, smooth=identity), smooth=identity)]
        if not options.variants:
            proportional = partial(animals.proportional, crf=DenseCRF(**CRF_PRESETS["deeplab"]))
            ways.append(animals.Way(f"{name} + CVS + PPMG", proportional, tuple(options.exponents)))
        for way in ways:
            scorer = animals.Scorer(workers, 1 + len(classes))
            rows.append(animals.score_way(scorer, way, [halves, halves[::-1]]) | cost)

    print(
        f"\n{len(training)} photos to train on, {len(photos)} scored; maps masked by the true image labels\n"
        f"CPU time of one thread; {options.workers} threads, {time.perf_counter() - start:.0f} s in all\n"
    )
    print("\n".join(table(rows)))
    if options.json:
        options.json.write_text(
            json.dumps({"classes": ["background", *classes], "rows": rows}, indent=1) + "\n"
        )


def arguments() -> argparse.Namespace:
    data = Path(os.environ.get("PSEUDOLABEL_DATA", animals.SHARED)) / "voc-animals"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--train",
        type=Path,
        nargs="+",
        default=[data, data / "extra"],
        help="folders to train on; the first is scored",
    )
    parser.add_argument("--scales", type=float, nargs="+", default=[0.5, 1.0], help="of the maps")
    parser.add_argument(
        "--exponents", type=float, nargs="+", default=[0.7, 1.0, 1.4, 2.0], help="to choose from"
    )
    parser.add_argument(
        "--variants", action="store_true", help="rows with a changed setting, against a threshold alone"
    )
    parser.add_argument("--limit", type=int, help="photos of each folder, for a quick look")
    parser.add_argument("--workers", type=int, default=2, help="threads")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    options.weights = Path(os.environ.get("PSEUDOLABEL_WEIGHTS", animals.SHARED / "weights"))
    for file in (
        options.train[0] / "masks",
        *(folder / "labels.csv" for folder in options.train),
        options.weights / "net.py",
    ):
        if not file.exists():
            sys.exit(f"{file} is missing: name the data by PSEUDOLABEL_DATA and PSEUDOLABEL_WEIGHTS")
    return options


if __name__ == "__main__":
    main()
