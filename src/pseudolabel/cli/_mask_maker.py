"""Photos and their labels in, files of masks out: the network and the method, opened once."""

import argparse
import hashlib
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pseudolabel import io, masks, recipes
from pseudolabel._maps import label_places, present_classes
from pseudolabel.cam import infer_response_map, make_views, multi_scale_cam, normalize_cam
from pseudolabel.cli._console import UserError
from pseudolabel.cli._extractors import Way, find_way, maps_of
from pseudolabel.cli._marks import digest_file, mark, refuse_foreign
from pseudolabel.cli._models import class_places, load_classifier
from pseudolabel.refine import CRF_PRESETS, DenseCRF, dense_crf

__all__ = ["METHODS", "Entry", "MaskMaker", "Settings", "find_device"]


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

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All that masks depend on beside photos and labels: the options of `generate` of the same names.

    Attributes:
        model: `module:function`, `hf:NAME` or `timm:NAME`.
        classes: Names of the labels' classes.
        weights: File of weights.
        method: One of `METHODS`.
        alpha: Option of `pmm`; None for its default, as for the two below.
        background: Option of `cam` and `infercam`.
        crf: Whether to refine with a dense CRF.
        maps: `auto`, `cam` or `gradcam`.
        layer: Name of the layer to look at.
        classifier: Name of the classifier.
        scales: Scales at which a photo is seen.
        flip: Whether it is seen mirrored as well.
        mean: What the network wants taken off its images.
        std: What it wants them divided by, then.
        device: Where it runs.
    """

    model: str
    classes: tuple[str, ...]
    weights: str | None = None
    method: str = "pmm"
    alpha: float | None = None
    background: float | None = None
    crf: bool | None = None
    maps: str = "auto"
    layer: str | None = None
    classifier: str | None = None
    scales: Sequence[float] = (0.5, 1.0, 1.5, 2.0)
    flip: bool = True
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    device: str = "cpu"

    @classmethod
    def of(cls, args: argparse.Namespace, classes: Sequence[str]) -> "Settings":
        """Those that the command line was given."""
        given = {field.name: getattr(args, field.name) for field in fields(cls) if field.name != "classes"}
        return cls(classes=tuple(classes), **given)


class Entry(NamedTuple):
    """What became of a photo. Contents of files are told by their digests (`digest_file`).

    Attributes:
        name: The photo's name without suffix.
        photo: Content of the photo's file, as it was read.
        labels: Its classes, 0-based.
        mask: Content of the mask's file, empty if there is none.
        maps: Content of the maps' file, empty if there is none.
        skipped: Why there is no mask.
    """

    name: str
    photo: str
    labels: tuple[int, ...]
    mask: str = ""
    maps: str = ""
    skipped: str = ""


class MaskMaker:
    """A network and a method, opened once; called with photos, it writes their masks.

    Args:
        settings: What the masks depend on.
        out: Folder of the masks, which exists.
        cams: Folder of the maps, if they are wanted.
        copies: How many threads may call it at a time.
        debug: Raise what goes wrong with a photo.

    Attributes:
        said: What was found out about the network, in lines for the user.
        record: Settings as they stand in `pseudolabel.json`: masks of equal records are of one kind.
        maps_record: The same of the maps.

    Raises:
        UserError: If network, weights and classes do not fit, or a setting is wrong.
    """

    def __init__(
        self,
        settings: Settings,
        out: Path,
        cams: Path | None = None,
        *,
        copies: int = 1,
        debug: bool = False,
    ) -> None:
        self.out, self.cams, self.debug, self.settings = out, cams, debug, settings
        if settings.method not in METHODS:
            raise UserError(f"--method: expected one of {', '.join(METHODS)}, got {settings.method!r}")
        self.method = METHODS[settings.method]
        self.options = _method_options(settings, self.method)
        self.device = find_device(settings.device)
        network = load_classifier(settings.model, settings.weights)
        mean = settings.mean or network.mean or IMAGENET_MEAN
        std = settings.std or network.std or IMAGENET_STD
        for name, values, least in (("mean", mean, -math.inf), ("std", std, 0)):
            if not all(least < value < math.inf for value in values):  # a NaN fails as well
                wanted = "numbers > 0" if name == "std" else "finite numbers"
                raise UserError(f"--{name}: expected {wanted}, got {tuple(values)}")
        self.mean, self.std = (
            torch.tensor(each, device=self.device).view(1, 3, 1, 1) for each in (mean, std)
        )
        model = network.model.to(self.device).eval()
        way = find_way(network, settings.maps, settings.layer, settings.classifier)
        places = class_places(settings.classes, network.classes, way.num_classes)
        self._use_maps = maps_of(model, way, places, copies)
        self._rehearse()

        self.said = _say(way)
        if not network.own:
            known = f"{way.num_classes} classes, {'by name' if network.classes else 'in order'}"
            self.said.append(f"{len(places)} of the network's {known}; mean {tuple(mean)}, std {tuple(std)}")
        named = {name: getattr(settings, name) for name in ("model", "layer", "classifier", "flip")}
        lists = {
            "scales": list(settings.scales),
            "mean": list(mean),
            "std": list(std),
            "classes": list(settings.classes),  # what the values of a mask mean
        }
        gradients = {} if way.maps == "cam" else {"maps": way.maps}
        seen: dict[str, Any] = {**named, **lists, "weights": _digest(settings.weights, model), **gradients}
        self.record = {"method": settings.method, **self.options, **seen}
        # Methods share their maps, but for this one, which looks for them in another way.
        self.maps_record = {"method": "infercam", **seen} if settings.method == "infercam" else seen

    def __call__(self, photos: Sequence[Path], labels: Tensor) -> list[Entry]:
        """Make and write the masks of photos of one size, with labels (B,C), through the network together.

        A photo that cannot be read or computed is skipped, and says why.

        Raises:
            UserError: If a file in the way was not made here.
            OSError: If a mask cannot be written.
        """
        if len(photos) > 1 and self.settings.method == "infercam":  # looks at parts of each alone
            return self._one_by_one(photos, labels)
        try:
            contents = [digest_file(photo) for photo in photos]
            masks_and_maps = self._compute(photos, labels)
            if contents != [digest_file(photo) for photo in photos]:
                raise UserError("the photo changed while it was in work")
        except Exception as error:  # whatever a photo or a network comes up with
            if len(photos) > 1:  # the others shall not suffer for it
                return self._one_by_one(photos, labels)
            if self.debug:
                raise
            why = str(error) or type(error).__name__
            return [Entry(photos[0].stem, "", _classes(labels[0]), skipped=why)]
        return [
            self._write(Entry(photo.stem, content, _classes(row)), row, *made)
            for photo, content, row, made in zip(photos, contents, labels, masks_and_maps, strict=True)
        ]

    def _one_by_one(self, photos: Sequence[Path], labels: Tensor) -> list[Entry]:
        return [self([photo], row[None])[0] for photo, row in zip(photos, labels, strict=True)]

    @torch.no_grad()
    def _compute(self, photos: Sequence[Path], labels: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Mask (H,W) of each photo, and the normalised maps (P,H,W) of the P classes that it shows."""
        image = torch.stack([io.read_image(photo) for photo in photos]).to(self.device)
        # Only the present classes are computed, as if there were no others; then places become classes.
        index, present = present_classes(labels.to(self.device))
        if index.shape[1] == 0:
            nothing = torch.zeros(image.shape[2:], dtype=torch.int64), torch.zeros(0, *image.shape[2:])
            return [nothing] * len(photos)
        maps = self._look(image, index, present)
        mask = label_places(self.method(image, maps, present.to(maps.dtype), **self.options), index).cpu()
        maps = normalize_cam(maps).cpu()
        return [(mask[b], maps[b, :count]) for b, count in enumerate(present.sum(1).tolist())]

    def _look(self, image: Tensor, index: Tensor, present: Tensor) -> Tensor:
        """Raw maps (B,P,H,W) of the classes `index` (B,P) of images (B,3,H,W), 0 where not `present`."""
        normalized, settings = (image - self.mean) / self.std, self.settings

        def merge(cam: Callable[[Tensor], Tensor]) -> Tensor:
            if settings.method == "infercam":
                return infer_response_map(
                    cam, normalized, present.float(), scales=settings.scales, flip=settings.flip
                ).response
            return multi_scale_cam(cam, normalized, present, settings.scales, settings.flip)

        return self._use_maps(index, merge)

    def files(self, name: str) -> list[Path]:
        """The files of a photo, its mask first."""
        return [self.out / f"{name}.png", *([self.cams / f"{name}.npz"] if self.cams else [])]

    def entry_of(self, photo: Path, labels: Tensor) -> Entry:
        """The entry of a photo with labels (C,) whose files are there."""
        return self._with_files(Entry(photo.stem, digest_file(photo), _classes(labels)))

    def _with_files(self, entry: Entry) -> Entry:
        mask, *maps = (digest_file(path) for path in self.files(entry.name))
        return entry._replace(mask=mask, maps="".join(maps))

    def _write(self, entry: Entry, labels: Tensor, mask: Tensor, maps: Tensor) -> Entry:
        mask_file, *maps_file = self.files(entry.name)
        refuse_foreign(self.files(entry.name))
        maps = maps.half()
        for path in maps_file:  # before the mask, which says that all is there
            io.write_cam(path, maps, labels, comment=mark(labels.nonzero()[:, 0], maps))
        io.write_mask(mask_file, mask, comment=mark(mask.to(torch.uint8)))
        return self._with_files(entry)

    def _rehearse(self) -> None:
        """Let a wrong setting fail now, and not at every photo."""
        blank = torch.zeros(1, 3, 8, 8)
        make_views(blank, self.settings.scales)
        self.method(blank, blank[:, :1], torch.ones(1, 1), **self.options)


