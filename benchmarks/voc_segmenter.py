"""A segmentation network on pseudo masks of real photos: cross-entropy, pretended under-fitting, a cycle.

    python benchmarks/voc_segmenter.py [--train FOLDER] [--score FOLDER] [--seeds N] [--json FILE]

The training photos get masks as in `voc_animals.py`: a classifier from image-level labels, its class
activation maps, smoothing and proportional masks. A light decoder on the frozen MobileNetV2 learns these
masks, and is scored on photos that none of this has seen, without their labels. Then it labels its own
training photos anew, and the next decoder learns those.

- By default every other photo of `voc-animals` is for training, the rest for scoring.
- `--train A --score B` trains on all photos of A and scores those of B.

True masks are never learnt from, but for the row that says so. Data and weights are found as in
`voc_animals.py`.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
import voc_animals as animals
from torch import Tensor, nn
from torch.nn import functional as F

import pseudolabel as pl
from pseudolabel.cli._training import Settings, random_view, train
from pseudolabel.cli.train import segmentation_loss
from pseudolabel.refine import CRF_PRESETS, DenseCRF

CROP = 320
VIEWS = 8  # of each training photo: cut out once, so that the frozen features are computed once
ALPHA = 1.0  # of the masks, from voc_animals.py
DEEP, FINE = 320, 128  # channels of the features
INFERENCE_SCALE = 1.25  # longer side in crops, plain and mirrored
PLAIN = "plain cross-entropy"
ROWS = ("true", "plain", "puf", "mask", "cycle")

# A further loss, from logits, targets and which (photo, view) pairs they are.
Extra = Callable[[Tensor, Tensor, Sequence[tuple[int, int]]], Tensor]


# ------------------------------------------------------------------------------------------------ network


class Decoder(nn.Module):
    """Logits at every 8th pixel from what `Features` returns."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        around = nn.Conv2d(96, 96, 3, padding=1)
        self.deep = nn.Sequential(nn.Conv2d(DEEP, 96, 1), nn.ReLU(), around, nn.ReLU())
        self.fine = nn.Sequential(nn.Conv2d(32, 32, 1), nn.ReLU())
        self.head = nn.Sequential(nn.Conv2d(128, 64, 1), nn.ReLU(), nn.Conv2d(64, num_classes, 1))

    def forward(self, features: Tensor) -> Tensor:
        deep, fine = features.split([DEEP, FINE], 1)
        fine = self.fine(F.pixel_shuffle(fine, 2))
        deep = F.interpolate(self.deep(deep), size=fine.shape[2:], mode="bilinear")
        return self.head(torch.cat([deep, fine], 1))


def features(net: nn.Module, image: Tensor) -> Tensor:
    """Frozen features (B,448,h,w) at stride 16: 320 channels there, 32 at stride 8 folded into 128."""
    with torch.inference_mode():
        x = F.relu6(net.stem(image))
        for number, block in enumerate(net.blocks):
            x = block(x)
            if number == 5:
                fine = x
        fine = F.pixel_unshuffle(F.pad(fine, (0, fine.shape[3] % 2, 0, fine.shape[2] % 2)), 2)
        return torch.cat([x, fine], 1).half()


def saliency(net: nn.Module, image: Tensor) -> Tensor:
    """Class-agnostic saliency (1,H,W) of a photo, in its size."""
    deep = features(net, image * 2 - 1)[:, :DEEP].float()
    found = pl.cam.saliency_from_features(deep)
    return F.interpolate(found[:, None], size=image.shape[2:], mode="bilinear")[:, 0]


def sharpened(found: Tensor, image: Tensor, crf: DenseCRF) -> Tensor:
    """Saliency (1,H,W) after a CRF of two labels."""
    return crf(image, torch.stack([1 - found, found], 1))[:, 1].clamp(0, 1)


