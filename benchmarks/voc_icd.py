"""The intra-class discriminator on real photos, against class activation maps of the same network.

    python benchmarks/voc_icd.py [--limit N] [--seeds N] [--epochs N] [--tune-epochs N] [--json FILE]

A classifier on a MobileNetV2, and the head of `pseudolabel.heads` beside it, learn from image-level labels
alone, on the photos of `voc-animals` and of its `extra` folder. The photos with masks are scored:

- class activation maps (CAM), with a threshold chosen on one half of the photos and scored on the other;
- bottom-up scores, the same made constant on superpixels, and top-down logits, each cut at 0: there is no
  threshold to choose;
- seeds from logits and CAM, and what the dense CRF makes of them.

The backbone is frozen, or its last blocks learn as well ("tuned"). Masks are never learnt from. Data and
weights are found as in `voc_animals.py`.
"""

import argparse
import copy
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import voc_animals as animals
from torch import Tensor, nn
from torch.nn import functional as F
from voc_segmenter import spread

import pseudolabel as pl
from pseudolabel.heads import ICDBottomUp, IntraClassDiscriminator, icd_warmup
from pseudolabel.refine import CRF_PRESETS, DenseCRF

STRIDE = 16
SIDES = (288, 384)  # every photo is brought to these, across or upright
REGIONS = 64
HIDDEN = 256
BATCH = 16
WARMUP_EPOCHS = 1
HEAD_LR, TAIL_LR = 1e-3, 1e-4
CRFS = ("psa", "deeplab")
FIGURES = ("miou", "miou_one", "miou_several", "background", "boundary_f")

Maps = dict[str, Tensor]  # of a photo, each (1,C,h,w)
MaskRule = Callable[[animals.Photo, Maps], Tensor]


# ------------------------------------------------------------------------------------------------ network


