"""`pseudolabel generate`: photos, image-level labels and a classifier in, masks out."""

import argparse
import copy
import hashlib
import importlib
import inspect
import json
import os
import queue
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pseudolabel import __version__, io, masks, recipes
from pseudolabel.cam import CAM, infer_response_map, make_views, multi_scale_cam, normalize_cam
from pseudolabel.cli._console import UserError, find_masks, in_threads, read_names, report, report_names
from pseudolabel.io._atomic import write_atomically
from pseudolabel.refine import CRF_PRESETS, DenseCRF, dense_crf

__all__ = ["METHODS", "find_device", "load_model", "load_weights", "read_image_labels", "run"]


def cam_method(
    image: Tensor, cam: Tensor, labels: Tensor, *, background: float = 0.15, crf: bool = False
) -> Tensor:
    """The maps against a constant background."""
    scores = masks.constant_background(normalize_cam(cam) * labels[:, :, None, None], background)
    return masks.scores_to_mask(dense_crf(image, scores, **CRF_PRESETS["psa"]) if crf else scores)


def pmm_method(image: Tensor, cam: Tensor, labels: Tensor, *, alpha: float = 11, crf: bool = True) -> Tensor:
    """Coefficient-of-variation smoothing and proportional masks."""
    refine = DenseCRF(**CRF_PRESETS["pmm"]) if crf else None
    return recipes.pmm(image, cam, labels, alpha=alpha, crf=refine)


# (image, raw maps, labels, options) -> mask. The options are those that the command line knows.
METHODS: dict[str, Callable[..., Tensor]] = {
    "cam": cam_method,
    "infercam": partial(cam_method, background=0.2),
    "pmm": pmm_method,
}

SETTINGS = "pseudolabel.json"


def run(args: argparse.Namespace) -> int:
    """Make the masks that are not there yet; say which photos were skipped."""
    method = METHODS[args.method]
    options = _method_options(args, method)
    labels = read_image_labels(args.labels, args.allow_pickle)
    photos = {path.stem: path for path in io.find_images(args.images)}
    wanted = read_names(args.list) if args.list else sorted(photos.keys() | set(labels.names))
    names = [name for name in wanted if name in photos and name in labels]
    without_labels = [name for name in wanted if name not in labels]
    without_photo = [name for name in wanted if name not in photos]
    report_names(without_labels, f"without a row in {args.labels}, skipped")
    report_names(without_photo, f"without a photo in {args.images}, skipped")
    if not names:
        raise UserError(f"{args.images}: no photo here goes by a name in {args.labels}")

    device = find_device(args.device)
    model = load_weights(load_model(args.model), args.weights).to(device).eval()
    look = _lens(model, device, args, labels.classes)
    _rehearse(method, options, args.scales)
    out, cams = Path(args.out), Path(args.save_cams) if args.save_cams else None
    for folder in filter(None, (out, cams)):
        folder.mkdir(parents=True, exist_ok=True)
    _keep_settings(out, _settings(args, options), names, anew=args.overwrite)

    @torch.no_grad()
    def compute(name: str) -> tuple[Tensor, Tensor]:
        """Mask (H,W) of a photo, and the normalised maps (P,H,W) of the P classes that it shows."""
        image = io.read_image(photos[name])[None].to(device)
        present = labels[name].nonzero()[:, 0].to(device)
        if len(present) == 0:
            return torch.zeros(image.shape[2:], dtype=torch.int64), torch.zeros(0, *image.shape[2:])
        # Only the present classes are computed, as if there were no others; then places become labels.
        maps = look(image, present)
        mask = method(image, maps, torch.ones(1, len(present), device=device), **options)[0]
        label_of_place = torch.full((256,), 255, device=device)
        label_of_place[: len(present) + 1] = torch.cat([present.new_zeros(1), present + 1])
        return label_of_place[mask].cpu(), normalize_cam(maps)[0].cpu()

    def work(name: str) -> str:
        mask_file = out / f"{name}.png"
        cam_file = cams / f"{name}.npz" if cams else None
        if not args.overwrite and _is_done(mask_file, cam_file, photos[name], labels[name]):
            return "kept"
        try:
            mask, maps = compute(name)
        except UserError:
            raise
        except Exception as error:  # whatever a photo or a network comes up with
            if args.debug:
                raise
            report(f"skipped {photos[name].name}: {error or type(error).__name__}")
            return "skipped"
        if cam_file:  # before the mask, which says that all is there
            _write_maps(cam_file, maps, labels[name])
        io.write_mask(mask_file, mask)
        return "made"

    outcomes = in_threads(work, names, workers=args.workers, description="generate masks")
    made, kept, skipped = (outcomes.count(outcome) for outcome in ("made", "kept", "skipped"))
    report(f"{out}: {made} masks made, {kept} were there already, {skipped} photos skipped")
    return 1 if skipped or without_labels or without_photo else 0