class Examples:
    """Features of the fixed views of the training photos, and the same views of any masks of theirs."""

    def __init__(self, net: nn.Module, photos: Sequence[animals.Photo], workers: animals.Workers) -> None:
        self.photos = photos
        self.workers = workers
        # What the network sees is 2 image - 1.
        self.settings = Settings(
            steps=1, crop=CROP, scales=(0.75, 1.75), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
        )
        self.features = workers.map("features of the views", partial(self._features, net), range(len(photos)))

    def _view(self, image: Tensor, mask: Tensor, photo: int, view: int) -> tuple[Tensor, Tensor]:
        return random_view(image, mask, self.settings, np.random.default_rng((photo, view)))

    def _features(self, net: nn.Module, photo: int) -> Tensor:
        image = self.photos[photo].image[0]
        views = [self._view(image, image[0], photo, view)[0][None] for view in range(VIEWS)]
        return torch.cat([features(net, view) for view in views])

    def views(self, name: str, maps: Sequence[Tensor]) -> list[Tensor]:
        """The same views (VIEWS,N,h,w) of the N maps (N,H,W) uint8 of each photo, at every 4th pixel.

        They are 255 outside of the photo.
        """

        def work(photo: int) -> Tensor:
            blank = torch.zeros(3, *maps[photo].shape[1:])
            views = [self._view(blank, one, photo, view)[1] for view in range(VIEWS) for one in maps[photo]]
            views = torch.stack(views)[:, 2::4, 2::4].to(torch.uint8)
            return views.unflatten(0, (VIEWS, len(maps[photo])))

        return self.workers.map(f"views of the {name}", work, range(len(maps)))


class Evidence:
    """What the mask loss sees beside the masks: saliency and class activation maps of the same views."""

    def __init__(self, examples: Examples, saliency: Sequence[Tensor]) -> None:
        self.photos = examples.photos
        self.saliency = examples.views("saliency", [_to_bytes(found) for found in saliency])
        maps = [_to_bytes(photo.maps[0]) for photo in examples.photos]  # of the present classes
        self.activation = examples.views("class activation maps", maps)

    def __call__(self, views: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor, Tensor]:
        """Saliency (B,h,w), activation (B,C,h,w) and labels (B,C) of B (photo, view) pairs."""
        saliency = torch.cat([_from_bytes(self.saliency[photo][view]) for photo, view in views])
        labels = torch.cat([self.photos[photo].labels for photo, _ in views])
        activation = torch.zeros(*labels.shape, *saliency.shape[1:])
        for place, (photo, view) in enumerate(views):
            activation[place, labels[place]] = _from_bytes(self.activation[photo][view])
        return saliency, activation, labels


def _to_bytes(maps: Tensor) -> Tensor:
    return (254 * maps).round().to(torch.uint8)


def _from_bytes(maps: Tensor) -> Tensor:
    return maps.where(maps != 255, 0) / 254


def mask_loss(evidence: Evidence, weight: float, **settings: object) -> Extra:
    def loss(logits: Tensor, target: Tensor, seen: Sequence[tuple[int, int]]) -> Tensor:
        valid = target != 255
        return weight * pl.losses.activation_aware_mask_loss(logits, *evidence(seen), valid=valid, **settings)

    return loss


