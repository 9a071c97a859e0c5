"""RTC on real photos: one network, one training, from image-level labels to a segmentation branch.

    python benchmarks/voc_rtc.py [--limit N] [--seeds N] [--epochs N] [--device cuda] [--json FILE]

The end of a MobileNetV2, a classifier, the refinement of its maps and a light decoder learn with
`pseudolabel.recipes.RTCLoss` from image-level labels alone, on the photos of `voc-animals` and of its
`extra` folder. The terms of the loss come in one after the other. The photos with masks are scored:

- the maps of the classifier (CAM) and the refined ones, with a threshold that is chosen on one half of the
  photos and scored on the other;
- the segmentation branch, which has no threshold to choose, and what a dense CRF makes of it.

What lies before the end of the network stays as it is, so its output is computed once. Masks are never
learnt from. Data and weights are found as in `voc_animals.py`.
"""

import argparse
import copy
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import voc_animals as animals
import voc_icd as icd
from torch import Tensor, nn
from torch.nn import functional as F
from voc_segmenter import Decoder

import pseudolabel as pl
from pseudolabel.heads import Compensator, CrossRepresentationRefinement
from pseudolabel.recipes import RTCLoss, ViewOutput
from pseudolabel.refine import CRF_PRESETS, DenseCRF

STRIDE = 16
SIDES = (288, 384)  # view 1 of every photo, across or upright
SMALLER = 2  # view 2 is so many times smaller
FROZEN = 16  # blocks that stay as they are, of 17
FINE, DEEP, LAST = 128, 320, 1280  # channels: of block 6, folded to stride 16; of block 17; of the last layer
SIZES = {"shallow_reduce": (32,), "deep_reduce": (64, 64), "shallow_embed": 64, "deep_embed": 64}
BATCH = 8
LR, NEW_LR = 3e-4, 5e-3  # of what was learnt before, and of what starts anew
BACKGROUND = 0.17  # score of the background beside those of the segmentation branch, as published
KINDS = ("CAM", "refined maps", "segmentation")
SEAM = ("classification", "min_pooling", "equivariance", "equivariant_cross")
CTR = ("intra_view", "cross_label", "cross_prototype")


# ------------------------------------------------------------------------------------------------- photos


@dataclass
class View:
    """What the frozen blocks see in photos, plain and mirrored ones in one batch."""

    deep: Tensor  # (B,160,h,w) half
    fine: Tensor  # (B,128,h,w) half
    image: Tensor  # (B,3,H,W) uint8, half as large as the network saw it: the losses are computed there

    def pick(self, which: int) -> "View":
        return View(*(part[which : which + 1] for part in vars(self).values()))

    @property
    def size(self) -> tuple[int, int]:
        return self.image.shape[2], self.image.shape[3]


@dataclass(eq=False)
class Example:
    """A photo, seen in two sizes, each plain and mirrored."""

    photo: animals.Photo
    views: tuple[View, View]
    pooled: Tensor  # (4,1280) mean features of the last layer


def frozen(net: nn.Module, image: Tensor) -> View:
    """The first blocks on images (B,3,H,W) in [0, 1]."""
    x = F.relu6(net.stem(image * 2 - 1))
    for number, block in enumerate(net.blocks[:FROZEN]):
        x = block(x)
        if number == 5:
            fine = F.pixel_unshuffle(x, 2)
    half = F.interpolate(image, scale_factor=0.5, mode="bilinear", antialias=True)
    return View(x.half(), fine.half(), (255 * half).round().clamp(0, 255).to(torch.uint8))


