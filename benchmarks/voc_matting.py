"""Trimaps and matting on real photos: how right the sure pixels are, and what matting makes of the rest.

    python benchmarks/voc_matting.py [--train FOLDER ...] [--score FOLDER] [--limit N] [--json FILE]

Classifier and class activation maps are those of `voc_animals.py`, smoothed as in its best row; so is the way
of choosing settings, on photos that are not scored with them. Data and weights are found as there.

Two tables come out: of trimaps, and of ways to a mask.
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
from torch import Tensor
from voc_animals import Photo, Way

import pseudolabel as pl
from pseudolabel.masks import TRIMAP_PRESETS
from pseudolabel.matting import MattingRefiner
from pseudolabel.refine import CRF_PRESETS, DenseCRF

BAND = 15  # pixels on either side of the edge of a mask that matting may move
CENTRE = 0.5  # between foreground and background in smoothed maps
PRIOR_WEIGHT = 1e-3
smooth = pl.refine.coefficient_of_variation_smoothing
crf = DenseCRF(**CRF_PRESETS["deeplab"])


# ------------------------------------------------------------------------------------------------ trimaps


def trimap_around(maps: Tensor, centre: float, reach: float) -> Tensor:
    """Sure above centre + reach and below centre - reach; all channels are present classes."""
    return pl.masks.trimap_from_cam(
        maps, everyone(maps), foreground=centre + reach, background=centre - reach
    )


def everyone(maps: Tensor) -> Tensor:
    return maps.new_ones(maps.shape[:2])


def trimaps() -> dict[str, Callable[[Photo, Tensor], Tensor]]:
    """Ways from a photo and its maps to a trimap of its present classes."""

    def preset(name: str) -> Callable[[Photo, Tensor], Tensor]:
        return lambda _, maps: pl.masks.trimap_from_cam(maps, everyone(maps), **TRIMAP_PRESETS[name])

    def band(photo: Photo, maps: Tensor) -> Tensor:
        mask = crf_mask(photo.image, maps, CENTRE)
        return pl.masks.trimap_from_mask(mask, 1 + maps.shape[1], everyone(maps), erode=BAND)

    return {
        "preset `irn` (0.30 / 0.05)": preset("irn"),
        "preset `wavecam` (0.35 / 0.10)": preset("wavecam"),
        "preset `scd` (0.55 / 0.35)": preset("scd"),
        **{
            f"{CENTRE + reach:.2f} / {CENTRE - reach:.2f}": partial(
                lambda _, maps, reach: trimap_around(maps, CENTRE, reach), reach=reach
            )
            for reach in (0.1, 0.2, 0.3, 0.4)
        },
        f"mask of the CRF, edge loosened by {BAND}": band,
    }


def count(trimap: Tensor, photo: Photo) -> Tensor:
    """Pixels: foreground and right such, background and right such, unknown, all; true of either kind."""
    truth = photo.truth.long()
    known = truth != 255
    foreground, unknown = (trimap == 1).any(1) & known, (trimap == 0.5).any(1) & known
    background = known & ~foreground & ~unknown
    label = photo.labels[0].nonzero()[:, 0][trimap.argmax(1)] + 1
    parts = (
        foreground,
        foreground & (label == truth),
        background,
        background & (truth == 0),
        unknown,
        known,
        known & (truth > 0),
        truth == 0,
    )
    return torch.stack([part.sum() for part in parts])


def trimap_table(photos: Sequence[Photo], workers: animals.Workers) -> Iterator[str]:
    yield "| trimap | foreground right | of the true found | background right | of the true found | unknown |"
    yield "|---|---|---|---|---|---|"
    for name, make in trimaps().items():

        def work(photo: Photo, make: Callable = make) -> Tensor:
            return count(make(photo, maps_of(photo.cam, photo.labels)), photo)

        found = torch.stack(workers.map(name, work, photos)).sum(0).double()
        fg, fg_right, bg, bg_right, unknown, known, true_fg, true_bg = found.tolist()
        shares = (fg_right / fg, fg_right / true_fg, bg_right / bg, bg_right / true_bg, unknown / known)
        yield "| " + " | ".join([name, *(f"{share:.0%}" for share in shares)]) + " |"


# ------------------------------------------------------------------------------------------- ways to a mask


def maps_of(cam: Tensor, labels: Tensor) -> Tensor:
    """Smoothed maps of the present classes alone."""
    return smooth(cam[:, labels[0]])


def of_present(rule: Callable[[Tensor, Tensor, float], Tensor]) -> animals.MaskRule:
    """Make a rule for all classes of one for the maps of the present ones."""

    def run(image: Tensor, cam: Tensor, labels: Tensor, setting: float) -> Tensor:
        mask = rule(image, maps_of(cam, labels), setting)
        present = labels[0].nonzero()[:, 0] + 1
        return torch.cat([present.new_zeros(1), present])[mask]

    return run


def crf_probs(image: Tensor, maps: Tensor, background: float) -> Tensor:
    return crf(image, pl.masks.constant_background(maps, background))


def crf_mask(image: Tensor, maps: Tensor, background: float) -> Tensor:
    return pl.masks.scores_to_mask(crf_probs(image, maps, background))


def filtered(image: Tensor, maps: Tensor, background: float) -> Tensor:
    scores = pl.masks.constant_background(maps, background)
    return pl.masks.scores_to_mask(pl.matting.guided_filter(image, scores / scores.sum(1, keepdim=True)))


def sure(image: Tensor, maps: Tensor, setting: float, *, refiner: MattingRefiner, preset: str = "") -> Tensor:
    """Matting from sure pixels; the rest of the map is not looked at."""
    if preset:
        trimap = pl.masks.trimap_from_cam(maps, everyone(maps), **TRIMAP_PRESETS[preset])
    else:
        trimap = trimap_around(maps, setting, reach=0.15)
    return pl.masks.alpha_to_mask(refiner(image, trimap))


def expected(image: Tensor, maps: Tensor, background: float, *, refiner: MattingRefiner) -> Tensor:
    """Matting without sure pixels: the whole map is what mattes are drawn to."""
    scores = pl.masks.constant_background(maps, background)
    prior = (scores / scores.sum(1, keepdim=True))[:, 1:]
    return pl.masks.alpha_to_mask(refiner(image, torch.full_like(maps, 0.5), prior))


def after_crf(image: Tensor, maps: Tensor, background: float, *, refiner: MattingRefiner) -> Tensor:
    """Matting of a band along the edges of the mask of the CRF."""
    mask = crf_mask(image, maps, background)
    trimap = pl.masks.trimap_from_mask(mask, 1 + maps.shape[1], everyone(maps), erode=BAND)
    return pl.masks.alpha_to_mask(refiner(image, trimap))


def proportional(image: Tensor, cam: Tensor, labels: Tensor, alpha: float, *, refiner: MattingRefiner | None):
    """The best row of `voc_animals.py`, and with matting of a band along its edges."""
    mask = pl.masks.proportional_pseudo_mask(image, cam, labels, alpha=alpha, crf=crf)
    if refiner is None:
        return mask
    trimap = pl.masks.trimap_from_mask(mask, 1 + cam.shape[1], labels, erode=BAND)
    return pl.masks.alpha_to_mask(refiner(image, trimap), labels)


def ways() -> list[Way]:
    centres, backgrounds = (0.45, 0.5, 0.55), (0.46, 0.5, 0.54)
    closed_form, half = MattingRefiner(), partial(MattingRefiner, scale=0.5)
    weight = {"prior_weight": PRIOR_WEIGHT}

    def of(rule: Callable, **settings: object) -> animals.MaskRule:
        return of_present(partial(rule, **settings))

    return [
        Way("maps", partial(animals.threshold, smooth=smooth), smooth=smooth),
        Way("guided filter", of_present(filtered), backgrounds),
        Way("CRF `deeplab`", of_present(crf_mask), (0.42, 0.46, 0.5)),
        Way("trimap `irn`, closed form", of(sure, refiner=closed_form, preset="irn"), (0.3,)),
        Way("trimap `scd`, closed form", of(sure, refiner=closed_form, preset="scd"), (0.55,)),
        Way("trimap, closed form", of(sure, refiner=closed_form), centres),
        Way("trimap, random walk", of(sure, refiner=MattingRefiner("random_walk")), (CENTRE,)),
        Way("trimap, KNN", of(sure, refiner=half("knn")), (CENTRE,)),
        Way("prior, closed form", of(expected, refiner=half(**weight)), backgrounds),
        Way("prior, random walk", of(expected, refiner=half("random_walk", **weight)), backgrounds),
        Way("CRF, band, closed form", of(after_crf, refiner=closed_form), (0.42, 0.46, 0.5)),
        Way("CVS + PPMG, CRF `deeplab`", partial(proportional, refiner=None), (1.0,)),
        Way("CVS + PPMG, CRF, band, closed form", partial(proportional, refiner=closed_form), (1.0,)),
    ]


# --------------------------------------------------------------------------------------------------- report


def main() -> None:
    options = arguments()
    start = time.perf_counter()
    classes = animals.read_classes(options.train[0])
    training = [photo for folder in options.train for photo in animals.read_photos(folder, None, classes)]
    first = options.train[0]
    if options.score is None:
        scored = animals.read_photos(first, options.limit, classes)
        halves = scored[0::2], scored[1::2]
        splits = [halves, halves[::-1]]
    else:
        scored = animals.read_photos(options.score, options.limit, classes)
        splits = [(animals.read_photos(first, options.limit, classes), scored)]
    workers = animals.Workers(options.workers)
    net = animals.load_network(options.weights, 16)
    views = workers.map("features to train on", partial(animals.pooled_features, net), training)
    labels = [photo.labels.float().expand(len(view), -1) for photo, view in zip(training, views, strict=True)]
    weight = animals.train_classifier(torch.cat(views), torch.cat(labels))
    used = list(dict.fromkeys(photo for split in splits for part in split for photo in part))
    workers.map("class activation maps", partial(animals.add_maps, net, weight), used)

    of_trimaps = list(trimap_table(scored, workers))
    scorer = animals.Scorer(workers, num_classes=1 + len(classes))
    rows = [animals.score_way(scorer, way, splits) for way in ways()]
    print(
        f"\n{len(training)} photos to train on, {len(scored)} scored; maps masked by the true image labels\n"
        f"s/image is CPU time of one thread; {options.workers} threads, "
        f"{time.perf_counter() - start:.0f} s in all\n"
    )
    print("\n".join([*of_trimaps, "", *animals.table(rows)]))
    if options.json:
        result = {"classes": ["background", *classes], "trimaps": of_trimaps, "rows": rows}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


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
        help="folders to train on; settings are chosen on the first",
    )
    parser.add_argument("--score", type=Path, help="folder to score (default: the first to train on)")
    parser.add_argument("--limit", type=int, help="photos to score, for a quick look; all are trained on")
    parser.add_argument("--workers", type=int, default=2, help="threads")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    options.weights = Path(os.environ.get("PSEUDOLABEL_WEIGHTS", animals.SHARED / "weights"))
    scored = options.score or options.train[0]
    needed = [folder / "labels.csv" for folder in options.train]
    needed += [options.train[0] / "classes.txt", scored / "masks", options.weights / "net.py"]
    for path in needed:
        if not path.exists():
            sys.exit(f"{path} is missing: name the data by PSEUDOLABEL_DATA and PSEUDOLABEL_WEIGHTS")
    return options


if __name__ == "__main__":
    main()
