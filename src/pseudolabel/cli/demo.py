"""`pseudolabel demo`: from image-level labels to scored masks, on drawn scenes, in a minute or two."""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from pseudolabel import io
from pseudolabel.cam import CAM, multi_scale_cam, normalize_cam
from pseudolabel.cli._console import UserError, in_threads, progress, report, stdout
from pseudolabel.cli._folder import claim
from pseudolabel.cli._panels import draw_panels, save_picture, show_cam, show_mask
from pseudolabel.cli._scenes import CLASSES, draw_scenes
from pseudolabel.masks import (
    choose_background,
    constant_background,
    power_background,
    proportional_pseudo_mask,
    scores_to_mask,
)
from pseudolabel.metrics import PseudoLabelMetric
from pseudolabel.refine import CRF_PRESETS, DenseCRF, coefficient_of_variation_smoothing

__all__ = ["classifier", "run"]

MEAN, STD = 0.45, 0.22  # of the drawn scenes
ALPHAS = (2, 3, 4, 6, 8, 11, 16)  # exponents of the background to choose from
SHRINK = 4  # the scenes are that much smaller than the photos which the CRF presets were made for


FILES = ("images", "truth", "masks", "labels.csv", "classes.txt", "classifier.pt", "panels.png")

Make = Callable[[int, float], Tensor]


@dataclass(frozen=True)
class Stage:
    """A way to masks, with one setting.

    `make(index, value)` is the mask (H,W) of a scene, `choose()` finds the value to make all masks with.
    """

    name: str
    setting: str
    make: Make
    choose: Callable[[], float]


def classifier() -> nn.Module:
    """A small classifier of the scenes: four convolutions, global average pooling, a linear layer.

    `pseudolabel generate --model pseudolabel.cli.demo:classifier` finds it here, too.
    """
    layers: list[nn.Module] = []
    for inputs, outputs, size, stride in ((3, 24, 5, 2), (24, 48, 3, 2), (48, 64, 3, 2), (64, 64, 3, 1)):
        convolution = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
        layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(nn.Sequential(*layers), pool, nn.Linear(64, len(CLASSES) - 1))


def run(args: argparse.Namespace) -> int:
    """Draw, train, make masks in several ways, score them, and leave everything in a folder."""
    if args.images < 12:
        raise UserError(f"--images: expected at least 12, got {args.images}")
    out = Path(args.out)
    claim(out, "demo", FILES)
    images, truth, labels = draw_scenes(args.images, generator=torch.Generator().manual_seed(args.seed))
    images = (images * 255).round() / 255  # what the files will hold
    names = [f"scene_{index:04d}" for index in range(args.images)]
    _write_scenes(out, names, images, truth, labels)

    rows: list[tuple[str, str, str, float]] = []
    with _clock() as seconds:
        model = _train(images, labels, epochs=args.epochs, seed=args.seed)
    torch.save(model.state_dict(), out / "classifier.pt")
    rows.append(("train on image-level labels", f"{args.epochs} epochs", "", seconds()))
    with _clock() as seconds:
        maps = _class_maps(model, images, labels)
    rows.append(("class activation maps", "4 scales, flip", "", seconds()))

    # Settings are chosen on the first half of the scenes, scores are those of the second half.
    half = args.images // 2
    made: dict[str, Sequence[Tensor]] = {}
    scores: dict[str, float] = {}
    for stage in _stages(images, truth, labels, maps, half):
        value = stage.choose()
        with _clock() as seconds:
            masks = _make(stage.make, [(index, value) for index in range(args.images)], stage.name)
        if stage.name == FINAL:
            files = [out / "masks" / f"{name}.png" for name in names]
            for file, mask in zip(files, masks, strict=True):
                io.write_mask(file, mask)
            masks = [io.read_mask(file) for file in files]
        made[stage.name], scores[stage.name] = masks, _miou(masks[half:], truth[half:])
        rows.append((stage.name, f"{stage.setting} {value:g}", f"{scores[stage.name]:.3f}", seconds()))

    pictured = [CAM_ONLY, CAM_CRF, FINAL]
    shown = [half + index for index in _one_scene_a_class(labels[half:])]
    panels = [
        [
            images[index],
            show_cam(images[index], maps[index, labels[index]], labels[index].nonzero()[:, 0]),
            *(show_mask(images[index], made[name][index]) for name in pictured),
            show_mask(images[index], truth[index]),
        ]
        for index in shown
    ]
    titles = ["photo", "class activation", *pictured, "truth"]
    save_picture(
        out / "panels.png", draw_panels(panels, titles, legend=dict(enumerate(CLASSES[1:], 1)), width=192)
    )
    _print_table(rows, scores, args.images)
    report(f"photos, labels, masks, truth and classifier are in {out}; the picture is {out / 'panels.png'}")
    return 0


CAM_ONLY, CAM_CRF, FINAL = "CAM", "CAM + CRF", "CVS + shares + CRF"