def train_decoder(
    examples: Examples,
    targets: Sequence[Tensor],
    num_classes: int,
    settings: Settings,
    puf: dict,
    extra: Extra | None,
) -> tuple[Decoder, float]:
    """A new decoder, and the share of the steps in which the gate of pretended under-fitting was open."""
    opened = []

    def sample(photo: int, random: np.random.Generator) -> tuple[Tensor, Tensor]:
        view = int(random.integers(VIEWS))
        return examples.features[photo][view].float(), torch.tensor([photo, view])

    def loss(logits: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        target = torch.cat([targets[photo][view] for photo, view in seen.tolist()]).long()
        if puf:
            plain = pl.losses.pretended_under_fitting_loss(logits.detach(), target, beta=0, mean_over="all")
            opened.append(float(plain) < puf["beta"])
        total, number = segmentation_loss(logits, target, **puf)
        if extra is not None:
            total = total + number * extra(logits, target, seen.tolist())
        return total, number

    decoder = Decoder(num_classes)
    generator = torch.Generator().manual_seed(settings.seed)
    for parameter in decoder.parameters():  # of a size that keeps the size of the features
        bound = (6 / parameter[0].numel()) ** 0.5 if parameter.ndim > 1 else 0.0
        nn.init.uniform_(parameter, -bound, bound, generator=generator)
    train(decoder, sample, len(targets), loss, settings, workers=1, show=False)
    return decoder.eval(), statistics.fmean(opened) if puf else 0.0


# ------------------------------------------------------------------------------------------------ inference


def inference_features(net: nn.Module, photo: animals.Photo) -> list[Tensor]:
    image = photo.image * 2 - 1
    scale = INFERENCE_SCALE * CROP / max(image.shape[2:])
    return [features(net, view) for view in pl.cam.make_views(image, (scale,), flip=True)]


@torch.no_grad()
def predict(decoder: Decoder, views: Sequence[Tensor], photo: animals.Photo) -> Tensor:
    """The network alone: no labels, no CRF."""
    return pl.masks.relabel(photo.image, [decoder(view.float()) for view in views], crf=None)


@torch.no_grad()
def relabel(decoder: Decoder, views: Sequence[Tensor], photo: animals.Photo) -> Tensor:
    """The cyclic mask, with the CRF, of the classes that the photo is labelled with."""
    present = torch.cat([torch.zeros(1, dtype=torch.int64), photo.labels[0].nonzero()[:, 0] + 1])
    logits = [decoder(view.float())[:, present] for view in views]
    return present[pl.masks.relabel(photo.image, logits)]


def miou(masks: Sequence[Tensor], photos: Sequence[animals.Photo], num_classes: int) -> float:
    metric = pl.metrics.PseudoLabelMetric(num_classes, pred_ignore="background")
    for mask, photo in zip(masks, photos, strict=True):
        metric.update(mask, photo.truth)
    return metric.compute(sync=False).miou


# ---------------------------------------------------------------------------------------------------- table


def first_masks(net: nn.Module, photos: list[animals.Photo], workers: animals.Workers) -> list[Tensor]:
    """Masks from image-level labels alone, as in `voc_animals.py`."""
    views = workers.map("features of the classifier", partial(animals.pooled_features, net), photos)
    labels = [photo.labels.float().expand(len(view), -1) for photo, view in zip(photos, views, strict=True)]
    weight = animals.train_classifier(torch.cat(views), torch.cat(labels))
    workers.map("class activation maps", partial(animals.add_maps, net, weight), photos)
    crf = DenseCRF(**CRF_PRESETS["deeplab"])

    def work(photo: animals.Photo) -> Tensor:
        return animals.proportional(photo.image, photo.cam, photo.labels, ALPHA, crf=crf)

    return workers.map("masks", work, photos)


class Experiment:
    """What all rows of the table share."""

    def __init__(
        self,
        net: nn.Module,
        training: list[animals.Photo],
        scoring: list[animals.Photo],
        options: argparse.Namespace,
        workers: animals.Workers,
    ) -> None:
        self.training, self.scoring, self.options, self.workers = training, scoring, options, workers
        self.net = net
        self.num_classes = 1 + training[0].labels.shape[1]
        self.examples = Examples(net, training, workers)
        look = partial(inference_features, net)
        self.seen_in_training = workers.map("features of the training photos", look, training)
        self.seen = workers.map("features of the photos to score", look, scoring)

    def train(self, targets: Sequence[Tensor], row: "Row", seed: int) -> tuple[Decoder, float]:
        settings = Settings(self.options.steps, 16, "adamw", lr=5e-3, weight_decay=1e-2, seed=seed)
        return train_decoder(self.examples, targets, self.num_classes, settings, row.puf, row.extra)

    def saliency(self) -> list[Tensor]:
        """Of the photos to train on, (1,H,W) each."""
        return self.workers.map("saliency", lambda photo: saliency(self.net, photo.image), self.training)

    def sharpened(self, found: Sequence[Tensor]) -> list[Tensor]:
        crf = DenseCRF(**CRF_PRESETS["deeplab"])

        def work(index: int) -> Tensor:
            return sharpened(found[index], self.training[index].image, crf)

        return self.workers.map("saliency, CRF", work, range(len(found)))

    def score(self, decoder: Decoder) -> float:
        def work(index: int) -> Tensor:
            return predict(decoder, self.seen[index], self.scoring[index])

        return miou(self.workers.map("score", work, range(len(self.scoring))), self.scoring, self.num_classes)

    def relabelled(self, decoder: Decoder) -> list[Tensor]:
        def work(index: int) -> Tensor:
            return relabel(decoder, self.seen_in_training[index], self.training[index])

        return self.workers.map("relabel", work, range(len(self.training)))


@dataclass
class Row:
    """A way of training: masks, settings of pretended under-fitting, a further loss; and what came out."""

    name: str
    masks: list[list[Tensor]]  # of each seed
    puf: dict = field(default_factory=dict)
    extra: Extra | None = None
    decoders: list[Decoder] = field(default_factory=list)
    open: list[float] = field(default_factory=list)
    masks_miou: list[float] = field(default_factory=list)
    miou: list[float] = field(default_factory=list)


def run(experiment: Experiment, rows: Sequence[Row]) -> None:
    """Train and score a decoder for each seed."""
    different = {id(masks): masks for row in rows for masks in row.masks}
    targets = {key: experiment.examples.views("masks", masks) for key, masks in different.items()}
    quality = {
        key: miou(masks, experiment.training, experiment.num_classes) for key, masks in different.items()
    }
    jobs = [(row, seed) for row in rows for seed in range(len(row.masks))]

    def work(job: tuple[Row, int]) -> tuple[Decoder, float]:
        row, seed = job
        return experiment.train(targets[id(row.masks[seed])], row, seed)

    for (row, seed), (decoder, share) in zip(jobs, experiment.workers.map("train", work, jobs), strict=True):
        row.decoders.append(decoder)
        row.open.append(share)
        row.masks_miou.append(quality[id(row.masks[seed])])
        row.miou.append(experiment.score(decoder))
        print(row.name, seed, row.masks_miou[-1], row.miou[-1], share, file=sys.stderr)


def all_rows(experiment: Experiment, masks: list[Tensor]) -> list[Row]:
    """Train the rows that are asked for, and return them."""
    options = experiment.options
    settings = {"beta": options.beta, "k": options.k}
    every = [masks] * options.seeds
    plain = Row(PLAIN, every)
    clamp, power = (Row(f"PUF `{mode}`", every, {"mode": mode, **settings}) for mode in ("clamp", "pow"))
    ignore = Row("PUF `ignore`", [masks], {"mode": "ignore", **settings})  # the first seed alone
    truth = [photo.truth for photo in experiment.training]
    bound = Row("true masks, " + PLAIN, [truth] * options.seeds)
    groups = {"true": [bound], "plain": [plain], "puf": [clamp, ignore, power]}
    if "mask" in options.rows:
        groups["mask"] = mask_loss_rows(experiment, every)
    rows = [row for name, group in groups.items() if name in options.rows for row in group]
    run(experiment, rows)
    if "puf" in options.rows:  # `clamp` and `ignore` have one gradient, so they give one network
        one, other = (row.decoders[0].state_dict().values() for row in (clamp, ignore))
        assert all(map(torch.equal, one, other))
    if "cycle" in options.rows:
        cycles = [
            Row(f"relabelled by {row.name}", [experiment.relabelled(decoder) for decoder in row.decoders])
            for row in (plain, clamp)
            if row.decoders
        ]
        run(experiment, cycles)
        rows += cycles
    return rows


def mask_loss_rows(experiment: Experiment, every: list[list[Tensor]]) -> list[Row]:
    """With saliency as it is, and sharpened by a dense CRF."""
    found = experiment.saliency()
    sharp = experiment.sharpened(found)
    rows = []
    for name, seen in (("", found), (", CRF", sharp)):
        evidence = Evidence(experiment.examples, seen)
        rows += [
            Row(
                f"plain + mask loss `{mode}`{name}",
                every,
                extra=mask_loss(evidence, experiment.options.weight, mode=mode),
            )
            for mode in ("none", "ignore", "complete")
        ]
    return rows


def table(rows: Sequence[Row]) -> Iterator[str]:
    plain = next(row.miou for row in rows if row.name == PLAIN)
    yield "| training | mIoU of its masks | mIoU of the network | of each seed | against plain | gate open |"
    yield "|---|---|---|---|---|---|"
    for row in rows:
        cells = [
            row.name,
            spread(row.masks_miou),
            spread(row.miou),
            " ".join(short(value) for value in row.miou),
            "" if row.miou is plain else spread(difference(row.miou, plain), sign=True),
            f"{statistics.fmean(row.open):.0%}" if row.puf else "",
        ]
        yield "| " + " | ".join(cells) + " |"


def difference(values: Sequence[float], others: Sequence[float]) -> list[float]:
    """Of the same seed, so of the same first weights and the same order of examples."""
    return [value - other for value, other in zip(values, others, strict=False)]


def short(value: float, *, sign: bool = False) -> str:
    return f"{value:+.3f}".replace("0.", ".", 1) if sign else f"{value:.3f}".removeprefix("0")


def spread(values: Sequence[float], *, sign: bool = False) -> str:
    """Mean and standard deviation; the one figure where there is one."""
    mean = short(statistics.fmean(values), sign=sign)
    return f"{mean} ± {short(statistics.stdev(values))}" if len(set(values)) > 1 else mean


def main() -> None:
    options = arguments()
    start = time.perf_counter()
    classes = animals.read_classes(options.train)
    training = animals.read_photos(options.train, options.limit, classes)
    if options.score is None:
        training, scoring = training[0::2], training[1::2]
    else:
        scoring = animals.read_photos(options.score, options.limit, classes)
    workers = animals.Workers(options.workers)
    net = animals.load_network(options.weights, 16)
    masks = first_masks(net, training, workers)
    experiment = Experiment(net, training, scoring, options, workers)
    rows = all_rows(experiment, masks)
    print(
        f"\n{len(training)} photos to train on, {len(scoring)} scored; {options.steps} steps of 16 views; "
        f"beta {options.beta:g}, k {options.k:g}\nmean ± standard deviation over {options.seeds} seeds\n"
        f"{options.workers} threads, {time.perf_counter() - start:.0f} s in all\n"
    )
    print("\n".join(table(rows)))
    if options.json:
        figures = [
            {name: getattr(row, name) for name in ("name", "puf", "open", "masks_miou", "miou")}
            for row in rows
        ]
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


def arguments() -> argparse.Namespace:
    data = Path(os.environ.get("PSEUDOLABEL_DATA", animals.SHARED)) / "voc-animals"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train", type=Path, default=data, help="folder of photos to train on")
    parser.add_argument("--score", type=Path, help="folder to score (default: half of the one to train on)")
    parser.add_argument(
        "--rows", nargs="+", choices=ROWS, default=ROWS, help="of the table (default: all; plain always)"
    )
    parser.add_argument("--seeds", type=int, default=3, help="decoders of each row")
    parser.add_argument("--steps", type=int, default=250, help="of training")
    parser.add_argument("--beta", type=float, default=0.5, help="of pretended under-fitting")
    parser.add_argument("--k", type=float, default=0.5, help="of pretended under-fitting")
    parser.add_argument("--weight", type=float, default=1.0, help="of the mask loss")
    parser.add_argument("--limit", type=int, help="photos of each folder, for a quick look")
    parser.add_argument("--workers", type=int, default=2, help="threads")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    options.rows = {"plain", *options.rows}
    options.weights = Path(os.environ.get("PSEUDOLABEL_WEIGHTS", animals.SHARED / "weights"))
    scored = options.score or options.train
    for path in (options.train / "classes.txt", scored / "masks", options.weights / "net.py"):
        if not path.exists():
            sys.exit(f"{path} is missing: name the data by PSEUDOLABEL_DATA and PSEUDOLABEL_WEIGHTS")
    return options


if __name__ == "__main__":
    main()
