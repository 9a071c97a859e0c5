"""From image-level labels to masks on real photos, step by step: what each step adds, and what it costs.

    python benchmarks/voc_animals.py [--train FOLDER ...] [--score FOLDER] [--limit N] [--json FILE]

A frozen MobileNetV2 gets a 1x1 classifier that is trained on image-level labels. Its class activation maps,
masked by the true image labels, go through the parts of the library, and every way to a mask is scored.

A folder holds `images/ID.jpg`, `labels.csv`, and, where it is scored or settings are chosen on it,
`masks/ID.png`. Masks are never read for training.

- By default the classifier is trained on `voc-animals` and its `extra` photos. Settings are chosen on one
  half of the photos with masks and scored on the other, both ways round, and the counts of the two are
  added: every photo is scored once, with settings that were chosen without it.
- `--train A --score B` takes classifier and settings from A, and scores B.

The data are found by `PSEUDOLABEL_DATA` (a folder with `voc-animals` in it), the network and its weights by
`PSEUDOLABEL_WEIGHTS`; both default to `../shared`.
"""

import argparse
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

import pseudolabel as pl
from pseudolabel.refine import CRF_PRESETS, DenseCRF

SHARED = Path(__file__).resolve().parents[2] / "shared"
TRAIN_SCALES = (0.5, 1.0)  # two sizes of each photo: the maps will be read off at several
SCALES = (0.25, 0.5, 1.0, 1.5, 2.0)
WEIGHT_DECAY = 0.1
BOUNDARY_RADIUS = 3
THRESHOLDS = [step / 100 for step in range(91)]

Setting = float
MaskRule = Callable[[Tensor, Tensor, Tensor, Setting], Tensor]


# ------------------------------------------------------------------------------------------------ photos


@dataclass(eq=False)
class Photo:
    """One photo of a folder; its maps are kept for the present classes only, its pixels are read again."""

    folder: Path
    name: str
    labels: Tensor  # (1,C) bool
    maps: Tensor | None = None
    seconds: float = 0.0  # of CPU, for the maps

    @property
    def image(self) -> Tensor:
        return pl.io.read_image(self.folder / "images" / f"{self.name}.jpg")[None]

    @cached_property
    def truth(self) -> Tensor:
        return pl.io.read_mask(self.folder / "masks" / f"{self.name}.png")[None].to(torch.uint8)

    @property
    def cam(self) -> Tensor:
        """Normalised maps (1,C,H,W)."""
        if self.maps is None:
            raise RuntimeError(f"{self.name}: no maps yet")
        cam = self.maps.new_zeros(1, self.labels.shape[1], *self.maps.shape[2:])
        cam[:, self.labels[0]] = self.maps
        return cam


def read_photos(folder: Path, limit: int | None, classes: Sequence[str] | None = None) -> list[Photo]:
    labels = pl.io.read_labels(folder / "labels.csv", classes=classes)
    photos = [Photo(folder, name, labels[name][None]) for name in labels.names]
    if limit is not None and limit < len(photos):
        photos = [photos[k * len(photos) // limit] for k in range(limit)]
    return photos


class Workers:
    """A few threads of one torch thread each, and a progress bar for what they do."""

    def __init__(self, count: int) -> None:
        torch.set_num_threads(1)
        self.pool = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))
        self.console = Console(stderr=True)

    def map(self, name: str, work: Callable, items: Sequence) -> list:
        found = self.pool.map(work, items)
        return list(track(found, name, len(items), console=self.console, transient=True))


# --------------------------------------------------------------------------------------------- classifier


