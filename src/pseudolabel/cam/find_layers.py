"""Where to look in a classifier: the layer whose maps to read, and the linear layer that classifies."""

import re
from collections.abc import Iterator
from typing import Literal, NamedTuple

from torch import nn

from pseudolabel.cam._network import last_names

__all__ = ["FoundLayer", "find_classifier", "find_target_layer", "linear_layers", "returns_tokens"]


class FoundLayer(NamedTuple):
    """A layer of a network, and why it was taken.

    Attributes:
        name: Its name in `model.named_modules()`.
        module: The layer.
        reason: Why it was taken, in words.
        output: What it should return: `maps` (B,D,h,w), `tokens` (B,N,D), or with channels last (B,h,w,D), or
            `logits` (B,C).
    """

    name: str
    module: nn.Module
    reason: str
    output: Literal["maps", "tokens", "logits"]


def find_classifier(model: nn.Module) -> FoundLayer:
    """Find the linear layer that gives the logits: the last `nn.Linear` or 1x1 `nn.Conv2d` of the model.

    Last in the order of definition, leaving out what cannot be it: layers inside repeated blocks (attention,
    bottlenecks), and by their names poolers and projections to an embedding. The network is not run; a layer
    that is defined late and not used deceives the search.

    Args:
        model: Networks built as those of torchvision, timm and transformers are, or your own.

    Returns:
        Name, module and reason.

    Raises:
        ValueError: If there is none, or two of the same shape stand side by side, as in distilled networks.
            The message lists candidates.

    Examples:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
        >>> find_classifier(net).name
        '3'
    """
    modules = dict(model.named_modules())
    found = {
        name: modules[name]
        for name in linear_layers(model)
        if not _in_repeated_block(name, modules) and not re.search("pooler|projection", name)
    }
    if not found:
        inner = linear_layers(model)
        got = (
            f"none but those inside repeated blocks, poolers and projections, such as {inner[-3:]}"
            if inner
            else "none"
        )
        raise ValueError(
            f"classifier: expected an nn.Linear or a 1x1 nn.Conv2d in the model, got {got}; "
            f"give classifier and target_layer; modules: {last_names(model)}"
        )
    name, module = list(found.items())[-1]
    rivals = [
        other
        for other, candidate in found.items()
        if _shape(candidate) == _shape(module) and _parent(other) == _parent(name)
    ]
    # Layers that do not keep the number of channels cannot follow one another at the same shape.
    if len(rivals) > 1 and _shape(module)[0] != _shape(module)[1]:
        raise ValueError(
            f"classifier: expected one last linear layer, got {rivals} side by side, all of shape "
            f"{_shape(module)}; name one of them"
        )
    return FoundLayer(name, module, f"the last linear layer outside of repeated blocks, {name!r}", "logits")


def find_target_layer(model: nn.Module) -> FoundLayer:
    """Find the layer whose activations gradient CAMs weight, by the structure of the network.

    - Convolutional networks: the last stage before pooling and classifier, with the normalisation and
      activation that follow it.
    - Vision transformers: the first norm of the last block, in front of its attention. After it, patch tokens
      of a network that classifies by its class token have no gradient any more.
    - Transformers in stages (Swin and the like, which average all places): the last block.

    A transformer's layer returns tokens (B,N,D), or maps with channels last (B,h,w,D): `output` is
    `"tokens"`, and who uses the layer needs a function that makes (B,D,h,w) of them. The network is not run:
    structure tells much, and not all, so look at `reason`.

    Args:
        model: Networks built as those of torchvision, timm and transformers are, or your own.

    Returns:
        Name, module, reason, and what the layer returns.

    Raises:
        ValueError: If there is neither a convolution nor a transformer block, or several towers of blocks, as
            in CLIP with text. The message lists candidates.

    Examples:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> found = find_target_layer(net)
        >>> found.name, found.output
        ('1', 'maps')

    Source:
        Selvaraju et al., "Grad-CAM", ICCV 2017, look at the last convolutional layer. The norm in front of
        the last attention is where CLIP-ES (Lin et al., CVPR 2023) looks. The search is ours.
    """
    try:
        classifier: nn.Module | None = find_classifier(model).module
    except ValueError:
        classifier = None
    modules = dict(model.named_modules())
    blocks = [name for name, module in modules.items() if len(_norms(module)) >= 2]
    blocks = [name for name in blocks if not any(other in _within(name, modules) for other in blocks)]
    convolutions = [
        name for name, module in modules.items() if isinstance(module, nn.Conv2d) and module is not classifier
    ]
    if blocks:
        order = list(modules)
        behind = set(order[order.index(blocks[-1]) :]) - _within(blocks[-1], modules)
        if not behind.intersection(convolutions):
            return _last_block(blocks, modules)
    if not convolutions:
        raise ValueError(
            "target_layer: expected a network with an nn.Conv2d in front of its classifier, or with "
            "transformer blocks (two norms each), got neither; name a layer, such as one of "
            f"{last_names(model)}"
        )
    return _last_stage(model, {modules[name] for name in convolutions})


