"""From a classifier to maps of the present classes, whatever the network: how to look is found by looking."""

import copy
import inspect
import math
import queue
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pseudolabel._maps import gather_present
from pseudolabel.cam import CAM, GradCAM, find_classifier, find_target_layer, tokens_to_map
from pseudolabel.cam._network import hook_here
from pseudolabel.cam.find_layers import returns_tokens
from pseudolabel.cli._console import UserError
from pseudolabel.cli._models import Classifier

__all__ = ["Way", "find_way", "maps_of"]


class Way(NamedTuple):
    """How to get maps of a network.

    Attributes:
        maps: `cam` or `gradcam`.
        layer: Name of the layer to look at, None for what is pooled before the classifier.
        classifier: Name of the classifier that was asked for.
        num_classes: How many classes it knows.
        said: Which layers these are, and why.
        arguments: What its forward wants beside the image.
        only: Side of the square that is all the network takes, None if it takes other sizes.
        prefix: Tokens in front of the patches that the layer returns; None: it returns maps.
        stride: Pixels of the image for a place of the layer, for tokens; views become multiples of it.
        least: Pixels that the sides of a view have at least.
    """

    maps: Literal["cam", "gradcam"]
    layer: str | None
    classifier: str | None
    num_classes: int
    said: str
    arguments: dict[str, bool]
    only: int | None = None
    prefix: int | None = None
    stride: int = 1
    least: int = 1


def find_way(
    network: Classifier,
    maps: str = "auto",
    layer: str | None = None,
    classifier: str | None = None,
) -> Way:
    """Find out how to get maps of a network in eval mode, by looking at one image of noise with it.

    `auto` is `CAM` where the mean of the maps is the logit, as theory wants it, and `GradCAM` elsewhere.
    One's own network, or one whose classifier is named, is taken at its word: `CAM` where it works.
    """
    model, size = network.model, network.size
    image = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0), device="cpu")
    image = image.to(next(iter(model.parameters()), image).device)
    arguments = _arguments(model)
    output, only = _look(model, image, arguments)
    why_not = "it was asked for"
    if maps != "gradcam":
        try:
            with torch.no_grad():
                found = CAM(model, layer, classifier, bias=True)(image, **arguments)
        except ValueError as error:
            if maps == "cam" or classifier is not None:
                raise
            why_not = f"CAM does not fit ({str(error).partition(';')[0]})"
        else:
            exact = _is_logit(found.mean((2, 3)), output)
            if exact or network.own or maps == "cam" or classifier:
                said = _say_cam(model, layer, classifier, exact)
                return Way("cam", layer, classifier, found.shape[1], said, arguments, only)
            why_not = "something stands between features and classifier, so that CAM is not exact"
    return _gradient_way(model, image, layer, why_not, only=only, arguments=arguments)


def _say_cam(model: nn.Module, layer: str | None, classifier: str | None, exact: bool | None) -> str:
    what = repr(classifier) if classifier else find_classifier(model).reason
    where = f"the output of {layer!r}" if layer else "what is pooled before it"
    fits = {
        True: "; the mean of a map is its class's logit",
        False: "; the mean of a map is not its class's logit, because something stands in between: "
        "compare with --maps gradcam",
        None: "",
    }
    return f"CAM of {where}, by the weights of {what}{fits[exact]}"