def _classes(labels: Tensor) -> tuple[int, ...]:
    return tuple(labels.nonzero()[:, 0].tolist())


def _say(way: Way) -> list[str]:
    """What was found out about the network."""
    said = [f"maps: {way.said}"]
    if way.only:
        said.append(
            f"the network takes {way.only} x {way.only} alone: all views are made that, one scale will do"
        )
    if way.least > 1:
        said.append(f"the network takes no views of sides below {way.least}: smaller ones are made that")
    return said


def find_device(name: str) -> torch.device:
    """The device of that name, if it can be used here."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # the meta device has no values
    except (RuntimeError, AssertionError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"--device: {name!r} cannot be used here: {reason}") from error
    return device


def _method_options(settings: Settings, method: Callable[..., Tensor]) -> dict[str, Any]:
    """Options of the method: those given, else its own defaults."""
    known = {
        name: parameter.default
        for name, parameter in inspect.signature(method).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    wanted = {name: getattr(settings, name) for name in ("alpha", "background", "crf")}
    given = {name: value for name, value in wanted.items() if value is not None}
    for name in given:
        if name not in known:
            raise UserError(
                f"--{name}: not an option of --method {settings.method}, which takes {', '.join(known)}"
            )
    return known | given


def _digest(path: str | None, model: nn.Module) -> str:
    """Digest of the file of weights, or where there is none of the weights themselves."""
    if path:
        return digest_file(Path(path))
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
