"""Grad-CAM, Grad-CAM++ and LayerCAM: maps from activations and the gradients of class scores to them.

For a network that ends in global average pooling and a linear layer, Grad-CAM of the pooled features is the
class activation map (`CAM`) divided by the number of places; the gradient family is for all the others.
It takes no shortcut there: the backward pass ends at the target layer, and costs next to nothing for such a
network.
"""

from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from pseudolabel._checks import check_count, check_float, check_labels, check_shapes
from pseudolabel._maps import clamp_keeping_slope, present_classes, scatter_present, working_dtype
from pseudolabel.cam._network import EvalMode, find_module, hook_here
from pseudolabel.cam.find_layers import find_target_layer, returns_tokens

__all__ = [
    "GradCAM",
    "GradCAMPlusPlus",
    "LayerCAM",
    "grad_cam",
    "grad_cam_plus_plus",
    "layer_cam",
    "present_softmax",
]


def grad_cam(activations: Tensor, gradients: Tensor, *, relu: bool = False) -> Tensor:
    """Weight the channels of activations by the mean of their gradients.

        cam[b, c, y, x] = sum_d  w[b, c, d] * activations[b, d, y, x]
        w[b, c, d]      = mean over all (i, j) of gradients[b, c, d, i, j]

    Args:
        activations: Activations of a layer (B,D,h,w). Half precision is accumulated in float32.
        gradients: Gradients of the scores of C classes to them (B,C,D,h,w).
        relu: Keep positive values only, as the paper does. By default the sign is kept.

    Returns:
        Maps (B,C,h,w) in the dtype of ``activations``.

    Raises:
        TypeError: If an argument is not a floating-point tensor.
        ValueError: If the shapes do not fit.

    Examples:
        >>> import torch
        >>> activations = torch.tensor([[[[1.0, 0.0]], [[0.0, 2.0]]]])  # (1, 2, 1, 2)
        >>> gradients = torch.tensor([[[[[1.0, 3.0]], [[-1.0, -1.0]]]]])  # (1, 1, 2, 1, 2)
        >>> grad_cam(activations, gradients)
        tensor([[[[ 2., -2.]]]])

    Source:
        Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization",
        ICCV 2017.
    """
    a, g, dtype = _checked(activations, gradients)
    return _finish(torch.einsum("bcd,bdhw->bchw", g.mean((3, 4)), a), dtype, relu)


def grad_cam_plus_plus(activations: Tensor, gradients: Tensor, *, relu: bool = False) -> Tensor:
    """Weight the channels of activations by their positive gradients, each by how much it alone must explain.

        cam[b, c, y, x] = sum_d  w[b, c, d] * activations[b, d, y, x]
        w[b, c, d]      = sum over (i, j) of alpha[b, c, d, i, j] * max(g[b, c, d, i, j], 0)
        alpha           = g^2 / (2 g^2 + g^3 * sum over (i, j) of activations[b, d, i, j])

    `alpha` is the paper's for the exponential of a score that is piecewise linear in the activations: its
    second and third derivatives are powers of the gradient `g` of the score itself. The paper multiplies `w`
    by that exponential as well, one positive factor a map, which is left out here: normalised maps are the
    same.
    Meant for activations after a ReLU: where their sum is negative, the denominator can vanish.

    Args:
        activations: Activations of a layer (B,D,h,w), not negative. Half precision is accumulated in float32.
        gradients: Gradients of the scores of C classes, before any exponential, to them (B,C,D,h,w).
        relu: Keep positive values only, as the paper does. By default the sign is kept.

    Returns:
        Maps (B,C,h,w) in the dtype of ``activations``.

    Raises:
        TypeError: If an argument is not a floating-point tensor.
        ValueError: If the shapes do not fit.

    Examples:
        >>> import torch
        >>> activations = torch.tensor([[[[1.0, 0.0]], [[0.0, 2.0]]]])  # (1, 2, 1, 2)
        >>> gradients = torch.tensor([[[[[2.0, 0.0]], [[1.0, -1.0]]]]])  # weights 2 / (2 + 2) and 1 / (2 + 2)
        >>> grad_cam_plus_plus(activations, gradients)
        tensor([[[[0.5000, 0.5000]]]])

    Source:
        Chattopadhay et al., "Grad-CAM++: Improved Visual Explanations for Deep Convolutional Networks", WACV
        2018. That zero gradients have weight 0 is ours.
    """
    a, g, dtype = _checked(activations, gradients)
    positive = clamp_keeping_slope(g, low=0)
    # alpha * max(g, 0), with g^2 cancelled, which may be too small for the dtype.
    weight = (positive / (2 + positive * a.sum((2, 3))[:, None, :, None, None])).sum((3, 4))
    return _finish(torch.einsum("bcd,bdhw->bchw", weight, a), dtype, relu)