def returns_tokens(module: nn.Module) -> bool:
    """Whether this is a transformer block, or a norm over its last axis: (B,N,D) or (B,h,w,D)."""
    over_last = type(module) is nn.LayerNorm and len(module.normalized_shape) == 1
    return over_last or len(_norms(module)) >= 2


def _last_block(blocks: list[str], modules: dict[str, nn.Module]) -> FoundLayer:
    """The last transformer block, or its first norm where the blocks are one sequence."""
    towers = {re.sub(r"\d+", "*", name): name for name in blocks}  # the last block of each sequence
    if len(towers) > 1:
        raise ValueError(
            f"target_layer: expected one tower of transformer blocks, got {list(towers)}; name a layer, such "
            f"as one of {[_join(block, _norms(modules[block])[0]) for block in towers.values()]}"
        )
    block = blocks[-1]
    stages = {tuple(re.findall(r"\d+", name)[:-1]) for name in blocks}  # all numbers but the block's own
    if len(stages) > 1:
        reason = f"the last transformer block of the last stage, {block!r}"
        return FoundLayer(block, modules[block], reason, "tokens")
    norm = _join(block, _norms(modules[block])[0])
    reason = f"the first norm of the last transformer block, {norm!r}, in front of its attention"
    return FoundLayer(norm, modules[norm], reason, "tokens")


def _last_stage(model: nn.Module, convolutions: set[nn.Module]) -> FoundLayer:
    """Go down along the last child that convolves, until a part of the network that returns maps."""
    name, parent, module = "", model, model
    while module is model or not _returns_maps(module, parent):
        parts = [
            (child, part)
            for child, part in module.named_children()
            if not convolutions.isdisjoint(part.modules())
        ]
        if not parts:
            return FoundLayer(name, module, "the model is a convolution", "maps")
        parent, (child, module) = module, parts[-1]
        name = _join(name, child)
    reason = f"the last part that convolves, {name!r}"
    children = list(parent.named_children())
    for child, part in children[[part for _, part in children].index(module) + 1 :]:
        if not isinstance(part, nn.BatchNorm2d) and type(part).__module__ != nn.ReLU.__module__:
            break
        name, module = _join(_parent(name), child), part
        reason = f"the last part that convolves, with what follows it, {name!r}"
    return FoundLayer(name, module, reason, "maps")


def _returns_maps(module: nn.Module, parent: nn.Module) -> bool:
    """Whether this is a body that returns maps: it neither pools, nor holds a list of stages."""
    if isinstance(module, nn.ModuleList) or any(
        re.search(r"Adaptive\w*Pool|Flatten", type(part).__name__) for part in module.children()
    ):
        return False
    whole = isinstance(module, nn.Sequential) or isinstance(parent, nn.ModuleList)
    return whole or not any(isinstance(part, nn.ModuleList) for part in module.modules())


def _norms(module: nn.Module) -> list[str]:
    """Names of the layer norms that are direct children."""
    return [
        name
        for name, part in module.named_children()
        if isinstance(part, nn.LayerNorm) or re.search(r"LayerNorm|RMSNorm", type(part).__name__)
    ]


def _in_repeated_block(name: str, modules: dict[str, nn.Module]) -> bool:
    """Whether some ancestor has a numbered sibling of its own class, one that is more than a container."""
    return any(
        type(modules[sibling]) is type(modules[ancestor])
        for ancestor in _ancestors(name)
        if re.search(r"\d$", ancestor) and not isinstance(modules[ancestor], nn.Sequential | nn.ModuleList)
        for sibling in _numbered_siblings(ancestor, modules)
    )


def _ancestors(name: str) -> Iterator[str]:
    while name := _parent(name):
        yield name


def _numbered_siblings(name: str, modules: dict[str, nn.Module]) -> list[str]:
    stem = name.rstrip("0123456789")
    return [
        other for other in modules if other != name and other.rstrip("0123456789") == stem and other != stem
    ]


def _within(name: str, modules: dict[str, nn.Module]) -> set[str]:
    """Names of all modules inside of a module."""
    return {_join(name, inner) for inner, _ in modules[name].named_modules() if inner}


def _join(name: str, child: str) -> str:
    return f"{name}.{child}" if name else child


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def linear_layers(model: nn.Module) -> list[str]:
    """Names of all layers that could be a classifier."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        or (isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1)
    ]


def _shape(layer: nn.Module) -> tuple[int, int]:
    """Outputs and inputs of a linear layer."""
    if isinstance(layer, nn.Conv2d):
        return layer.out_channels, layer.in_channels
    return int(layer.out_features), int(layer.in_features)  # type: ignore[arg-type]