class Trunk(nn.Module):
    """The first 13 blocks. They stay as they are, so their output is computed once."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.stem, self.blocks = net.stem, net.blocks[:13]

    def forward(self, views: Tensor) -> Tensor:
        x = F.relu6(self.stem(views))
        for block in self.blocks:
            x = block(x)
        return x


class Tail(nn.Module):
    """The rest, with a classifier: features for the head after block 13, raw CAMs at the end."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.first, self.blocks, self.last = net.blocks[13], net.blocks[14:], net.head
        self.weight = self.bias = None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.first(x)
        return x, self.cam(x)

    def cam(self, x: Tensor) -> Tensor:
        return pl.cam.class_activation_map(self.deep(x), self.weight)

    def deep(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return F.relu6(self.last(x))

    def trainable(self) -> "Tail":
        """A copy that learns."""
        tail = copy.deepcopy(self).requires_grad_()
        tail.weight = nn.Parameter(self.weight.clone())
        tail.bias = nn.Parameter(torch.zeros(len(self.weight)))
        return tail


# ------------------------------------------------------------------------------------------------- photos


@dataclass(eq=False)
class Example:
    """A photo, plain and mirrored."""

    photo: animals.Photo
    trunk: Tensor  # (2,96,h,w) half
    features: Tensor  # (2,160,h,w) half, of the frozen network
    pooled: Tensor  # (2,1280), likewise
    superpixels: Tensor | None  # (2,h,w), those in the middle of each cell
    cam: Tensor | None = None  # (2,C,h,w), of the frozen network


@torch.no_grad()
def look(trunk: Trunk, tail: Tail, photo: animals.Photo, *, regions: int = REGIONS) -> Example:
    image = photo.image
    sides = SIDES if image.shape[3] > image.shape[2] else SIDES[::-1]
    image = F.interpolate(image, size=sides, mode="bilinear", antialias=True).clamp(0, 1)
    x = trunk(torch.cat([image, image.flip(-1)]) * 2 - 1)
    features = tail.first(x)
    pooled = tail.deep(features).mean((2, 3))
    if regions == 0:
        return Example(photo, x.half(), features.half(), pooled, None)
    ids = pl.refine.felzenszwalb_superpixels(image)
    means = pl.refine.region_mean(features[:1], ids, align_corners=False)
    ids = pl.refine.merge_superpixels(ids, means, regions)[:, STRIDE // 2 :: STRIDE, STRIDE // 2 :: STRIDE]
    return Example(photo, x.half(), features.half(), pooled, torch.cat([ids, ids.flip(-1)]))


@torch.no_grad()
def add_cam(tail: Tail, example: Example) -> None:
    example.cam = tail.cam(example.features.float())


def prepare(
    net: nn.Module, photos: Sequence[animals.Photo], workers: animals.Workers, *, regions: int = REGIONS
) -> tuple[Tail, list[Example]]:
    """What the frozen network sees, and its classifier from image-level labels."""
    trunk, tail = Trunk(net), Tail(net)
    examples = workers.map("features", partial(look, trunk, tail, regions=regions), photos)
    labels = torch.cat([photo.labels.float().expand(2, -1) for photo in photos])
    tail.weight = animals.train_classifier(torch.cat([example.pooled for example in examples]), labels)
    workers.map("class activation maps", partial(add_cam, tail), examples)
    return tail, examples


# ----------------------------------------------------------------------------------------------- training


@dataclass(eq=False)
class Model:
    """A head, and the tail of the network where that has learnt as well."""

    head: IntraClassDiscriminator
    tail: Tail | None = None

    def see(self, examples: Sequence[Example], views: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Features and raw CAMs of one view of each example."""
        pairs = list(zip(examples, views, strict=True))
        if self.tail is not None:
            return self.tail(torch.stack([example.trunk[view] for example, view in pairs]).float())
        features = torch.stack([example.features[view] for example, view in pairs]).float()
        return features, torch.stack([example.cam[view] for example, view in pairs])


def new_model(num_foreground: int, seed: int, tail: Tail | None) -> Model:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        # Persons occur beside animals only: images of one label alone would teach them nothing.
        bottom_up = ICDBottomUp(160, num_foreground, single_label_only=False)
        head = IntraClassDiscriminator(160, num_foreground, hidden=HIDDEN, bottom_up=bottom_up)
    return Model(head, None if tail is None else tail.trainable())


def batches(shapes: Sequence[object], size: int, generator: torch.Generator) -> list[list[int]]:
    """Places of all examples in random order, those of a batch being of one shape."""
    found = []
    for shape in dict.fromkeys(shapes):
        of_shape = [index for index, its in enumerate(shapes) if its == shape]
        order = [of_shape[k] for k in torch.randperm(len(of_shape), generator=generator)]
        found += [order[start : start + size] for start in range(0, len(order), size)]
    return [found[k] for k in torch.randperm(len(found), generator=generator)]


def train(model: Model, examples: Sequence[Example], epochs: int, seed: int) -> Model:
    generator = torch.Generator().manual_seed(seed)
    groups = model.head.param_groups(HEAD_LR, head_lr_mult=1.0)
    if model.tail is not None:
        groups.append({"params": list(model.tail.parameters()), "lr": TAIL_LR, "weight_decay": 5e-4})

    def loss_at(step: int, steps: int, batch: Sequence[int], views: Sequence[int]) -> Tensor:
        weight = icd_warmup(step, WARMUP_EPOCHS * steps)
        return loss_of(model, [examples[index] for index in batch], views, weight)

    shapes = [example.trunk.shape for example in examples]
    fit(torch.optim.AdamW(groups), loss_at, shapes, epochs, generator)
    model.head.eval()
    return model


def fit(
    optimizer: torch.optim.Optimizer,
    loss_at: Callable[[int, int, Sequence[int], Sequence[int]], Tensor],
    shapes: Sequence[object],
    epochs: int,
    generator: torch.Generator,
    size: int = BATCH,
) -> None:
    """Lower `loss_at(step, steps of an epoch, places of examples, which view of each)` batch by batch."""
    steps = len(batches(shapes, size, generator))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 - step / (steps * epochs)) ** 0.9)
    for epoch in range(epochs):
        for number, batch in enumerate(batches(shapes, size, generator)):
            views = torch.randint(0, 2, (len(batch),), generator=generator).tolist()
            loss = loss_at(epoch * steps + number, steps, batch, views)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def loss_of(model: Model, examples: Sequence[Example], views: Sequence[int], td_weight: float) -> Tensor:
    labels = torch.cat([example.photo.labels for example in examples]).float()
    superpixels = torch.stack(
        [example.superpixels[view] for example, view in zip(examples, views, strict=True)]
    )
    features, cam = model.see(examples, views)
    out = model.head(features, cam, labels, superpixels, td_weight=td_weight)
    loss = out.loss_bu + out.loss_td
    if model.tail is not None:
        logits = cam.mean((2, 3)) + model.tail.bias
        loss = loss + F.binary_cross_entropy_with_logits(logits, labels, reduction="sum") / len(labels)
    return loss


# ------------------------------------------------------------------------------------------------ scoring


@torch.no_grad()
def maps_of(model: Model, example: Example) -> Maps:
    """Each step's maps, averaged over the plain and the mirrored view."""
    features, cam = model.see([example, example], [0, 1])
    labels = example.photo.labels.expand(2, -1)
    out = model.head(features, labels=labels, superpixels=example.superpixels)
    maps = {"cam": cam, "bottom-up": out.bottom_up, "superpixels": out.refined, "top-down": out.logits}
    return {name: (value[:1] + value[1:].flip(-1)) / 2 for name, value in maps.items()}


def cut_at_zero(photo: animals.Photo, maps: Maps, *, name: str) -> Tensor:
    """The highest map above 0, of the classes that the photo is labelled with."""
    scores = F.interpolate(maps[name], size=photo.truth.shape[1:], mode="bilinear")
    scores = scores.where(photo.labels[:, :, None, None], -1)
    return pl.masks.scores_to_mask(F.pad(scores, (0, 0, 0, 0, 1, 0)))


def seeds(photo: animals.Photo, maps: Maps, *, crf: DenseCRF | None = None) -> Tensor:
    """Seeds of the classes that the photo is labelled with; what they leave out counts as background."""
    present = photo.labels[0].nonzero()[:, 0]
    logits, cam = maps["top-down"][:, present], maps["cam"][:, present]
    mask = pl.recipes.icd(photo.image, logits, cam, torch.ones(1, len(present)), crf=crf)
    return torch.cat([present.new_zeros(1), present + 1])[mask.where(mask != 255, 0)]


def zero_ways() -> dict[str, MaskRule]:
    """Ways from maps to a mask, without any setting to choose."""
    return {
        "bottom-up": partial(cut_at_zero, name="bottom-up"),
        "bottom-up, superpixels": partial(cut_at_zero, name="superpixels"),
        "top-down": partial(cut_at_zero, name="top-down"),
        "seeds": seeds,
    }


def crf_ways() -> dict[str, MaskRule]:
    """Ways that take their time."""
    return {f"seeds + CRF `{name}`": partial(seeds, crf=DenseCRF(**CRF_PRESETS[name])) for name in CRFS}


class Rows:
    """Rows of figures of some photos, one figure for each trained model."""

    def __init__(self, photos: Sequence[animals.Photo]) -> None:
        self.photos = photos
        self.num_classes = 1 + photos[0].labels.shape[1]
        self.rows: dict[str, dict[str, list[float]]] = {}

    def count(self, mask: Tensor, photo: animals.Photo) -> animals.Score:
        confusion = pl.metrics.confusion_matrix(mask, photo.truth, self.num_classes)
        boundary = pl.metrics.boundary_counts(
            mask, photo.truth, self.num_classes, radius=animals.BOUNDARY_RADIUS
        )
        return animals.Score(confusion, boundary, 0.0)

    def add_counts(self, name: str, counts: Sequence[animals.Score]) -> None:
        """A model's row from what was counted on each photo."""
        parts: dict[bool, list[animals.Score]] = {False: [], True: []}
        for photo, score in zip(self.photos, counts, strict=True):
            parts[bool(photo.labels.sum() > 1)].append(score)
        one, several = (animals.total(part).miou if part else math.nan for part in parts.values())
        every = animals.total(counts)
        figures = (every.miou, one, several, float(every.iou[0]), every.boundary_f)
        self.add_figures(name, dict(zip(FIGURES, figures, strict=True)) | {"iou": every.iou.tolist()})

    def add_figures(self, name: str, figures: dict) -> None:
        row = self.rows.setdefault(name, {figure: [] for figure in (*FIGURES, "iou")})
        for figure, values in row.items():
            values.append(math.nan if figures[figure] is None else figures[figure])
        print(name, *(f"{row[figure][-1]:.3f}" for figure in FIGURES), file=sys.stderr)

    def table(self) -> Iterator[str]:
        yield "| way | mIoU | one class | several | background | boundary F |"
        yield "|---|---|---|---|---|---|"
        for name, row in self.rows.items():
            yield "| " + " | ".join([name, *(spread(row[figure]) for figure in FIGURES)]) + " |"


class Scores(Rows):
    """Rows of models that make maps of examples."""

    def __init__(
        self,
        scored: Sequence[Example],
        workers: animals.Workers,
        maps_of: Callable[[Model, Example], Maps],
    ) -> None:
        super().__init__([example.photo for example in scored])
        self.scored, self.workers, self.maps_of = scored, workers, maps_of

    def add_cam(self, name: str, models: Sequence[Model]) -> None:
        """The CAMs of each model, with a threshold from the other half."""
        halves = self.photos[0::2], self.photos[1::2]
        plain = next(way for way in animals.ways() if way.name == "CAM")
        for model in models:
            self.workers.map("CAM", partial(self._keep_cam, model), self.scored)
            scorer = animals.Scorer(self.workers, self.num_classes)
            row = animals.score_way(scorer, plain, [halves, halves[::-1]])
            self.add_figures(f"{name}, threshold of the other half", row)
            print("chosen:", *row["chosen"], file=sys.stderr)
            for photo in self.photos:
                photo.maps = None

    def _keep_cam(self, model: Model, example: Example) -> None:
        cam = pl.cam.normalize_cam(self.maps_of(model, example)["cam"])[:, example.photo.labels[0]]
        size = example.photo.truth.shape[1:]
        example.photo.maps = F.interpolate(cam, size=size, mode="bilinear")

    def add(
        self, name: str, models: Sequence[Model], ways: dict[str, MaskRule], slow: dict[str, MaskRule]
    ) -> None:
        """All ways of each model, the slow ones of the first model alone."""
        for number, model in enumerate(models):
            rules = ways if number else ways | slow
            found = self.workers.map(f"masks, {name}", partial(self._count, model, rules), self.scored)
            for way in rules:
                self.add_counts(f"{name}: {way}", [counts[way] for counts in found])

    def _count(self, model: Model, rules: dict[str, MaskRule], example: Example) -> dict[str, animals.Score]:
        maps = self.maps_of(model, example)
        return {way: self.count(rule(example.photo, maps), example.photo) for way, rule in rules.items()}


def report(
    options: argparse.Namespace, classes: Sequence[str], rows: Rows, *, start: float, said: str
) -> None:
    """Print what was done, time and table, and write the figures where asked."""
    print(
        f"\n{said}; mean ± standard deviation over {options.seeds} seeds\n"
        f"{options.workers} threads, {time.perf_counter() - start:.0f} s, "
        f"{time.process_time() / 60:.0f} minutes of CPU in all\n"
    )
    print("\n".join(rows.table()))
    if options.json:
        figures = {"classes": ["background", *classes], "rows": rows.rows}
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


def report_tuned(
    options: argparse.Namespace, classes: Sequence[str], scores: Scores, *, start: float, photos: int
) -> None:
    """The same for heads beside a frozen and a tuned network."""
    said = (
        f"{photos} photos to train on, {len(scores.photos)} scored; maps masked by the true image labels\n"
        f"{options.epochs} epochs frozen, {options.tune_epochs} tuned"
    )
    report(options, classes, scores, start=start, said=said)


def main() -> None:
    options = arguments()
    start = time.perf_counter()
    data, classes = options.data, animals.read_classes(options.data)
    scored = animals.read_photos(data, options.limit, classes)
    photos = [*scored, *animals.read_photos(data / "extra", options.limit, classes)]
    workers = animals.Workers(options.workers)
    tail, examples = prepare(animals.load_network(options.weights, STRIDE), photos, workers)
    scores = Scores(examples[: len(scored)], workers, maps_of)
    for name, epochs, base in (("frozen", options.epochs, None), ("tuned", options.tune_epochs, tail)):
        seeds = range(options.seeds if epochs else 0)
        models = [new_model(len(classes), number, base) for number in seeds]

        def learn(number: int, models: list[Model] = models, epochs: int = epochs) -> Model:
            return train(models[number], examples, epochs, number)

        workers.map(f"train, {name}", learn, seeds)
        scores.add_cam(f"{name}: CAM", models[: 1 if base is None else None])
        scores.add(name, models, zero_ways(), crf_ways() if base is None else {})
    report_tuned(options, classes, scores, start=start, photos=len(photos))


def arguments(description: str | None = __doc__) -> argparse.Namespace:
    parser = common_arguments(description)
    parser.add_argument("--seeds", type=int, default=3, help="models of each kind")
    parser.add_argument("--epochs", type=int, default=4, help="of the head beside the frozen network")
    parser.add_argument("--tune-epochs", type=int, default=2, help="with the last blocks; 0 leaves them out")
    return parse(parser)


def common_arguments(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    data = Path(os.environ.get("PSEUDOLABEL_DATA", animals.SHARED)) / "voc-animals"
    parser.add_argument("--data", type=Path, default=data, help="folder of the photos")
    parser.add_argument("--limit", type=int, help="photos of each folder, for a quick look")
    parser.add_argument("--workers", type=int, default=2, help="threads")
    parser.add_argument("--json", type=Path, help="write the figures here")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Options, once all that they name is there."""
    options = parser.parse_args()
    options.weights = Path(os.environ.get("PSEUDOLABEL_WEIGHTS", animals.SHARED / "weights"))
    for path in (
        options.data / "classes.txt",
        options.data / "masks",
        options.data / "extra",
        options.weights / "net.py",
    ):
        if not path.exists():
            sys.exit(f"{path} is missing: name the data by PSEUDOLABEL_DATA and PSEUDOLABEL_WEIGHTS")
    return options


if __name__ == "__main__":
    main()