def _stages(images: Tensor, truth: Tensor, labels: Tensor, maps: Tensor, half: int) -> list[Stage]:
    """The ways to masks, each with one setting that is chosen on the first `half` of the scenes."""
    smoothed = coefficient_of_variation_smoothing(maps)
    joint_crf = _small_crf("psa")

    def threshold(index: int, value: float, *, cam: Tensor) -> Tensor:
        return scores_to_mask(constant_background(cam[index : index + 1], value))[0]

    def joint(index: int, value: float) -> Tensor:
        present = labels[index].nonzero()[:, 0]
        scores = power_background(maps[index : index + 1, present], value)
        places = scores_to_mask(joint_crf(images[index : index + 1], scores))[0]
        return torch.cat([present.new_zeros(1), present + 1])[places]

    def shares(index: int, value: float, *, crf: DenseCRF | None) -> Tensor:
        one = slice(index, index + 1)
        return proportional_pseudo_mask(images[one], maps[one], labels[one], alpha=value, crf=crf)[0]

    def by_background(name: str, cam: Tensor) -> Stage:
        def choose() -> float:
            return choose_background([(cam[:half], truth[:half])]).value

        return Stage(name, "background", partial(threshold, cam=cam), choose)

    def by_alpha(name: str, make: Make) -> Stage:
        few = min(half, 40)  # with a CRF, each candidate costs time

        def choose() -> float:
            tries = [(index, alpha) for alpha in ALPHAS for index in range(few)]
            masks = _make(make, tries, f"{name}: choose alpha")
            curve = [_miou(masks[start : start + few], truth[:few]) for start in range(0, len(masks), few)]
            return ALPHAS[curve.index(max(curve))]

        return Stage(name, "alpha", make, choose)

    return [
        by_background(CAM_ONLY, maps),
        by_alpha(CAM_CRF, joint),
        by_background("CVS", smoothed),
        by_alpha("CVS + shares", partial(shares, crf=None)),
        by_alpha(FINAL, partial(shares, crf=_small_crf("pmm"))),
    ]


def _small_crf(preset: str) -> DenseCRF:
    """A preset of the dense CRF with its widths in pixels shrunk to the size of the scenes."""
    settings = CRF_PRESETS[preset]
    gaussian, bilateral = settings["gaussian"], settings["bilateral"]
    return DenseCRF(
        gaussian and (gaussian[0] / SHRINK, gaussian[1]),
        bilateral and (bilateral[0] / SHRINK, *bilateral[1:]),
        settings["iterations"],
    )


def _make(make: Make, tasks: Sequence[tuple[int, float]], description: str) -> list[Tensor]:
    return in_threads(lambda task: make(*task), tasks, workers=2, description=description)


def _train(images: Tensor, labels: Tensor, *, epochs: int, seed: int, batch: int = 20) -> nn.Module:
    """Train on image-level labels alone: binary cross-entropy of each class."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = classifier()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-3)
    steps = epochs * -(-len(images) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=max(steps, 2))
    inputs, targets = (images - MEAN) / STD, labels.float()
    with progress("train the classifier", epochs) as step:
        for _ in range(epochs):
            for chosen in torch.split(torch.randperm(len(images), generator=generator), batch):
                flips = [axis for axis in (2, 3) if torch.rand((), generator=generator) < 0.5]
                loss = F.binary_cross_entropy_with_logits(model(inputs[chosen].flip(flips)), targets[chosen])
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
            step()
    return model


@torch.no_grad()
def _class_maps(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Normalised maps (N,C,H,W) at four scales, plain and mirrored; 0 for absent classes."""
    batches = list(zip(torch.split((images - MEAN) / STD, 25), torch.split(labels, 25), strict=True))
    maps = []
    with CAM(model) as cam, progress("class activation maps", len(batches)) as step:
        for image, present in batches:
            maps.append(normalize_cam(multi_scale_cam(cam, image, present)))
            step()
    return torch.cat(maps)


def _miou(masks: Sequence[Tensor], truth: Tensor) -> float:
    metric = PseudoLabelMetric(len(CLASSES), class_names=CLASSES)
    metric.update(torch.stack(list(masks)), truth)
    return metric.compute(sync=False).miou


def _one_scene_a_class(labels: Tensor) -> list[int]:
    """For each class the first scene that shows it beside another, where there is one; no scene twice."""
    crowded = labels & (labels.sum(1, keepdim=True) > 1)
    first = torch.where(crowded.any(0), crowded.int().argmax(0), labels.int().argmax(0))
    return sorted(set(first.tolist()))


def _write_scenes(out: Path, names: Sequence[str], images: Tensor, truth: Tensor, labels: Tensor) -> None:
    for folder in ("images", "truth", "masks"):
        (out / folder).mkdir(parents=True, exist_ok=True)
        for path in (out / folder).glob("scene_[0-9]*.png"):
            path.unlink()  # of an earlier run with more scenes
    (out / "classes.txt").write_text("\n".join(CLASSES) + "\n", encoding="utf-8")
    io.write_labels(out / "labels.csv", io.ImageLabels(tuple(names), CLASSES[1:], labels))
    pixels = (images * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()
    for name, photo, mask in zip(names, pixels, truth, strict=True):
        Image.fromarray(photo).save(out / "images" / f"{name}.png")
        io.write_mask(out / "truth" / f"{name}.png", mask)


@contextmanager
def _clock() -> Iterator[Callable[[], float]]:
    start = time.perf_counter()
    stop: list[float] = []
    yield lambda: (stop[0] if stop else time.perf_counter()) - start
    stop.append(time.perf_counter())


def _print_table(rows: Sequence[tuple[str, str, str, float]], scores: dict[str, float], count: int) -> None:
    from rich.table import Table  # noqa: PLC0415

    table = Table(title=f"From image-level labels to masks: {count} drawn scenes, {len(CLASSES) - 1} classes")
    table.add_column("stage")
    table.add_column("setting")
    table.add_column("mIoU", justify="right")
    table.add_column("seconds", justify="right")
    for name, setting, miou, seconds in rows:
        table.add_row(name, setting, miou, f"{seconds:.1f}")
    stdout().print(table)
    stdout().print(
        "CVS: coefficient-of-variation smoothing. Shares: proportional masks. Settings were chosen on one "
        "half of the scenes, mIoU is that of the other half, seconds are for all scenes.\n"
        f"Dense CRF on the plain maps: {scores[CAM_CRF] - scores[CAM_ONLY]:+.3f}. CVS and shares with a CRF, "
        f"compared with that: {scores[FINAL] - scores[CAM_CRF]:+.3f}."
    )
