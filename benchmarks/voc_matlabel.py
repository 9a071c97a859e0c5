"""Double decoupled CAMs and matting on real photos, step by step.

    python benchmarks/voc_matlabel.py [--limit N] [--seeds N] [--epochs N] [--tune-epochs N] [--json FILE]

A classifier on a MobileNetV2, and the head of `pseudolabel.heads` beside it, learn from image-level labels
alone, on the photos of `voc-animals` and of its `extra` folder; photos, network and features are those of
`voc_icd.py`. The photos with masks are scored:

- class activation maps (CAM), with a threshold chosen on one half of the photos and scored on the other;
- the argmax of the head's posterior, with and without each term of its loss: no threshold to choose;
- what matting, a guided filter and the dense CRF make of that posterior.

The backbone is frozen, or its last blocks learn as well ("tuned"). Masks are never learnt from. Data and
weights are found as in `voc_animals.py`.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import voc_animals as animals
import voc_icd as icd
from torch import Tensor
from torch.nn import functional as F
from voc_icd import Example, Maps, MaskRule, Tail

import pseudolabel as pl
from pseudolabel.heads import DoubleDecoupledCAM, d2cam_anchor_weight, d2cam_posterior
from pseudolabel.matting import MattingRefiner, guided_filter
from pseudolabel.refine import CRF_PRESETS, DenseCRF

BATCH = 16
WARMUP_EPOCHS = 1
SURE, SURE_NOT = 0.5, 0.1  # of the frozen CAM: above it is foreground to the anchor, below background
SOFT = 5.0  # temperature of a posterior that a refiner weighs against the photo
NO_TERM = {"category_weight": 0.0, "fb_weight": 0.0, "exclusivity_weight": 0.0}
VARIANTS = {
    "anchor alone": {"anchor_stays": True, **NO_TERM},
    "+ category": {"anchor_stays": True, "fb_weight": 0.0, "exclusivity_weight": 0.0},
    "+ foreground-background": {"anchor_stays": True, "exclusivity_weight": 0.0},
    "+ exclusivity": {"anchor_stays": True},
    "whole (the anchor ends)": {},
    "whole without category": {"category_weight": 0.0},
    "whole without foreground-background": {"fb_weight": 0.0},
    "whole without exclusivity": {"exclusivity_weight": 0.0},
    "whole without anchor": {"warmup": 0.0},
    "whole with `margin`": {"fb": "margin"},
    "whole with `triplet`": {"fb": "triplet"},
}


# ----------------------------------------------------------------------------------------------- training


@dataclass(eq=False)
class Model:
    """A head, the tail of the network where that has learnt as well, and when the anchor ends."""

    head: DoubleDecoupledCAM
    tail: Tail | None = None
    warmup: float = WARMUP_EPOCHS

    def see(self, examples: Sequence[Example], views: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Features and raw CAMs of one view of each example."""
        return icd.Model.see(self, examples, views)


def new_model(
    num_foreground: int,
    seed: int,
    tail: Tail | None = None,
    *,
    anchor_stays: bool = False,
    warmup: float = WARMUP_EPOCHS,
    **settings: object,
) -> Model:
    generator = torch.Generator().manual_seed(seed)
    head = DoubleDecoupledCAM(160, num_foreground, generator=generator, **settings)
    return Model(head, tail and tail.trainable(), 1e9 if anchor_stays else warmup)


@torch.no_grad()
def certain(example: Example) -> Tensor:
    """What the frozen CAM is sure of, in both views (2,h,w)."""
    cam = (example.cam + example.cam.flip(0, -1)) / 2
    labels = example.photo.labels.expand(2, -1)
    cam = pl.cam.normalize_cam(cam) * labels[:, :, None, None]
    return pl.masks.dual_threshold_mask(cam, labels=labels, high=SURE, low=SURE_NOT)


def train(model: Model, examples: Sequence[Example], epochs: int, seed: int) -> Model:
    generator = torch.Generator().manual_seed(seed)
    anchors = [certain(example) for example in examples]
    groups = [{"params": list(model.head.parameters()), "lr": icd.HEAD_LR}]
    if model.tail is not None:
        groups.append({"params": list(model.tail.parameters()), "lr": icd.TAIL_LR})
    optimizer = torch.optim.AdamW(groups, weight_decay=1e-4)

    def loss_at(step: int, steps: int, batch: Sequence[int], views: Sequence[int]) -> Tensor:
        seeds = torch.stack([anchors[index][view] for index, view in zip(batch, views, strict=True)])
        weight = d2cam_anchor_weight(step, round(model.warmup * steps))
        return loss_of(model, [examples[index] for index in batch], views, seeds, weight)

    shapes = [example.trunk.shape for example in examples]
    icd.fit(optimizer, loss_at, shapes, epochs, generator)
    model.head.eval()
    return model


def loss_of(
    model: Model, examples: Sequence[Example], views: Sequence[int], seeds: Tensor, anchor_weight: float
) -> Tensor:
    labels = torch.cat([example.photo.labels for example in examples]).float()
    features, cam = model.see(examples, views)
    loss = model.head(features, labels, seeds, anchor_weight=anchor_weight).loss
    if model.tail is not None:
        logits = cam.mean((2, 3)) + model.tail.bias
        loss = loss + F.binary_cross_entropy_with_logits(logits, labels)
    return loss


