"""`pseudolabel train`: a classifier from image-level labels, or a segmenter from masks."""

import argparse
import hashlib
import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from pseudolabel import io
from pseudolabel.cli._console import UserError, find_masks, read_names, report, report_names
from pseudolabel.cli._folder import claim
from pseudolabel.cli._marks import digest_file
from pseudolabel.cli._models import load_model, load_weights
from pseudolabel.cli._training import (
    Settings,
    is_first,
    num_processes,
    random_view,
    sum_over_processes,
    train,
)
from pseudolabel.cli.generate import find_device, read_image_labels
from pseudolabel.io._atomic import remove_leftovers
from pseudolabel.losses import PretendedUnderFittingLoss, UnderFittingMode, pretended_under_fitting_loss
from pseudolabel.losses.pretended_under_fitting import GateOver, gate_mean, gate_terms

__all__ = ["Settings", "run", "segmentation_loss", "train_classifier", "train_segmenter"]


def train_classifier(
    model: nn.Module, photos: Sequence[Path], labels: Tensor, settings: Settings, **files: Any
) -> list[float]:
    """Train a classifier with the binary cross-entropy of each class.

    Args:
        model: From images (B,3,h,w), normalised, to logits (B,C); trained where it is.
        photos: Files of N photos.
        labels: Image-level labels (N,C).
        settings: See `Settings`.
        files: `out`, `about`, `save_every`, `workers`, `show` of `train`.

    Returns:
        The loss of each step.
    """
    shape = _output_shape(model, settings.crop)
    if len(shape) != 2 or shape[1] != labels.shape[1]:
        raise UserError(
            f"the network returns {shape} for one image, the labels have {labels.shape[1]} "
            f"classes: expected logits of shape (1, {labels.shape[1]})"
        )
    targets = labels.float()

    def sample(index: int, random: np.random.Generator) -> tuple[Tensor, Tensor]:
        return random_view(io.read_image(photos[index]), None, settings, random)[0], targets[index]

    def loss(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        total = F.binary_cross_entropy_with_logits(logits.float(), target, reduction="sum")
        return total, torch.full_like(total, target.numel())

    return train(model, sample, len(photos), loss, settings, **files)


def train_segmenter(
    model: nn.Module,
    photos: Sequence[Path],
    masks: Sequence[Path],
    settings: Settings,
    loss: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    **files: Any,
) -> list[float]:
    """Train a segmentation network on masks.

    Args:
        model: From images (B,3,h,w), normalised, to logits (B,1+C,h',w'), background first, of any smaller
            size; trained where it is.
        photos: Files of N photos.
        masks: Files of their masks, 255 where there is no loss.
        settings: See `Settings`.
        loss: `segmentation_loss` with its settings; plain cross-entropy for None.
        files: `out`, `about`, `save_every`, `workers`, `show` of `train`.

    Returns:
        The loss of each step.
    """
    shape = _output_shape(model, settings.crop)
    if len(shape) != 4:
        raise UserError(f"the network returns {shape} for one image, expected logits (1, classes, h, w)")

    def sample(index: int, random: np.random.Generator) -> tuple[Tensor, Tensor]:
        image, mask = io.read_image(photos[index]), io.read_mask(masks[index])
        if mask.shape != image.shape[1:]:
            raise UserError(
                f"{masks[index]}: the mask has size {tuple(mask.shape)} (height, width), its photo "
                f"{photos[index]} has {tuple(image.shape[1:])}"
            )
        largest = int(mask.masked_fill(mask == 255, 0).max())
        if largest >= shape[1]:
            raise UserError(f"{masks[index]}: has label {largest}, the network has {shape[1]} classes")
        return random_view(image, mask, settings, random)

    return train(model, sample, len(photos), loss or segmentation_loss, settings, **files)


def segmentation_loss(
    logits: Tensor,
    mask: Tensor,
    *,
    mode: UnderFittingMode = "clamp",
    beta: float = 0.0,
    k: float | None = None,
    gate_over: GateOver = "all",
) -> tuple[Tensor, Tensor]:
    """Pretended under-fitting as a sum over pixels, and their number; with `beta=0` plain cross-entropy.

    Whether the gate is open is decided by the mean over the pixels of all processes.
    """
    gate: Tensor | None = None
    if beta and num_processes() > 1:
        plain = pretended_under_fitting_loss(logits.detach(), mask, beta=0, reduction="none")
        gate = gate_mean(sum_over_processes(gate_terms(plain, mask, mask != 255, gate_over, logits.shape[1])))
    total = pretended_under_fitting_loss(
        logits, mask, mode=mode, beta=beta, k=k, gate_over=gate_over, gate_value=gate, reduction="sum"
    )
    return total, (mask != 255).sum()


def run(args: argparse.Namespace) -> int:
    """Train, or go on with it; say which photos were left out."""
    with _processes(args.device) as device:
        photos, partners, missing = (_find_labels if args.job == "classifier" else _find_masks)(args)
        settings = Settings(
            steps=math.ceil(args.epochs * len(photos) / args.batch_size),
            batch_size=args.batch_size,
            optimizer=args.optimizer,
            lr=args.lr,
            weight_decay=args.weight_decay,
            seed=args.seed,
            amp=args.amp,
            crop=args.crop,
            scales=tuple(args.scales or SCALES[args.job]),
            flip=args.flip,
            mean=tuple(args.mean),
            std=tuple(args.std),
        )
        puf = _puf(args)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(args.seed)  # of the weights that the factory draws
            model = load_model(args.model)
        if args.weights:
            load_weights(model, args.weights)
        about = {
            "job": args.job,
            "model": args.model,
            "weights": digest_file(Path(args.weights)) if args.weights else None,
            "photos": _digest(part for path in photos for part in (path.stem, digest_file(path))),
            "puf": puf,
        }
        out = Path(args.out)
        _take(out, args.weights, overwrite=args.overwrite)
        files = {"out": out, "about": about, "save_every": args.save_every, "workers": args.workers}
        if isinstance(partners, io.ImageLabels):
            about |= {
                "classes": list(partners.classes),
                "labels": hashlib.sha256(partners.labels.numpy().tobytes()).hexdigest()[:16],
            }
            losses = train_classifier(model.to(device), photos, partners.labels, settings, **files)
        else:
            about["masks"] = _digest(digest_file(path) for path in partners)
            loss = partial(segmentation_loss, **puf) if puf else None
            losses = train_segmenter(model.to(device), photos, partners, settings, loss, **files)
        if is_first():
            last = losses[-50:]
            told = f"loss {fmean(last):.4f} over the last {len(last)}" if last else "all done before"
            report(
                f"{out}: {settings.steps} steps on {len(photos)} photos, {told}; see weights.pt, log.jsonl"
            )
    return 1 if missing else 0


SCALES = {"classifier": (0.625, 1.25), "segmenter": (0.5, 2.0)}  # a label may lie outside of a small crop

FILES = ("checkpoint.pt", "weights.pt", "log.jsonl")  # of OUT


def _take(out: Path, weights: str | None, *, overwrite: bool) -> None:
    """Make OUT this command's own, and where it begins anew take away what an earlier run has left."""
    if weights and Path(weights).resolve() in {(out / name).resolve() for name in FILES}:
        raise UserError(f"--weights: {weights} would be replaced by this run; take another --out")
    claim(out, "train", FILES)
    if is_first():
        remove_leftovers(out)
        for name in FILES if overwrite else ():
            (out / name).unlink(missing_ok=True)
    if num_processes() > 1:
        dist.barrier()  # before any process looks for a checkpoint


def _find_labels(args: argparse.Namespace) -> tuple[list[Path], io.ImageLabels, bool]:
    """Photos, their labels, and whether something was missing."""
    if args.labels is None or args.masks is not None:
        raise UserError("a classifier is trained on --labels FILE, without --masks")
    labels = read_image_labels(args.labels, args.allow_pickle)
    photos, names, missing = _find_photos(args, labels.names, f"a row in {args.labels}")
    return photos, io.ImageLabels(tuple(names), labels.classes, labels.select(names)), missing


def _find_masks(args: argparse.Namespace) -> tuple[list[Path], list[Path], bool]:
    """Photos, their masks, and whether something was missing."""
    if args.masks is None or args.labels is not None:
        raise UserError("a segmenter is trained on --masks DIR, without --labels")
    masks = find_masks(args.masks)
    photos, names, missing = _find_photos(args, masks, f"a mask in {args.masks}")
    return photos, [masks[name] for name in names], missing


def _find_photos(
    args: argparse.Namespace, partners: Collection[str], what: str
) -> tuple[list[Path], list[str], bool]:
    photos = {path.stem: path for path in io.find_images(args.images)}
    wanted = read_names(args.list) if args.list else sorted(photos.keys() | set(partners))
    names = [name for name in wanted if name in photos and name in partners]
    without_partner = [name for name in wanted if name not in partners]
    without_photo = [name for name in wanted if name not in photos]
    if is_first():
        report_names(without_partner, f"without {what}, left out")
        report_names(without_photo, f"without a photo in {args.images}, left out")
    if not names:
        raise UserError(f"{args.images}: no photo here has {what}")
    return [photos[name] for name in names], names, bool(without_partner or without_photo)


def _puf(args: argparse.Namespace) -> dict[str, Any] | None:
    """Settings of pretended under-fitting, None for the plain loss."""
    given = {"mode": args.puf_mode, "beta": args.beta, "k": args.k, "gate_over": args.gate_over}
    given = {name: value for name, value in given.items() if value is not None}
    if args.loss == "puf" and args.job == "segmenter":
        puf = PretendedUnderFittingLoss(**given)  # says what is wrong with them
        return {name: getattr(puf, name) for name in ("mode", "beta", "k", "gate_over")}
    if args.loss == "puf" or given:
        raise UserError(
            "--puf-mode, --beta, --k and --gate-over belong to --loss puf, and that to a segmenter"
        )
    return None


def _output_shape(model: nn.Module, crop: int) -> tuple[int, ...]:
    """Shape of the network's output for one image; a wrong network fails here, and not inside a step."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    try:
        with torch.no_grad():
            output = model.eval()(torch.zeros(1, 3, crop, crop, device=device))
    except Exception as error:
        raise UserError(
            f"the network cannot see {crop}x{crop} pixels: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(output, Tensor):
        raise UserError(f"the network returns {type(output).__name__}, expected a tensor of logits")
    return tuple(output.shape)


@contextmanager
def _processes(name: str) -> Iterator[torch.device]:
    """The device of this process, which is one of several under torchrun."""
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        yield find_device(name)
        return
    if name == "cuda":
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    device = find_device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    yield device
    dist.destroy_process_group()  # not after an error: the others may hang in the middle of a step


def _digest(parts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part.encode("utf-8", "surrogateescape")).digest())
    return digest.hexdigest()[:16]