def layer_cam(activations: Tensor, gradients: Tensor, *, relu: bool = False) -> Tensor:
    """Weight each activation by its own positive gradient, which also serves early layers.

        cam[b, c, y, x] = sum_d  max(gradients[b, c, d, y, x], 0) * activations[b, d, y, x]

    Args:
        activations: Activations of a layer (B,D,h,w). Half precision is accumulated in float32.
        gradients: Gradients of the scores of C classes to them (B,C,D,h,w).
        relu: Keep positive values only, as the paper does. By default the sign is kept.

    Returns:
        Maps (B,C,h,w) in the dtype of ``activations``.

    Raises:
        TypeError: If an argument is not a floating-point tensor.
        ValueError: If the shapes do not fit.

    Examples:
        >>> import torch
        >>> activations = torch.tensor([[[[1.0, 0.5]], [[0.0, 2.0]]]])  # (1, 2, 1, 2)
        >>> gradients = torch.tensor([[[[[1.0, -3.0]], [[1.0, 0.5]]]]])  # (1, 1, 2, 1, 2)
        >>> layer_cam(activations, gradients)
        tensor([[[[1., 1.]]]])

    Source:
        Jiang et al., "LayerCAM: Exploring Hierarchical Class Activation Maps for Localization", IEEE TIP
        2021.
    """
    a, g, dtype = _checked(activations, gradients)
    return _finish(torch.einsum("bcdhw,bdhw->bchw", clamp_keeping_slope(g, low=0), a), dtype, relu)


def present_softmax(logits: Tensor, labels: Tensor) -> Tensor:
    """Score of a class by softmax over the present classes of its image, and the background.

        scores[b, c] = exp(logits[b, c]) / sum of exp(logits[b, k]) over present k and all of the background

    A score for `GradCAM`: what raises other present classes as well counts less, which separates classes that
    occur together.

    Args:
        logits: Logits (B,C+G): those of the C classes of ``labels``, then G >= 0 of the background, such as
            of a vision-language model's prompts for what surrounds objects.
        labels: Image-level labels (B,C).

    Returns:
        Scores (B,C) in the dtype of ``logits``, 0 for absent classes.

    Raises:
        TypeError: If ``logits`` is not a floating-point tensor.
        ValueError: If the shapes do not fit, or ``labels`` is not multi-hot.

    Examples:
        >>> import torch
        >>> logits = torch.tensor([[0.0, 5.0, 0.0, 0.0]])  # two classes, two background prompts
        >>> present_softmax(logits, torch.tensor([[1, 0]]))
        tensor([[0.3333, 0.0000]])

    Source:
        Lin et al., "CLIP is Also an Efficient Segmenter", CVPR 2023 (CLIP-ES), which takes the softmax over
        the image's classes and a set of background prompts.
    """
    check_shapes(logits=(logits, "B K"), labels=(labels, "B C"))
    check_float(logits=logits)
    check_labels(labels)
    classes = labels.shape[1]
    if logits.shape[1] < classes:
        raise ValueError(
            f"logits: expected at least C={classes} columns from labels, got {tuple(logits.shape)}"
        )
    absent = torch.nn.functional.pad(labels == 0, (0, logits.shape[1] - classes))
    # Finite, so that an image without any class and background has no NaN on the way.
    scores = logits.masked_fill(absent, torch.finfo(logits.dtype).min).softmax(1)
    return scores.masked_fill(absent, 0)[:, :classes]