# ------------------------------------------------------------------------------------------- ways to a mask


@torch.no_grad()
def maps_of(model: Model, example: Example) -> Maps:
    """CAM and logits of the head, averaged over the plain and the mirrored view."""
    features, cam = model.see([example, example], [0, 1])
    logits = model.head(features, example.photo.labels.expand(2, -1)).logits
    return {
        name: (value[:1] + value[1:].flip(-1)) / 2 for name, value in {"cam": cam, "logits": logits}.items()
    }


def of_present(rule: MaskRule, **settings: object) -> MaskRule:
    """A rule for the logits of background and present classes alone, on the grid of the photo."""

    def run(photo: animals.Photo, maps: Maps) -> Tensor:
        present = photo.labels[0].nonzero()[:, 0] + 1
        places = torch.cat([present.new_zeros(1), present])
        logits = F.interpolate(maps["logits"][:, places], size=photo.truth.shape[1:], mode="bilinear")
        return places[rule(photo.image, logits, **settings)]

    return run


def everyone(logits: Tensor) -> Tensor:
    return logits.new_ones(1, logits.shape[1] - 1)


def argmax(_image: Tensor, logits: Tensor) -> Tensor:
    return pl.masks.scores_to_mask(logits)


def refined(image: Tensor, logits: Tensor, *, refine: MaskRule, temperature: float = SOFT) -> Tensor:
    posterior = d2cam_posterior(logits, everyone(logits), temperature=temperature)
    return pl.masks.scores_to_mask(refine(image, posterior))


def matted(image: Tensor, logits: Tensor, *, temperature: float = SOFT, **settings: object) -> Tensor:
    posterior = d2cam_posterior(logits, everyone(logits), temperature=temperature)
    undecided = {"confidence": None, "margin": None}  # every pixel is scored
    return pl.recipes.matlabel(image, posterior, everyone(logits), **undecided, **settings)


def fast_ways() -> dict[str, MaskRule]:
    return {"argmax": of_present(argmax)}


def slow_ways() -> dict[str, MaskRule]:
    crf = DenseCRF(**CRF_PRESETS["deeplab"])
    sure, loose, unknown = (
        pl.masks.TrimapBuilder(
            kind="posterior", foreground=value, background=value, margin=margin, **settings
        )
        for value, margin, settings in (
            (0.8, 0.2, {}),
            (0.6, 0.0, {"erode": 8}),
            (1.0, 0.0, {"fallback": 0.0}),
        )
    )
    knn, walk, half = (
        MattingRefiner("knn", scale=0.5, prior_weight=0.1),
        MattingRefiner("random_walk"),
        MattingRefiner(scale=0.5),
    )
    return {
        "CRF": of_present(refined, refine=crf, temperature=1.0),
        "softened, CRF": of_present(refined, refine=crf),
        "trimap, closed form": of_present(matted, refine=None, trimap=sure, temperature=1.0),
        "softened, prior alone, closed form": of_present(matted, refine=None, trimap=unknown, matting=half),
        "softened, guided filter": of_present(refined, refine=guided_filter),
        "softened, guided filter, closed form": of_present(matted, refine=guided_filter, trimap=loose),
        "softened, CRF, closed form (recipe)": of_present(matted),
        "softened, CRF, KNN": of_present(matted, matting=knn),
        "softened, CRF, random walk": of_present(matted, matting=walk),
    }


# --------------------------------------------------------------------------------------------------- report


def main() -> None:
    options = icd.arguments(__doc__)
    start = time.perf_counter()
    data, classes = options.data, animals.read_classes(options.data)
    scored = animals.read_photos(data, options.limit, classes)
    photos = [*scored, *animals.read_photos(data / "extra", options.limit, classes)]
    workers = animals.Workers(options.workers)
    net = animals.load_network(options.weights, icd.STRIDE)
    tail, examples = icd.prepare(net, photos, workers, regions=0)
    scores = icd.Scores(examples[: len(scored)], workers, maps_of)
    seeds = range(options.seeds)

    def learn(name: str, epochs: int, base: Tail | None = None, **settings: object) -> list[Model]:
        models = [new_model(len(classes), seed, base, **settings) for seed in seeds]
        return workers.map(f"train, {name}", lambda seed: train(models[seed], examples, epochs, seed), seeds)

    for number, (name, settings) in enumerate(VARIANTS.items()):
        models = learn(name, options.epochs, **settings)
        if number == 0:
            scores.add_cam("frozen: CAM", models[:1])
        scores.add(f"frozen, {name}", models, fast_ways(), slow_ways() if settings == {} else {})
    if options.tune_epochs:
        models = learn("tuned", options.tune_epochs, tail)
        scores.add_cam("tuned: CAM", models)
        scores.add("tuned, whole", models, fast_ways(), {})
    icd.report_tuned(options, classes, scores, start=start, photos=len(photos))


if __name__ == "__main__":
    main()