@torch.no_grad()
def look(net: nn.Module, photo: animals.Photo) -> Example:
    image = photo.image
    sides = SIDES if image.shape[3] > image.shape[2] else SIDES[::-1]
    image = F.interpolate(image, size=sides, mode="bilinear", antialias=True).clamp(0, 1)
    smaller = F.interpolate(
        image, size=[side // SMALLER for side in sides], mode="bilinear", align_corners=True
    )
    views = tuple(frozen(net, torch.cat([view, view.flip(-1)])) for view in (image, smaller))
    rest = [block_and_last(net.blocks[FROZEN], net.head, view)[1].mean((2, 3)) for view in views]
    return Example(photo, views, torch.cat(rest))


def block_and_last(block: nn.Module, last: nn.Module, view: View) -> tuple[Tensor, Tensor]:
    deep = block(view.deep.float().to(memory_format=torch.channels_last))
    return deep, F.relu6(last(deep))


def gather(views: Sequence[View], device: str) -> View:
    """One batch of views of one shape."""
    parts = zip(*(vars(view).values() for view in views), strict=True)
    return View(*(torch.cat(part).to(device) for part in parts))


# ------------------------------------------------------------------------------------------------ network


class OneCorrelation(nn.Module):
    """The refinement of SEAM: a single affinity, of the image and of shallow and deep features together."""

    def __init__(self) -> None:
        super().__init__()
        self.reduce = nn.ModuleList(
            nn.Conv2d(before, after, 1, bias=False) for before, after in ((FINE, 32), (DEEP, 64))
        )
        self.embed = nn.Conv2d(3 + 32 + 64, 96, 1, bias=False)

    def forward(self, cam: Tensor, shallow: list[Tensor], deep: list[Tensor], image: Tensor) -> Tensor:
        taps = [F.relu(conv(x.detach())) for conv, x in zip(self.reduce, (*shallow, deep[0]), strict=True)]
        image = F.interpolate(image, size=cam.shape[2:], mode="bilinear", align_corners=True)
        features = self.embed(torch.cat([image, *taps], 1))
        return pl.refine.pixel_correlation(pl.refine.cam_seed(cam.detach()), features)


class Network(nn.Module):
    """What learns: the end of the network, classifier, refinement and segmentation branch."""

    def __init__(self, net: nn.Module, weight: Tensor, *, crr: bool) -> None:
        super().__init__()
        self.block, self.last = (copy.deepcopy(part) for part in (net.blocks[FROZEN], net.head))
        self.classifier = nn.Conv2d(LAST, len(weight), 1, bias=False)
        self.classifier.weight.data = weight[:, :, None, None].clone()
        self.requires_grad_()
        self.refine = (
            CrossRepresentationRefinement([FINE], [DEEP, LAST], **SIZES) if crr else OneCorrelation()
        )
        self.decoder = Decoder(1 + len(weight))
        for parameter in self.decoder.parameters():
            if parameter.ndim > 1:
                nn.init.kaiming_uniform_(parameter, nonlinearity="relu")
            else:
                nn.init.zeros_(parameter)

    def forward(self, view: View, *, segment: bool = True) -> ViewOutput:
        deep, features = block_and_last(self.block, self.last, view)
        cam, fine = self.classifier(features), view.fine.float()
        refined = self.refine(cam, [fine], [deep, features], view.image / 127.5 - 1)
        logits = self.decoder(torch.cat([deep, fine], 1)) if segment else None
        return ViewOutput(cam, refined, features, view.size, logits)

    def param_groups(self) -> list[dict]:
        known = [*self.block.parameters(), *self.last.parameters(), *self.classifier.parameters()]
        new = [*self.refine.parameters(), *self.decoder.parameters()]
        return [{"params": known, "lr": LR}, {"params": new, "lr": NEW_LR}]


# ----------------------------------------------------------------------------------------------- training


@dataclass(frozen=True)
class Row:
    """Terms of the loss, and what refines the maps."""

    name: str
    terms: tuple[str, ...]
    crr: bool = True
    temperature: float = 1.0  # of the compensator
    seeds: int = 1
    full: bool = False  # all that comes from the segmentation branch is scored


def new_network(net: nn.Module, weight: Tensor, row: Row, seed: int) -> Network:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Network(net, weight, crr=row.crr)


def train(
    network: Network, examples: Sequence[Example], row: Row, seed: int, options: argparse.Namespace
) -> Network:
    network.to(options.device)
    compensator = Compensator(temperature=row.temperature)
    loss_fn = RTCLoss(seg_start_epoch=options.seg_start, compensator=compensator)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.param_groups(), weight_decay=5e-4)

    def loss_at(step: int, steps: int, batch: Sequence[int], mirrored: Sequence[int]) -> Tensor:
        pairs = [(examples[index], which) for index, which in zip(batch, mirrored, strict=True)]
        view1, view2 = (
            gather([example.views[number].pick(which) for example, which in pairs], options.device)
            for number in (0, 1)
        )
        labels = torch.cat([example.photo.labels for example, _ in pairs]).float().to(options.device)
        out1, out2 = network(view1), network(view2, segment=False)
        terms = loss_fn(out1, out2, labels, view1.image / 255, epoch=step // steps).terms
        return torch.stack([terms[name] for name in (*row.terms, "segmentation")]).sum()

    shapes = [example.views[0].size for example in examples]
    icd.fit(optimizer, loss_at, shapes, options.epochs, generator, BATCH)
    return network.eval()


# ------------------------------------------------------------------------------------------------ scoring


Maps = dict[str, Tensor]  # of a photo, each (1,C,h,w)


@torch.no_grad()
def predict(network: Network, device: str, example: Example) -> Maps:
    """CAM and refined maps of view 1, scores of the segmentation branch of both views; mirrored as well."""
    out1, out2 = (network(gather([view], device)) for view in example.views)
    cam, refined = (value[:1] + value[1:].flip(-1) for value in (out1.cam, out1.refined[:, 1:]))
    fused = [pl.masks.fuse_segmentation_and_class(o.logits, o.cam, o.input_size) for o in (out2, out1)]
    views = [both[which : which + 1] for both in fused for which in (0, 1)]
    maps = {
        "CAM": pl.cam.normalize_cam(cam),
        "refined maps": pl.cam.normalize_cam(refined, "minmax-zero"),
        "segmentation": pl.cam.merge_views(views, out1.input_size) / len(views),
    }
    return {name: value.cpu() for name, value in maps.items()}


def segmented(
    photo: animals.Photo,
    scores: Tensor,
    background: float,
    *,
    labelled: bool = True,
    crf: DenseCRF | None = None,
) -> Tensor:
    """The mask of the segmentation branch, in the size of the photo."""
    scores = F.interpolate(scores, size=photo.truth.shape[1:], mode="bilinear")
    if labelled:
        scores = scores.where(photo.labels[:, :, None, None], 0)
    mask = pl.masks.scores_to_mask(pl.masks.constant_background(scores, background))
    found, few = mask.unique(return_inverse=True)  # classes without a pixel would win none
    if crf is None or len(found) == 1:
        return mask
    return found[pl.masks.scores_to_mask(crf(photo.image, pl.refine.probs_from_mask(few, len(found))))]


class Scores(icd.Rows):
    """Rows of networks."""

    def __init__(self, scored: Sequence[Example], workers: animals.Workers, device: str) -> None:
        super().__init__([example.photo for example in scored])
        self.scored, self.workers, self.device = scored, workers, device

    def add(self, name: str, network: Network, kinds: Sequence[str] = KINDS) -> Callable[[], None]:
        """The maps of a network, each cut at a threshold; what is returned adds further rows."""
        found = self.workers.map("maps", partial(predict, network, self.device), self.scored)
        for kind in kinds:
            chosen = self._add_chosen(f"{name}: {kind}", [maps[kind] for maps in found])
        return partial(self._add_branch, name, [maps["segmentation"] for maps in found], chosen)

    def _add_branch(self, name: str, scores: Sequence[Tensor], chosen: Sequence[float]) -> None:
        self._add_masks(f"{name}: segmentation, threshold {BACKGROUND}", scores, [BACKGROUND] * 2)
        self._add_masks(f"{name}: segmentation, without image labels", scores, chosen, labelled=False)
        crf = DenseCRF(**CRF_PRESETS["deeplab"])
        self._add_masks(f"{name}: segmentation + CRF `deeplab`", scores, chosen, crf=crf)

    def _add_chosen(self, name: str, maps: Sequence[Tensor]) -> list[float]:
        """With a threshold from the other half: of the photos at even places, and of those at odd ones."""
        for photo, value in zip(self.photos, maps, strict=True):
            photo.maps = F.interpolate(value[:, photo.labels[0]], size=photo.truth.shape[1:], mode="bilinear")
        halves = self.photos[0::2], self.photos[1::2]
        plain = next(way for way in animals.ways() if way.name == "CAM")
        row = animals.score_way(animals.Scorer(self.workers, self.num_classes), plain, [halves[::-1], halves])
        for photo in self.photos:
            photo.maps = None
        self.add_figures(name, row)
        print("chosen:", *row["chosen"], file=sys.stderr)
        return row["chosen"]

    def _add_masks(
        self, name: str, scores: Sequence[Tensor], thresholds: Sequence[float], **settings: object
    ) -> None:
        def count(number: int) -> animals.Score:
            photo = self.photos[number]
            return self.count(segmented(photo, scores[number], thresholds[number % 2], **settings), photo)

        self.add_counts(name, self.workers.map(name, count, range(len(scores))))


# ---------------------------------------------------------------------------------------------------- table


def all_rows(seeds: int) -> list[Row]:
    every = (*SEAM, *CTR, "compensation")
    return [
        Row("SEAM's terms", SEAM, crr=False),
        Row("+ CRR", SEAM),
        Row("+ CTR", (*SEAM, *CTR)),
        Row("+ compensator", every, seeds=seeds, full=True),
        Row("compensator at 0.05", every, temperature=0.05),
    ]


def main() -> None:
    options = arguments()
    start = time.perf_counter()
    data, classes = options.data, animals.read_classes(options.data)
    scored = animals.read_photos(data, options.limit, classes)
    photos = [*scored, *animals.read_photos(data / "extra", options.limit, classes)]
    workers = animals.Workers(options.workers)
    net = animals.load_network(options.weights, STRIDE)
    examples = workers.map("frozen features", partial(look, net), photos)
    labels = torch.cat([e.photo.labels.float().expand(len(e.pooled), -1) for e in examples])
    weight = animals.train_classifier(torch.cat([e.pooled for e in examples]), labels)
    scores = Scores(examples[: len(scored)], workers, options.device)
    scores.add("before training", Network(net, weight, crr=True).to(options.device), ["CAM"])
    for row in all_rows(options.seeds):
        networks = [new_network(net, weight, row, seed) for seed in range(row.seeds)]

        def learn(seed: int, row: Row = row, networks: list[Network] = networks) -> Network:
            return train(networks[seed], examples, row, seed, options)

        workers.map(f"train, {row.name}", learn, range(row.seeds))
        further = [scores.add(row.name, network) for network in networks]
        if row.full:
            full = further
    for add_rows in full:
        add_rows()
    said = (
        f"{len(photos)} photos to train on, {len(scored)} scored\n"
        f"{options.epochs} epochs, the segmentation branch from epoch {options.seg_start} on"
    )
    icd.report(options, classes, scores, start=start, said=said)


def arguments() -> argparse.Namespace:
    parser = icd.common_arguments(__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="networks of the last rows")
    parser.add_argument("--epochs", type=int, default=2, help="of training")
    parser.add_argument(
        "--seg-start", type=int, default=1, help="first epoch of the segmentation branch, from 0"
    )
    parser.add_argument("--device", default="cpu", help="to train on; features and scores stay on the CPU")
    return icd.parse(parser)


if __name__ == "__main__":
    main()