def _gradient_way(
    model: nn.Module,
    image: Tensor,
    layer: str | None,
    why: str,
    *,
    only: int | None,
    arguments: dict[str, bool],
) -> Way:
    if layer is None:
        found = find_target_layer(model)
        layer, reason = found.name, found.reason
    else:
        reason = f"{layer!r}, which was named"
    target = GradCAM(model, layer, reshape=lambda x: x).target_layer
    seen: list[Tensor] = []

    def see(_module: nn.Module, _inputs: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    with torch.no_grad(), hook_here(target.register_forward_hook, see):
        output = model(image, **arguments)
    logits = _logits(output)
    if logits is None or not seen:
        raise UserError(
            "--maps gradcam: expected a network that returns logits (B, C), or has such .logits, and runs "
            f"{layer!r}, got {type(output).__name__}"
        )
    said = f"Grad-CAM at {reason}, because {why}"
    way = Way("gradcam", layer, None, logits.shape[1], said, arguments, only)
    shape = tuple(seen[-1].shape)
    if len(shape) == 4 and not returns_tokens(target):
        return way
    if len(shape) not in (3, 4):
        raise UserError(f"--layer: expected a layer that returns maps or tokens, got {shape} of {layer!r}")
    # Of a square image: as many rows as columns, and what is over stands in front.
    side = shape[1] if len(shape) == 4 else math.isqrt(shape[1])
    prefix = 0 if len(shape) == 4 else shape[1] - side**2
    stride = max(1, image.shape[2] // side)
    said = f"{said}; {side} x {side} places, {prefix} in front"
    way = way._replace(prefix=prefix, stride=stride, said=said)
    # Windows may be larger than what a small image has, which in some networks fails, and leaves its marks.
    half = max(1, side // 2) * stride
    if only is None and not _takes(_twin(model), image[:, :, :half, :half], arguments):
        way = way._replace(least=image.shape[2])
    return way


def _arguments(model: nn.Module) -> dict[str, bool]:
    """Transformers interpolate position embeddings on demand, some by an argument of an inner module."""
    name = "interpolate_pos_encoding"
    own = inspect.signature(model.forward).parameters
    passes_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in own.values())
    inner = passes_on and any(
        name in inspect.signature(module.forward).parameters for module in model.modules()
    )
    return {name: True} if name in own or inner else {}


def _look(model: nn.Module, image: Tensor, arguments: dict[str, bool]) -> tuple[Any, int | None]:
    """What the network makes of the square image, and its side if it takes no other."""
    side = image.shape[2]
    try:
        with torch.no_grad():
            output = model(image, **arguments)
    except Exception as error:
        raise UserError(
            f"--model: the network fails on an image of {side} x {side}: {type(error).__name__}: {error}; if "
            "it wants another size, let it have an image_size"
        ) from error
    logits = _logits(output)
    if logits is not None and not logits.isfinite().all():
        raise UserError("--model: the network's logits of an image of noise are not finite")
    return output, None if _takes(_twin(model), torch.cat([image, image], 3), arguments) else side


def _takes(model: nn.Module, image: Tensor, arguments: dict[str, bool]) -> bool:
    try:
        with torch.no_grad():
            model(image, **arguments)
    except Exception:  # noqa: BLE001  (each library refuses in its own way)
        return False
    return True


def _twin(model: nn.Module) -> nn.Module:
    """A network with modules of its own, for whatever they remember, that shares all weights."""
    shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return copy.deepcopy(model, dict(shared))


def _logits(output: Any) -> Tensor | None:
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    return logits if isinstance(logits, Tensor) and logits.dim() == 2 else None


def _is_logit(mean: Tensor, output: Any) -> bool | None:
    """Whether the means of maps are the logits; None if the network returns no logits to compare with."""
    logits = _logits(output)
    if logits is None or logits.shape != mean.shape:
        return None
    return torch.allclose(mean, logits, rtol=0, atol=1e-2 * max(logits.abs().max().item(), 1e-6))


def maps_of(
    model: nn.Module, way: Way, places: Sequence[int], copies: int
) -> Callable[[Tensor, Callable[[Callable[[Tensor], Tensor]], Tensor]], Tensor]:
    """A function for threads: `(index, use)` gives `use` a callable from views to maps of classes `index`.

    ``places`` are the model's classes for those of the labels, of which ``index`` (B,P) are those to look
    for in each of B images. Views (N,3,h,w) are of the B images, N / B times over. So many threads look at a
    time, each with a copy of the network: what its modules note down for one another, as some transformers do
    with the size of an image, must be of one image.
    """
    lenses: queue.SimpleQueue[Callable[[Tensor, Tensor], Tensor]] = queue.SimpleQueue()
    for network in [model, *(_twin(model) for _ in range(copies - 1))]:
        lenses.put(_lens(network, way))

    def look(index: Tensor, use: Callable[[Callable[[Tensor], Tensor]], Tensor]) -> Tensor:
        index = torch.tensor(places, device=index.device)[index]
        lens = lenses.get()
        try:
            return use(lambda views: lens(_fit(views, way), index.repeat(len(views) // len(index), 1)))
        finally:
            lenses.put(lens)

    return look


def _lens(network: nn.Module, way: Way) -> Callable[[Tensor, Tensor], Tensor]:
    """A function of views (N,3,h,w) and classes (N,P) of the model: their raw maps (N,P,h,w)."""
    if way.maps == "cam":
        cam = CAM(network, way.layer, way.classifier)
        return lambda views, index: gather_present(cam(views, **way.arguments), index)

    def look(views: Tensor, index: Tensor) -> Tensor:
        reshape = None
        if way.prefix is not None:
            grid = (views.shape[2] // way.stride, views.shape[3] // way.stride)
            reshape = partial(tokens_to_map, grid=grid, num_prefix_tokens=way.prefix)
        labels = torch.zeros(len(views), way.num_classes, device=views.device).scatter(1, index, 1)
        maps = GradCAM(network, way.layer, reshape=reshape)(views, labels, **way.arguments)
        return gather_present(maps, index)

    return look


def _fit(views: Tensor, way: Way) -> Tensor:
    """Views of a size that the network takes, of whole patches."""
    least = math.ceil(way.least / way.stride)
    sides = [way.only or max(least, round(side / way.stride)) * way.stride for side in views.shape[2:]]
    if sides == list(views.shape[2:]):
        return views
    return F.interpolate(views, size=sides, mode="bilinear", align_corners=False, antialias=True)
