"""`pseudolabel generate`: photos, image-level labels and a classifier in, masks out."""

import argparse
import hashlib
import inspect
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pseudolabel import __version__, io, masks, recipes
from pseudolabel.cam import infer_response_map, make_views, multi_scale_cam, normalize_cam
from pseudolabel.cli._console import UserError, find_masks, in_threads, read_names, report, report_names
from pseudolabel.cli._extractors import Way, find_way, present_maps_of
from pseudolabel.cli._models import class_places, load_classifier
from pseudolabel.io._atomic import write_atomically
from pseudolabel.refine import CRF_PRESETS, DenseCRF, dense_crf

__all__ = ["METHODS", "find_device", "read_image_labels", "run"]


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
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


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
    look, network_settings = _open_network(args, labels.classes, device)
    _rehearse(method, options, args.scales)
    out, cams = Path(args.out), Path(args.save_cams) if args.save_cams else None
    for folder in filter(None, (out, cams)):
        folder.mkdir(parents=True, exist_ok=True)
    settings = {"method": args.method, **options, **network_settings}
    _keep_settings(out, settings, names, anew=args.overwrite)

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


def _open_network(
    args: argparse.Namespace, classes: Sequence[str], device: torch.device
) -> tuple[Callable[[Tensor, Tensor], Tensor], dict[str, Any]]:
    """How the network looks at photos (`_lens`), and all settings on which that depends."""
    network = load_classifier(args.model, args.weights)
    mean, std = args.mean or network.mean or IMAGENET_MEAN, args.std or network.std or IMAGENET_STD
    if min(std) <= 0:
        raise UserError(f"--std: expected numbers > 0, got {std}")
    model = network.model.to(device).eval()
    way = find_way(network, args.maps, args.layer, args.classifier)
    places = class_places(classes, network.classes, way.num_classes)

    report(f"maps: {way.said}")
    if way.only:
        report(f"the network takes {way.only} x {way.only} alone: all views are made that, one scale will do")
    if way.least > 1:
        report(f"the network takes no views of sides below {way.least}: smaller ones are made that")
    if not network.own:
        known = f"{way.num_classes} classes, {'by name' if network.classes else 'in order'}"
        report(f"{len(places)} of the network's {known}; mean {tuple(mean)}, std {tuple(std)}")

    settings = {name: getattr(args, name) for name in ("model", "layer", "classifier", "scales", "flip")}
    settings |= {"mean": list(mean), "std": list(std), "weights": _digest(args.weights, model)}
    if way.maps != "cam":
        settings["maps"] = way.maps
    return _lens(model, way, places, args, (mean, std)), settings


def _digest(path: str | None, model: nn.Module) -> str:
    """SHA-256 of the file of weights, or where there is none of the weights themselves."""
    if path:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _lens(
    model: nn.Module,
    way: Way,
    places: Sequence[int],
    args: argparse.Namespace,
    normalization: tuple[Sequence[float], Sequence[float]],
) -> Callable[[Tensor, Tensor], Tensor]:
    """A function from an image (1,3,H,W) and its present classes (P,) to raw maps (1,P,H,W), for threads."""
    use_maps = present_maps_of(model, way, places, args.workers)

    def look(image: Tensor, present: Tensor) -> Tensor:
        mean, std = (torch.tensor(values, device=image.device).view(1, 3, 1, 1) for values in normalization)
        normalized = (image - mean) / std

        def merge(cam: Callable[[Tensor], Tensor]) -> Tensor:
            if args.method == "infercam":
                labels = torch.ones(1, len(present), device=image.device)
                return infer_response_map(
                    cam, normalized, labels, scales=args.scales, flip=args.flip
                ).response
            return multi_scale_cam(cam, normalized, None, args.scales, args.flip)

        return use_maps(present, merge)

    return look


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