def load_network(weights: Path, stride: int) -> nn.Module:
    """The MobileNetV2 that lies beside its weights, frozen."""
    spec = importlib.util.spec_from_file_location("voc_animals_net", weights / "net.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    net = module.mobilenet_v2().requires_grad_(False)
    if stride == 16:
        _dilate_last_stage(net)
    return net.to(memory_format=torch.channels_last)  # the faster layout on a CPU


def _dilate_last_stage(net: nn.Module) -> None:
    """Features at every 16th pixel: the last stage keeps the size, its filters reach twice as far."""
    first, *rest = net.blocks[13:]
    first.depthwise.stride = (1, 1)
    for block in rest:
        old = block.depthwise
        block.depthwise = nn.Conv2d(
            old.in_channels, old.out_channels, 3, padding=2, dilation=2, groups=old.groups
        )
        block.depthwise.weight, block.depthwise.bias = old.weight, old.bias


def pooled_features(net: nn.Module, photo: Photo) -> Tensor:
    """What the classifier learns from: the mean features (V,D) of the V views of a photo."""
    with torch.inference_mode():
        views = pl.cam.make_views(photo.image * 2 - 1, TRAIN_SCALES)
        return torch.cat([net.features(view).mean((2, 3)) for view in views]).clone()


def train_classifier(features: Tensor, labels: Tensor) -> Tensor:
    """Logistic regression of each class: the weights (C,D) of a 1x1 convolution before global pooling.

    The problem is convex and starts from zeros, so nothing in it is random.
    """
    weight = torch.zeros(labels.shape[1], features.shape[1], requires_grad=True)
    bias = torch.zeros(labels.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        error = F.binary_cross_entropy_with_logits(F.linear(features, weight, bias), labels)
        value = error + WEIGHT_DECAY / 2 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return weight.detach()


def add_maps(net: nn.Module, weight: Tensor, photo: Photo) -> None:
    """Give the photo its normalised class activation maps."""

    def cam_fn(views: Tensor) -> Tensor:
        # Cut off in each view: evidence against a class at one scale must not eat up evidence for it.
        return pl.cam.class_activation_map(net.features(views), weight).clamp(min=0)

    start = time.thread_time()
    with torch.inference_mode():
        cam = pl.cam.multi_scale_cam(cam_fn, photo.image * 2 - 1, photo.labels, SCALES, flip=True)
        maps = pl.cam.normalize_cam(cam)[:, photo.labels[0]]
    photo.maps = maps.clone()
    photo.seconds = time.thread_time() - start


# ------------------------------------------------------------------------------------------- ways to a mask


@dataclass(frozen=True)
class Way:
    """A way from maps to a mask, with one setting to choose.

    `rule` is a function of image, cam, labels and the setting. `candidates` are tried one by one, unless
    `smooth` says that the mask is a plain threshold on maps, which one sweep chooses.
    """

    name: str
    rule: MaskRule
    candidates: tuple[Setting, ...] = ()
    smooth: Callable[[Tensor], Tensor] | None = None


def threshold(_image: Tensor, cam: Tensor, _labels: Tensor, value: float, *, smooth: Callable) -> Tensor:
    return pl.masks.scores_to_mask(pl.masks.constant_background(smooth(cam), value))


def joint_crf(image: Tensor, cam: Tensor, labels: Tensor, value: float, *, preset: str) -> Tensor:
    """One CRF of K + 1 labels, the K present classes and a constant background."""
    scores = pl.masks.constant_background(cam[:, labels[0]], value)
    mask = pl.masks.scores_to_mask(pl.refine.dense_crf(image, scores, **CRF_PRESETS[preset]))
    present = labels[0].nonzero()[:, 0] + 1
    return torch.cat([present.new_zeros(1), present])[mask]


def proportional(image: Tensor, cam: Tensor, labels: Tensor, alpha: float, **settings: object) -> Tensor:
    return pl.masks.proportional_pseudo_mask(image, cam, labels, alpha=alpha, **settings)


def highest(image: Tensor, cam: Tensor, labels: Tensor, alpha: float, *, crf: DenseCRF) -> Tensor:
    """As `proportional`, but where classes meet the highest map decides."""
    present = labels[0].nonzero()[:, 0]
    raw = cam[:, present]
    smoothed = pl.refine.coefficient_of_variation_smoothing(raw)
    foreground = pl.masks.class_foreground(image, smoothed, alpha=alpha, crf=crf)
    mask = pl.masks.scores_to_mask(pl.masks.constant_background(raw * foreground, 0))
    return torch.cat([present.new_zeros(1), present + 1])[mask]


def ways() -> list[Way]:
    plain, cvs = (lambda cam: cam), pl.refine.coefficient_of_variation_smoothing
    pmm, deeplab = (DenseCRF(**CRF_PRESETS[preset]) for preset in ("pmm", "deeplab"))
    backgrounds = (0.35, 0.42, 0.5)
    return [
        Way("CAM", partial(threshold, smooth=plain), smooth=plain),
        Way("CAM + CRF `psa`", partial(joint_crf, preset="psa"), backgrounds),
        Way("CAM + CRF `deeplab`", partial(joint_crf, preset="deeplab"), backgrounds),
        Way("CVS", partial(threshold, smooth=cvs), smooth=cvs),
        Way("CVS + PPMG as published, no CRF", partial(proportional, crf=None), (11.0,)),
        Way("CVS + PPMG as published, CRF `pmm`", partial(proportional, crf=pmm), (11.0,)),
        Way("CVS + PPMG, no CRF", partial(proportional, crf=None), (0.35, 0.5, 0.7, 1.0, 1.4)),
        Way("PPMG without CVS, CRF `pmm`", partial(proportional, crf=pmm, scale=0.0), (1.4, 2.0)),
        Way("CVS + PPMG, CRF `pmm`", partial(proportional, crf=pmm), (1.0, 1.4)),
        Way("CVS + PPMG, CRF `deeplab`", partial(proportional, crf=deeplab), (0.7, 1.0, 1.4)),
        Way("the same, highest map wins", partial(highest, crf=deeplab), (1.0, 1.4)),
    ]


# ------------------------------------------------------------------------------------------------- scoring


@dataclass(frozen=True, eq=False)
class Score:
    """What is counted on one photo, or on several."""

    confusion: Tensor
    boundary: Tensor
    seconds: float

    def __add__(self, other: "Score") -> "Score":
        return Score(
            self.confusion + other.confusion, self.boundary + other.boundary, self.seconds + other.seconds
        )

    @property
    def iou(self) -> Tensor:
        return pl.metrics.iou_from_confusion(self.confusion, absent="skip")

    @property
    def miou(self) -> float:
        return float(self.iou.nanmean())

    @property
    def boundary_f(self) -> float:
        return float(pl.metrics.boundary_f_from_counts(self.boundary).nanmean())


class Scorer:
    """Scores of (way, setting, photo), each computed once."""

    def __init__(self, workers: Workers, num_classes: int) -> None:
        self.workers = workers
        self.num_classes = num_classes
        self.known: dict[tuple[str, Setting, Photo], Score] = {}

    def choose(self, way: Way, photos: list[Photo]) -> Setting:
        """The setting of the highest mIoU."""
        if way.smooth is not None:
            pairs = ((way.smooth(photo.cam), photo.truth) for photo in photos)
            return pl.masks.choose_background(pairs, candidates=THRESHOLDS).value
        if len(way.candidates) == 1:
            return way.candidates[0]
        self._compute(way, way.candidates, photos)
        return max(way.candidates, key=lambda setting: total(self.scores(way, setting, photos)).miou)

    def scores(self, way: Way, setting: Setting, photos: list[Photo]) -> list[Score]:
        self._compute(way, [setting], photos)
        return [self.known[way.name, setting, photo] for photo in photos]

    def _compute(self, way: Way, settings: Iterable[Setting], photos: list[Photo]) -> None:
        jobs = [(way.name, s, photo) for photo in photos for s in settings]
        jobs = [job for job in jobs if job not in self.known]
        if jobs:
            found = self.workers.map(way.name, lambda job: self._score(way.rule, *job[1:]), jobs)
            self.known.update(zip(jobs, found, strict=True))

    def _score(self, rule: MaskRule, setting: Setting, photo: Photo) -> Score:
        with torch.inference_mode():
            image, cam = photo.image, photo.cam
            start = time.thread_time()
            mask = rule(image, cam, photo.labels, setting)
            seconds = time.thread_time() - start
            confusion = pl.metrics.confusion_matrix(mask, photo.truth, self.num_classes)
            boundary = pl.metrics.boundary_counts(mask, photo.truth, self.num_classes, radius=BOUNDARY_RADIUS)
        return Score(confusion, boundary, seconds)


def total(scores: Iterable[Score]) -> Score:
    first, *rest = scores
    for score in rest:
        first = first + score
    return first


def score_way(scorer: Scorer, way: Way, splits: list[tuple[list[Photo], list[Photo]]]) -> dict:
    """Choose on the first part of each split, score the second, add up."""
    chosen, parts, found = [], [], []
    for choosing, scoring in splits:
        setting = scorer.choose(way, choosing)
        chosen.append(setting)
        scores = scorer.scores(way, setting, scoring)
        parts.append(total(scores).miou)
        found += zip(scoring, scores, strict=True)
    every = total(score for _, score in found)
    by_count = {
        name: [score for photo, score in found if (photo.labels.sum() > 1) == several]
        for name, several in (("one", False), ("several", True))
    }
    return {
        "way": way.name,
        "chosen": chosen,
        "miou": every.miou,
        "miou_parts": parts,
        **{f"miou_{name}": total(scores).miou if scores else None for name, scores in by_count.items()},
        "background": float(every.iou[0]),
        "boundary_f": every.boundary_f,
        "seconds": every.seconds / len(found),
        "iou": every.iou.tolist(),
    }


# --------------------------------------------------------------------------------------------------- report


def table(rows: list[dict]) -> Iterator[str]:
    yield "| way | chosen | mIoU | one class | several | background | boundary F | s/image |"
    yield "|---|---|---|---|---|---|---|---|"
    for row in rows:
        figures = [row[key] for key in ("miou", "miou_one", "miou_several", "background", "boundary_f")]
        cells = [row["way"], " / ".join(f"{value:g}" for value in row["chosen"])]
        cells += ["" if figure is None else f"{figure:.3f}".lstrip("0") for figure in figures]
        yield "| " + " | ".join([*cells, f"{row['seconds']:.2f}"]) + " |"


def main() -> None:
    options = arguments()
    classes = read_classes(options.train[0])
    trained = [read_photos(folder, options.limit, classes) for folder in options.train]
    with_masks = [photos for photos in trained if (photos[0].folder / "masks").is_dir()]
    if not with_masks:
        sys.exit(f"no masks/ in {', '.join(map(str, options.train))}: nothing to choose settings on")
    if options.score is None or options.score.resolve() == with_masks[0][0].folder.resolve():
        scored = with_masks[0]
        halves = scored[0::2], scored[1::2]
        splits = [halves, halves[::-1]]
    else:
        scored = read_photos(options.score, options.limit, classes)
        splits = [(with_masks[0], scored)]

    start = time.perf_counter()
    workers = Workers(options.workers)
    net = load_network(options.weights, options.stride)
    training = [photo for photos in trained for photo in photos]
    views = workers.map("features to train on", partial(pooled_features, net), training)
    labels = torch.cat(
        [photo.labels.float().expand(len(view), -1) for photo, view in zip(training, views, strict=True)]
    )
    weight = train_classifier(torch.cat(views), labels)

    used = list(dict.fromkeys(photo for split in splits for part in split for photo in part))
    workers.map("class activation maps", partial(add_maps, net, weight), used)
    scorer = Scorer(workers, num_classes=1 + len(classes))
    rows = [score_way(scorer, way, splits) for way in ways()]

    seconds = sum(photo.seconds for photo in scored) / len(scored)
    print(
        f"\n{len(training)} photos to train on, {len(scored)} scored; maps masked by the true image labels\n"
        f"stride {options.stride}, maps in {seconds:.2f} s an image; s/image is CPU time of one thread\n"
        f"{options.workers} threads, {time.perf_counter() - start:.0f} s in all\n"
    )
    print("\n".join(table(rows)))
    if options.json:
        result = {"classes": ["background", *classes], "cam_seconds": seconds, "rows": rows}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def read_classes(folder: Path) -> list[str]:
    """Foreground classes in the order of the mask values."""
    return (folder / "classes.txt").read_text(encoding="utf-8").split()[1:]


def arguments() -> argparse.Namespace:
    data = Path(os.environ.get("PSEUDOLABEL_DATA", SHARED)) / "voc-animals"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--train", type=Path, nargs="+", default=[data, data / "extra"], help="folders to train on"
    )
    parser.add_argument("--score", type=Path, help="folder to score (default: the first to train on)")
    parser.add_argument("--stride", type=int, choices=(16, 32), default=16, help="of the features, in pixels")
    parser.add_argument("--limit", type=int, help="photos of each folder, for a quick look")
    parser.add_argument("--workers", type=int, default=2, help="threads")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    options.weights = Path(os.environ.get("PSEUDOLABEL_WEIGHTS", SHARED / "weights"))
    needed = [
        folder / "labels.csv" for folder in [*options.train, *([options.score] if options.score else [])]
    ]
    if options.score and not (options.score / "masks").is_dir():
        sys.exit(f"no masks/ in {options.score}: nothing to score")
    for file in [options.train[0] / "classes.txt", *needed, options.weights / "net.py"]:
        if not file.is_file():
            sys.exit(f"{file} is missing: name the data by PSEUDOLABEL_DATA and PSEUDOLABEL_WEIGHTS")
    return options


if __name__ == "__main__":
    main()