def _lens(
    model: nn.Module, device: torch.device, args: argparse.Namespace, classes: Sequence[str]
) -> Callable[[Tensor, Tensor], Tensor]:
    """A function from an image (1,3,H,W) and its present classes (P,) to raw maps (1,P,H,W), for threads."""
    mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (args.mean, args.std))
    if min(args.std) <= 0:
        raise UserError(f"--std: expected numbers > 0, got {args.std}")
    # Hooks belong to modules: each worker looks through modules of its own, which share all weights.
    shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    twins = [model, *(copy.deepcopy(model, dict(shared)) for _ in range(args.workers - 1))]
    extractors: queue.SimpleQueue[CAM] = queue.SimpleQueue()
    for twin in twins:
        extractors.put(CAM(twin, args.layer, args.classifier))

    def look(image: Tensor, present: Tensor) -> Tensor:
        cam = extractors.get()

        def present_maps(views: Tensor) -> Tensor:
            maps = cam(views)
            if maps.shape[1] != len(classes):
                raise UserError(
                    f"the classifier has {maps.shape[1]} classes, the labels have {len(classes)}: "
                    f"{', '.join(classes[:8])}"
                )
            return maps[:, present]

        normalized = (image - mean) / std
        try:
            if args.method == "infercam":
                labels = torch.ones(1, len(present), device=device)
                return infer_response_map(
                    present_maps, normalized, labels, scales=args.scales, flip=args.flip
                ).response
            return multi_scale_cam(present_maps, normalized, None, args.scales, args.flip)
        finally:
            extractors.put(cam)

    return look


