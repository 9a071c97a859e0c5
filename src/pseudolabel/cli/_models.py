"""The network that `--model` names: one's own, or one of transformers or timm; and the weights of a file."""

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pseudolabel.cam import find_classifier
from pseudolabel.cli._console import UserError, import_extra

__all__ = ["Classifier", "class_places", "load_classifier", "load_model", "load_weights"]


class Classifier(NamedTuple):
    """A network, and what is known of it; None where it does not say.

    Attributes:
        model: The network.
        own: Whether it is the user's, from `module:function`.
        classes: Names of its classes, in the order of its logits.
        mean: It sees `(image - mean) / std` of an image in [0, 1].
        std: See `mean`.
        size: Side of the square images that it was made for.
    """

    model: nn.Module
    own: bool = False
    classes: Sequence[str] | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    size: int = 224


def load_classifier(name: str, weights: str | None) -> Classifier:
    """The network of `hf:NAME`, `timm:NAME` or `module:function`, with its own weights or those of a file."""
    library, _, rest = name.partition(":")
    if library == "hf" and rest:
        return _of_transformers(rest, weights)
    if library == "timm" and rest:
        return _of_timm(rest, weights)
    if weights is None:
        raise UserError(f"--weights: expected a file for {name}, got none; hf: and timm: have their own")
    model = load_weights(load_model(name), weights)
    classes = getattr(model, "classes", None)
    named = isinstance(classes, list | tuple) and all(isinstance(each, str) for each in classes)
    return Classifier(model, own=True, classes=classes if named else None, size=_size_of(model))


def class_places(wanted: Sequence[str], classes: Sequence[str] | None, count: int) -> list[int]:
    """For each wanted class its place among the model's: by name where the model has names, else in order.

    Names are compared without case, `_` is a space, and where a model's name lists synonyms between commas,
    each will do. Classes wanted that are mere numbers 1, 2, ... go in order, too.
    """
    if classes is None or len(classes) != count or list(wanted) == [str(c + 1) for c in range(len(wanted))]:
        if len(wanted) != count:
            raise UserError(
                f"the classifier has {count} classes, the labels have {len(wanted)}: "
                f"{', '.join(wanted[:8])}; where names are unknown, classes go in order, all of them"
            )
        return list(range(count))
    full: dict[str, set[int]] = {}
    synonyms: dict[str, set[int]] = {}
    for place, name in enumerate(classes):
        full.setdefault(_plain(name), set()).add(place)
        for synonym in name.split(","):
            synonyms.setdefault(_plain(synonym), set()).add(place)
    found = [full.get(_plain(name)) or synonyms.get(_plain(name), set()) for name in wanted]
    missing = [name for name, where in zip(wanted, found, strict=True) if not where]
    doubtful = [name for name, where in zip(wanted, found, strict=True) if len(where) > 1]
    if missing or doubtful:
        said = [f"lacks {len(missing)} of the labels' classes: {', '.join(missing)}"] if missing else []
        said += [f"has more than one class for {', '.join(doubtful)}"] if doubtful else []
        raise UserError(
            f"--model: {'; it '.join(said)}; it knows {count}, such as {' | '.join(classes[:5])}; "
            "name the columns of the labels as the model does"
        )
    return [min(where) for where in found]


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").split()).casefold()


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


# ---------------------------------------------------------------------------------- transformers and timm


def _of_transformers(name: str, weights: str | None) -> Classifier:
    """A classifier of the hub, of its cache or of a folder that `save_pretrained` wrote."""
    transformers = import_extra("transformers", "--model", "transformers")
    auto = transformers.AutoModelForImageClassification
    settings = {"trust_remote_code": False, "local_files_only": Path(name).is_dir()}
    config = _fetch("hf", name, lambda: transformers.AutoConfig.from_pretrained(name, **settings))
    if weights is None:
        model, told = _fetch(
            "hf",
            name,
            lambda: auto.from_pretrained(name, config=config, output_loading_info=True, **settings),
        )
        if missing := sorted(told["missing_keys"]):
            raise UserError(
                f"--model: hf:{name} is no trained classifier: it lacks {len(missing)} weights, such as "
                f"{', '.join(missing[:2])}; train it, and give --weights"
            )
    else:

        def build(count: int | None) -> nn.Module:
            if count is not None:
                config.num_labels = count
            built: nn.Module = auto.from_config(config, trust_remote_code=False)
            return built

        model = _with_weights(build, weights)
        config = model.config
    classes = [config.id2label[place] for place in sorted(config.id2label)]
    mean, std = _normalization(transformers, name, settings)
    nameless = classes == [f"LABEL_{place}" for place in range(len(classes))]
    return Classifier(
        model.float(), classes=None if nameless else classes, mean=mean, std=std, size=_size_of(model)
    )


def _normalization(
    transformers: ModuleType, name: str, settings: dict[str, Any]
) -> tuple[Sequence[float] | None, Sequence[float] | None]:
    """Mean and standard deviation of its image processor, None if it has none."""
    try:
        processor, _ = transformers.ImageProcessingMixin.get_image_processor_dict(name, **settings)
    except OSError:
        return None, None
    scale = processor.get("rescale_factor", 1 / 255)
    odd = [key for key in ("rescale_offset", "include_top", "do_flip_channel_order") if processor.get(key)]
    if odd or processor.get("do_rescale") is False or abs(255 * scale - 1) > 1e-3:
        raise UserError(
            f"--model: hf:{name} wants its images in a way of its own ({', '.join(odd) or 'scale'}), which "
            "is not (image - mean) / std of an image in [0, 1]; wrap it in a module:function that does it"
        )
    if not processor.get("do_normalize", True):
        return (0.0,) * 3, (1.0,) * 3
    mean, std = (processor.get(key) for key in ("image_mean", "image_std"))
    if mean is None or std is None:
        return None, None
    return tuple(np.broadcast_to(mean, 3).tolist()), tuple(np.broadcast_to(std, 3).tolist())


