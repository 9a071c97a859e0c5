"""Class activation maps from the weights of a linear classifier: one forward pass for all classes."""

from contextlib import ExitStack
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from pseudolabel._checks import check_float, check_shapes
from pseudolabel._maps import working_dtype
from pseudolabel.cam._network import EvalMode, find_module, hook_here, last_names
from pseudolabel.cam.find_layers import find_classifier, linear_layers

__all__ = ["CAM", "class_activation_map"]


def class_activation_map(features: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Weight the feature channels by each class's classifier weights.

        cam[b, c, y, x] = sum_d weight[c, d] * features[b, d, y, x]  (+ bias[c])

    Where the network ends in global average pooling and this linear layer, the mean of a map over its pixels
    is the class's logit (with the bias). Raw: no ReLU, no normalisation, sign kept, differentiable.

    Args:
        features: Features before pooling (B,D,h,w). Half precision is accumulated in float32.
        weight: Classifier weights (C,D), or (C,D,1,1) of a 1x1 convolution.
        bias: Classifier bias (C,), left out by default as the published CAM programs do.

    Returns:
        Maps (B,C,h,w) in the dtype of ``features``.

    Raises:
        TypeError: If an argument is not a floating-point tensor.
        ValueError: If the shapes do not fit.

    Examples:
        >>> import torch
        >>> features = torch.tensor([[[[1.0, 0.0]], [[0.0, 2.0]]]])  # (1, 2, 1, 2)
        >>> class_activation_map(features, torch.tensor([[1.0, -1.0]]))
        tensor([[[[ 1., -2.]]]])

    Source:
        Zhou et al., "Learning Deep Features for Discriminative Localization", CVPR 2016.
    """
    if isinstance(weight, Tensor) and weight.dim() == 4:
        check_shapes(weight=(weight, "C D 1 1"))
        weight = weight.flatten(1)
    arguments = {"features": (features, "B D h w"), "weight": (weight, "C D")}
    if bias is not None:
        arguments["bias"] = (bias, "C")
    check_shapes(**arguments)
    check_float(features=features, weight=weight)
    if len(weight) == 0:
        raise ValueError(f"weight: expected at least one class, got {tuple(weight.shape)}")
    dtype = working_dtype(features)
    cam = F.conv2d(
        features.to(dtype), weight.to(dtype)[:, :, None, None], None if bias is None else bias.to(dtype)
    )
    return cam.to(features.dtype)


class CAM:
    """Read class activation maps off a classifier: `cam(x)` is (B,C,h,w), raw, for all classes.

    The network runs once, as it is. What its global average pooling reduces just before the classifier is
    caught on the way and weighted by the classifier's weights (`class_activation_map`). That works for a
    linear layer after pooling, and for a 1x1 convolution before or after pooling, also where pooling and
    activation are plain function calls. Other networks say where to look with `target_layer`.

    Used as a context manager, the network is in eval mode inside the `with` block, and every module gets its
    own mode back afterwards, on errors too. A call outside of a `with` block does the same for itself. Hooks
    exist only while the network runs. Maps are differentiable; wrap the call in `torch.no_grad()` when no
    gradient is wanted.

    Threads may share the network, and the extractor: a call sees what its own thread runs, and the modes come
    back when the last one leaves. A network that runs its parts in threads of its own, as `nn.DataParallel`
    does on several devices, is an error: hand over its `module`.

    Args:
        model: The classifier.
        target_layer: Module, or its name in `model.named_modules()`, whose (B,D,h,w) output are the features.
            By default what is pooled before the classifier.
        classifier: The classifier's module, its name, or its weights (C,D). By default the last `nn.Linear`
            or 1x1 `nn.Conv2d` of the model outside of repeated blocks (`find_classifier`).
        bias: Add the classifier's bias to the maps.
        eval_mode: Put the network in eval mode while it runs. False leaves the modes alone, for training
            through the maps.

    Raises:
        ValueError: If a name is unknown, no classifier is found, or the features do not fit the classifier;
            the message lists candidates.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), pool, nn.Linear(8, 5))
        >>> with torch.no_grad(), CAM(net) as cam:
        ...     maps = cam(torch.rand(2, 3, 16, 16))
        >>> maps.shape
        torch.Size([2, 5, 14, 14])

    Source:
        Zhou et al., "Learning Deep Features for Discriminative Localization", CVPR 2016.
    """

    def __init__(
        self,
        model: nn.Module,
        target_layer: str | nn.Module | None = None,
        classifier: str | nn.Module | Tensor | None = None,
        *,
        bias: bool = False,
        eval_mode: bool = True,
    ) -> None:
        self.model = model
        self.target_layer = None if target_layer is None else find_module(model, "target_layer", target_layer)
        self.bias = bias
        self.eval_mode = eval_mode
        if classifier is None:
            classifier = find_classifier(model).module
        self.classifier = (
            classifier if isinstance(classifier, Tensor) else find_module(model, "classifier", classifier)
        )
        self._weight_and_bias()  # says at once if the classifier has no usable weights
        if isinstance(self.classifier, Tensor) and (self.target_layer is None or bias):
            wanted = "no bias" if bias else "a target_layer"
            raise ValueError(
                f"classifier: expected {wanted} beside a weight tensor, which belongs to no module"
            )
        self._eval = EvalMode(model, eval_mode)

    def __enter__(self) -> Self:
        self._eval.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._eval.__exit__(*error)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run the network on its own arguments and return the raw maps (B,C,h,w) of all classes."""
        with self:
            features = self._features(*args, **kwargs)
        weight, bias = self._weight_and_bias()
        return class_activation_map(features, weight, bias if self.bias else None)

    def _weight_and_bias(self) -> tuple[Tensor, Tensor | None]:
        if isinstance(self.classifier, Tensor):
            return self.classifier, None
        weight = getattr(self.classifier, "weight", None)
        if not isinstance(weight, Tensor) or weight.shape[2:].numel() != 1 or weight.dim() not in (2, 4):
            raise ValueError(
                f"classifier: expected nn.Linear or a 1x1 nn.Conv2d, got {type(self.classifier).__name__}; "
                f"candidates: {linear_layers(self.model)}"
            )
        return weight, getattr(self.classifier, "bias", None)

    def _features(self, *args: Any, **kwargs: Any) -> Tensor:
        """Features of one forward pass: the target layer's output, or what the classifier sees pooled."""
        watch = _FeatureWatch(channels=self._weight_and_bias()[0].shape[1])
        with ExitStack() as watching:
            if self.target_layer is not None:
                hook = hook_here(self.target_layer.register_forward_hook, watch.see_target)
            else:
                assert isinstance(self.classifier, nn.Module)  # noqa: S101  (checked in __init__)
                hook = hook_here(self.classifier.register_forward_hook, watch.see_classifier)
                watching.enter_context(watch)
            watching.enter_context(hook)
            self.model(*args, **kwargs)
        if watch.features is None:
            where = (
                "target_layer" if self.target_layer else "features (none pooled just before the classifier)"
            )
            raise ValueError(
                f"{where}: expected (B, {watch.channels}, h, w), for {watch.channels} classifier inputs, "
                f"got {watch.others or 'none'}; give target_layer, such as one of {last_names(self.model)}"
            )
        return watch.features