class GradCAM:
    """Grad-CAM of all present classes of all images: `cam(image, labels)` is (B,C,h,w), raw.

    The network runs once, without a graph up to the target layer. From there the scores' gradients are taken
    by `torch.autograd.grad`: the first present class of every image in one backward pass, the second in
    another, and so on. Each ends at the target layer, so parameters may be frozen, none gets a `.grad`, and
    nothing stays behind. Maps of absent classes are 0 and cost nothing.

    Used as a context manager, the network is in eval mode inside the `with` block, and every module gets its
    own mode back afterwards, on errors too. A call outside of a `with` block does the same for itself. The
    hook exists only while the network runs. The caller may be under `torch.no_grad()`, `inference_mode()` or
    autocast. In float16, gradients under 6e-8 vanish: let `score` multiply what is small. For threads that
    share a network see `CAM`.

    Scores are to depend on their own image alone: with `eval_mode=False`, batch normalisation mixes the
    images.

    Args:
        model: The classifier.
        target_layer: Module, or its name in `model.named_modules()`, whose output are the activations. By
            default `find_target_layer`. Where it runs several times, the last one counts.
        reshape: What turns the layer's output into (B,D,h,w) where it is not: tokens (B,N,D), or channels
            last. It must only pick and move values, because gradients pass through it as well.
        score: Function of the network's output, whatever that is, and ``labels``, to scores (B,C) of which
            the gradients are taken. By default the output, if it is a (B,C) tensor or has such `logits`.
            `present_softmax` is another.
        relu: Keep positive values of the maps only.
        create_graph: Give maps a graph, so that they can be trained through; the whole network keeps one.
        chunk_size: How many classes of an image share a backward pass (`is_grads_batched` of
            `torch.autograd.grad`), at that many times the memory. 1 works with every network.
        eval_mode: Put the network in eval mode while it runs.

    Raises:
        TypeError: If the layer returns neither a tensor nor a tuple that begins with one.
        ValueError: If a name is unknown, no layer is found, shapes do not fit, or the scores do not depend on
            the layer.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 14 * 14, 5))
        >>> with GradCAM(net, target_layer="1") as cam:
        ...     maps = cam(torch.rand(2, 3, 16, 16), torch.tensor([[1, 0, 0, 1, 0], [0, 0, 1, 0, 0]]))
        >>> maps.shape
        torch.Size([2, 5, 14, 14])
        >>> bool(maps[0, 1].any())  # an absent class
        False

        The softmax over present classes and background prompts, as in CLIP-ES, with 5 classes and 2 prompts:

        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 14 * 14, 7))
        >>> cam = GradCAM(net, score=present_softmax)
        >>> cam(torch.rand(1, 3, 16, 16), torch.tensor([[1, 0, 0, 1, 0]])).shape
        torch.Size([1, 5, 14, 14])

    Source:
        Selvaraju et al., ICCV 2017 (`grad_cam`). All classes of a batch in this way is ours.
    """

    _maps: ClassVar[Callable[..., Tensor]] = staticmethod(grad_cam)

    def __init__(
        self,
        model: nn.Module,
        target_layer: str | nn.Module | None = None,
        *,
        reshape: Callable[[Tensor], Tensor] | None = None,
        score: Callable[[Any, Tensor], Tensor] | None = None,
        relu: bool = False,
        create_graph: bool = False,
        chunk_size: int = 1,
        eval_mode: bool = True,
    ) -> None:
        check_count(chunk_size=chunk_size)
        self.model = model
        if target_layer is None:
            found = find_target_layer(model)
            self.target_layer, tokens = found.module, found.output == "tokens"
        else:
            self.target_layer = find_module(model, "target_layer", target_layer)
            tokens = returns_tokens(self.target_layer)
        if tokens and reshape is None:
            raise ValueError(
                f"reshape: expected a function that makes maps (B, D, h, w) of what the target layer, a "
                f"{type(self.target_layer).__name__}, returns (tokens (B, N, D), or channels last), got None"
            )
        self.reshape = reshape
        self.score = score
        self.relu = relu
        self.create_graph = create_graph
        self.chunk_size = chunk_size
        self._eval = EvalMode(model, eval_mode)

    def __enter__(self) -> Self:
        self._eval.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._eval.__exit__(*error)

    def __call__(self, image: Tensor, labels: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        """Run the network on an image and return the raw maps (B,C,h,w).

        Args:
            image: Images (B,...), the network's first argument.
            labels: Image-level labels (B,C). None takes all classes of the scores, at one backward pass each.
            *args: Further arguments of the network.
            **kwargs: Further arguments of the network.
        """
        if labels is not None:
            check_shapes(labels=(labels, "B C"))
            check_labels(labels)
        # Gradients are needed here, whatever the caller has switched off.
        with self._eval, torch.inference_mode(False), torch.enable_grad():
            output, activations = self._run(image.clone() if image.is_inference() else image, *args, **kwargs)
            scores = self._scores(output, labels)
            if labels is None:
                labels = scores.new_ones(scores.shape)
            index, valid = present_classes(labels.to(scores.device))
            found = self._to_maps(activations if self.create_graph else activations.detach())
            if index.shape[1] == 0:
                return found.new_zeros(*labels.shape, *found.shape[2:])
            maps = [
                self._maps(found, self._to_maps(gradients, classes=True), relu=self.relu)
                for gradients in self._gradients(scores, activations, index)
            ]
        return scatter_present(torch.cat(maps, 1), index, valid, labels.shape[1])

    def _run(self, *args: Any, **kwargs: Any) -> tuple[Any, Tensor]:
        """Output of the network, and the target layer's activations on the way to it."""
        seen: list[Tensor] = []

        def take(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            first = output[0] if isinstance(output, tuple | list) and output else output
            if not isinstance(first, Tensor) or not first.is_floating_point():
                raise TypeError(
                    "target_layer: expected a layer that returns a floating-point tensor, or a tuple that "
                    f"begins with one, got {type(output).__name__}"
                )
            torch.set_grad_enabled(True)  # from here on, until the network is through
            if not self.create_graph or not first.requires_grad:
                first = first.detach().requires_grad_()
            seen.append(first)
            rest = first.clone()  # the network may go on in place
            return rest if isinstance(output, Tensor) else type(output)([rest, *output[1:]])

        hook = hook_here(self.target_layer.register_forward_hook, take)
        with hook, torch.set_grad_enabled(self.create_graph):
            output = self.model(*args, **kwargs)
        if not seen:
            raise ValueError("target_layer: expected a layer that the network runs, got one that it does not")
        return output, seen[-1]

    def _scores(self, output: Any, labels: Tensor | None) -> Tensor:
        if self.score is not None:
            if labels is None:
                raise ValueError(
                    "labels: expected image-level labels (B, C) beside a score function, got None"
                )
            scores = self.score(output, labels)
        else:
            logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
            if not isinstance(logits, Tensor):
                raise ValueError(
                    "score: expected a function of the network's output, which is neither a tensor nor has "
                    f"logits, got None; the output is a {type(output).__name__}"
                )
            scores = logits
        check_shapes(scores=(scores, "B C"), **({} if labels is None else {"labels": (labels, "B C")}))
        check_float(scores=scores)
        if not scores.requires_grad:
            raise ValueError(_NO_PATH)
        return scores

    def _gradients(self, scores: Tensor, activations: Tensor, index: Tensor) -> Iterator[Tensor]:
        """Gradients (B,k,...) to the activations, of up to `chunk_size` present classes of each image."""
        for classes in torch.split(index, self.chunk_size, 1):
            seed = scores.new_zeros(classes.shape[1], *scores.shape)  # in each, one class of each image
            seed.scatter_(2, classes.T[:, :, None], 1)
            batched = len(seed) > 1
            (gradients,) = torch.autograd.grad(
                scores,
                activations,
                seed if batched else seed[0],
                retain_graph=True,
                create_graph=self.create_graph,
                is_grads_batched=batched,
                allow_unused=True,
            )
            if gradients is None:
                raise ValueError(_NO_PATH)
            yield gradients.transpose(0, 1) if batched else gradients[:, None]

    def _to_maps(self, value: Tensor, classes: bool = False) -> Tensor:
        """Activations as (B,D,h,w); or their gradients, which have an axis more, as (B,k,D,h,w)."""
        maps = value.flatten(0, 1) if classes else value
        batch = len(maps)
        maps = maps if self.reshape is None else self.reshape(maps)
        if maps.dim() != 4 or maps.shape[0] != batch:
            what = "target_layer" if self.reshape is None else "reshape"
            raise ValueError(
                f"{what}: expected activations ({batch}, D, h, w), got {tuple(maps.shape)}; reshape makes "
                "them of tokens, and of maps with channels last"
            )
        return maps.reshape(*value.shape[:2], *maps.shape[1:]) if classes else maps


class GradCAMPlusPlus(GradCAM):
    """Grad-CAM++ of all present classes of all images: `cam(image, labels)` is (B,C,h,w), raw.

    Arguments and behaviour are those of `GradCAM`, the maps those of `grad_cam_plus_plus`.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 14 * 14, 5))
        >>> GradCAMPlusPlus(net)(torch.rand(1, 3, 16, 16), torch.tensor([[1, 0, 0, 1, 0]])).shape
        torch.Size([1, 5, 14, 14])

    Source:
        Chattopadhay et al., WACV 2018 (`grad_cam_plus_plus`).
    """

    _maps = staticmethod(grad_cam_plus_plus)


class LayerCAM(GradCAM):
    """LayerCAM of all present classes of all images: `cam(image, labels)` is (B,C,h,w), raw.

    Arguments and behaviour are those of `GradCAM`, the maps those of `layer_cam`.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 14), nn.Flatten())
        >>> LayerCAM(net, "1")(torch.rand(1, 3, 16, 16), torch.tensor([[1, 0, 0, 1, 0]])).shape
        torch.Size([1, 5, 14, 14])

    Source:
        Jiang et al., IEEE TIP 2021 (`layer_cam`).
    """

    _maps = staticmethod(layer_cam)


_NO_PATH = (
    "target_layer: expected a layer on which the scores depend, got one without a path to them; if the "
    "network runs it under its own torch.no_grad(), create_graph=True keeps the path"
)


def _checked(activations: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor, torch.dtype]:
    """Both in the dtype to accumulate in, and the dtype of the maps."""
    check_shapes(activations=(activations, "B D h w"), gradients=(gradients, "B C D h w"))
    check_float(activations=activations, gradients=gradients)
    dtype = torch.promote_types(working_dtype(activations), working_dtype(gradients))
    return activations.to(dtype), gradients.to(dtype), activations.dtype


def _finish(cam: Tensor, dtype: torch.dtype, relu: bool) -> Tensor:
    return (cam.relu() if relu else cam).to(dtype)