def _of_timm(name: str, weights: str | None) -> Classifier:
    """A classifier by timm's name, or of a folder of its `save_for_hf`."""
    timm = import_extra("timm", "--model", "timm")
    source = f"local-dir:{name}" if Path(name).is_dir() else name

    def build(count: int | None) -> nn.Module:
        classes = {} if count is None else {"num_classes": count}
        # So that networks with position embeddings or windows take images of any size, where they can.
        for sizes in ({"dynamic_img_size": True}, {"strict_img_size": False}, {}):
            try:
                return timm.create_model(source, pretrained=weights is None, **classes, **sizes)  # type: ignore[no-any-return]
            except TypeError:
                if not sizes:
                    raise
        raise AssertionError

    if weights is None:
        model = _fetch("timm", name, lambda: build(None))
    else:
        model = _with_weights(lambda count: _fetch("timm", name, lambda: build(count)), weights)
    if not getattr(model, "num_classes", 1):
        raise UserError(f"--model: timm:{name} has no classifier; train one, and give --weights")
    told = model.pretrained_cfg
    return Classifier(
        model,
        classes=_timm_classes(timm, model),
        mean=told.get("mean"),
        std=told.get("std"),
        size=_size_of(model),
    )


def _timm_classes(timm: ModuleType, model: nn.Module) -> Sequence[str] | None:
    told: Any = model.pretrained_cfg
    if told.get("num_classes") != model.num_classes:
        return None
    if told.get("label_names"):
        return list(told["label_names"])
    subset = timm.data.infer_imagenet_subset(told)
    return timm.data.ImageNetInfo(subset).label_descriptions() if subset else None


def _fetch(library: str, name: str, load: Callable[[], Any]) -> Any:
    """What `load` gives, or an error that says where it was looked for."""
    try:
        return load()
    except UserError:
        raise
    except Exception as error:
        where = "cannot be loaded from this folder"
        if not Path(name).is_dir():
            where = "is no folder here, and cannot be had from the library or its hub"
        raise UserError(f"--model: {library}:{name} {where}: {type(error).__name__}: {error}") from error


def _size_of(model: nn.Module) -> int:
    """Side of the square images that it was made for, as far as networks of the libraries tell."""
    config = getattr(model, "config", None)
    config = getattr(config, "vision_config", config)
    told = (
        getattr(config, "image_size", None)
        or getattr(model, "image_size", None)
        or (getattr(model, "pretrained_cfg", None) or {}).get("input_size")
        or 224
    )
    return int(told if isinstance(told, int) else max(told))


# ------------------------------------------------------------------------------------------------ weights


def _with_weights(build: Callable[[int | None], nn.Module], path: str) -> nn.Module:
    """A network with as many classes as the weights have."""
    state, model = _read_state(Path(path)), build(None)
    found = state.get(f"{_classifier_name(model)}.weight")
    if found is not None and found.dim() and len(found) != _count(model):
        model = build(len(found))
    return _load_state(model, _renamed(model, state), path)


def _count(model: nn.Module) -> int | None:
    """How many classes it has, as networks of timm and transformers tell."""
    config = getattr(model, "config", None)
    told: int | None = getattr(model, "num_classes", None) or getattr(config, "num_labels", None)
    return told


def _renamed(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights by the names of the transformers installed, where its files keep those of another release."""
    load: Any = getattr(type(model), "from_pretrained", None)
    if load is None or state.keys() == model.state_dict().keys():
        return state
    try:
        loaded, told = load(None, config=model.config, state_dict=dict(state), output_loading_info=True)
    except Exception:  # noqa: BLE001  (shapes and names are compared afterwards)
        return state
    whole = not told["missing_keys"] and not told["unexpected_keys"]
    return dict(loaded.state_dict()) if whole else state


def _classifier_name(model: nn.Module) -> str:
    told = (getattr(model, "pretrained_cfg", None) or {}).get("classifier")
    if told:  # timm says so, also where the network has none yet
        return str(told if isinstance(told, str) else told[0])
    try:
        return find_classifier(model).name
    except ValueError:
        return ""


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Load a state dict of a file into the network; every name and shape must fit."""
    return _load_state(model, _read_state(Path(path)), path)


def _load_state(model: nn.Module, state: dict[str, Tensor], path: str | os.PathLike[str]) -> nn.Module:
    own = model.state_dict()
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
    if path.suffix not in {".pt", ".pth", ".npz", ".safetensors"}:
        raise UserError(f"{path}: expected weights in .safetensors, .pt, .pth or .npz")
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                content = {name: torch.from_numpy(archive[name]) for name in archive.files}
        elif path.suffix == ".safetensors":
            path.stat()  # says in plain words if it is not there
            content = import_extra("safetensors.torch", "--weights", "safetensors").load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, UserError):
        raise
    except Exception as error:
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: cannot read these weights without running code: {first_line}") from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{path}: expected a state dict (name -> tensor), got {type(content).__name__}")
    return content