class _FeatureWatch(TorchFunctionMode):
    """Catch the features on their way through the network.

    As a function mode it sees every averaging over both spatial axes, done by a module or by a function call;
    the last one before the classifier is the global pooling.
    """

    AVERAGING = (F.adaptive_avg_pool2d, F.avg_pool2d, torch.mean, Tensor.mean)

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.features: Tensor | None = None
        self.others: list[tuple[int, ...]] = []
        self._classified = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in self.AVERAGING and not self._classified:
            pooled = args[0] if args else (kwargs or {}).get("input")
            if isinstance(pooled, Tensor) and pooled.dim() == 4 and isinstance(result, Tensor):
                over_space = result.shape[:2] == pooled.shape[:2] and result.shape[2:].numel() == 1
                if over_space:
                    self._take(pooled)
        return result

    def see_classifier(self, _module: nn.Module, inputs: tuple[Any, ...], _output: Any) -> None:
        """A 1x1 convolution before the pooling sees the features themselves."""
        value = inputs[0]
        if value.dim() == 4 and (value.shape[2:].numel() > 1 or self.features is None):
            self._take(value)
        self._classified = True

    def see_target(self, _module: nn.Module, _inputs: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor):
            self._take(output)

    def _take(self, value: Tensor) -> None:
        if value.dim() == 4 and value.shape[1] == self.channels:
            self.features = value
        else:
            self.others.append(tuple(value.shape))