def load_model(factory: str) -> nn.Module:
    """The network that `module:function` returns, searched in the current folder as well."""
    module_name, _, function_name = factory.partition(":")
    if not module_name or not function_name:
        raise UserError(f"--model: expected module:function, got {factory!r}")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise UserError(f"--model: cannot import {module_name!r}: {type(error).__name__}: {error}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UserError(f"--model: {module_name!r} has no function {function_name!r}")
    try:
        model = function()
    except Exception as error:
        raise UserError(f"--model: {factory}() failed: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise UserError(f"--model: expected {factory}() to return an nn.Module, got {type(model).__name__}")
    return model


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Load a state dict from `.pt`, `.pth` or `.npz` into the network; every name and shape must fit."""
    state, own = _read_state(Path(path)), model.state_dict()
    problems = [
        ("lacks", [name for name in own if name not in state]),
        ("has, unknown to the model,", [name for name in state if name not in own]),
        (
            "has in another shape",
            [
                f"{name} {tuple(state[name].shape)} for {tuple(own[name].shape)}"
                for name in own
                if name in state and state[name].shape != own[name].shape
            ],
        ),
    ]
    said = [f"{what} {len(names)}: {', '.join(names[:3])}" for what, names in problems if names]
    if said:
        raise UserError(f"{path}: does not fit the model; it {'; it '.join(said)}")
    model.load_state_dict(state)
    return model


def _read_state(path: Path) -> dict[str, Tensor]:
    content: Any
    if path.suffix not in {".pt", ".pth", ".npz"}:
        raise UserError(f"{path}: expected weights in .pt, .pth or .npz")
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                content = {name: torch.from_numpy(archive[name]) for name in archive.files}
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: cannot read these weights without running code: {first_line}") from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{path}: expected a state dict (name -> tensor), got {type(content).__name__}")
    return content


def _method_options(args: argparse.Namespace, method: Callable[..., Tensor]) -> dict[str, Any]:
    """Options of the method: those given, else its own defaults."""
    known = {
        name: parameter.default
        for name, parameter in inspect.signature(method).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    given = {
        name: value for name in ("alpha", "background", "crf") if (value := getattr(args, name)) is not None
    }
    for name in given:
        if name not in known:
            raise UserError(
                f"--{name}: not an option of --method {args.method}, which takes {', '.join(known)}"
            )
    return known | given


def read_image_labels(path: str, allow_pickle: bool) -> io.ImageLabels:
    """Image-level labels from `.csv`, or from `.npy` where that is allowed."""
    if path.endswith(".npy"):
        if not allow_pickle:
            raise UserError(f"{path}: this format is a pickle; read it with --allow-pickle, or give a .csv")
        labels = io.read_cls_labels(path, allow_pickle=True)
    else:
        labels = io.read_labels(path)
    if len(labels.classes) > 254:
        raise UserError(f"{path}: a mask holds 254 classes at most, got {len(labels.classes)}")
    return labels


def find_device(name: str) -> torch.device:
    """The device of that name, if it can be used here."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"--device: {name!r} cannot be used here: {reason}") from error
    return device


def _rehearse(method: Callable[..., Tensor], options: dict[str, Any], scales: Sequence[float]) -> None:
    """Let a wrong setting fail now, and not at every photo."""
    blank = torch.zeros(1, 3, 8, 8)
    make_views(blank, scales)
    method(blank, blank[:, :1], torch.ones(1, 1), **options)


def _settings(args: argparse.Namespace, options: dict[str, Any]) -> dict[str, Any]:
    """All that decides what a mask looks like, but for photo and labels."""
    names = ("model", "layer", "classifier", "scales", "flip", "mean", "std")
    with Path(args.weights).open("rb") as file:
        weights = hashlib.file_digest(file, "sha256").hexdigest()
    return {"method": args.method, **options, "weights": weights} | {
        name: getattr(args, name) for name in names
    }


def _keep_settings(out: Path, settings: dict[str, Any], names: Sequence[str], *, anew: bool) -> None:
    """Write down how a folder's masks are made, and refuse to mix them with masks made in another way."""
    path, there = out / SETTINGS, find_masks(out)
    before = _read_settings(path) if path.exists() else {}
    if there and before != settings:
        if anew:
            # Gone before the settings change: what an interrupted run leaves must not pass for its own.
            if before and (others := sorted(there.keys() - set(names))):
                raise UserError(
                    f"{out}: holds {len(others)} masks of other settings that this run does not make, as "
                    f"{others[0]}; take another --out"
                )
            for name in there.keys() & set(names):
                there[name].unlink()
        elif before:
            differing = [name for name in {**before, **settings} if before.get(name) != settings.get(name)]
            was, now = ({name: each.get(name) for name in differing} for each in (before, settings))
            raise UserError(
                f"{out}: holds masks made with {was}, now {now}; take another --out, or --overwrite"
            )
    text = json.dumps({"pseudolabel": __version__, "settings": settings}, indent=2)
    write_atomically(path, text.encode("utf-8"))


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))["settings"]
    except (ValueError, LookupError, TypeError):
        settings = None
    return settings if isinstance(settings, dict) and settings else {"unreadable": str(path)}


def _is_done(mask_file: Path, cam_file: Path | None, photo: Path, present: Tensor) -> bool:
    """Whether the files are there, and the mask is whole, of the photo's size, of labelled classes alone."""
    if not mask_file.exists() or (cam_file and not cam_file.exists()):
        return False
    try:
        mask, size = io.read_mask(mask_file), io.image_size(photo)
    except (OSError, ValueError):
        return False
    allowed = torch.zeros(256, dtype=torch.bool)
    allowed[[0, 255]] = True
    allowed[1 : 1 + len(present)] = present
    return tuple(mask.shape) == size and bool(allowed[mask].all())


def _write_maps(path: Path, maps: Tensor, labels: Tensor) -> None:
    full = maps.new_zeros(len(labels), *maps.shape[1:])
    full[labels] = maps
    io.write_cam(path, full, labels, dtype=torch.float16)
