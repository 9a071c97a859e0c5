"""The network that `--model` names: one's own, or one of transformers or timm; and the weights of a file."""

import importlib
import os
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pseudolabel.cam import find_classifier
from pseudolabel.cli._console import UserError, import_extra
from pseudolabel.io._files import check_archive, open_file
from pseudolabel.io._quote import quote
from pseudolabel.io._torch_file import read_torch_file

__all__ = ["Classifier", "class_places", "load_classifier", "load_model", "load_weights"]

MAX_SIDE = 4096  # of the image that a network is tried with
SPARE_BYTES = 1 << 28  # of an archive of weights, for a head of more classes than the model's


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
    if library in {"hf", "timm"} and rest:
        found = (_of_transformers if library == "hf" else _of_timm)(rest, weights)
        broken = [each for each, values in found.model.named_parameters() if not values.isfinite().all()]
        if broken:
            raise UserError(f"--model: {name} has parameters that are not finite: {', '.join(broken[:3])}")
        return found
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
    """The network that `module:function` returns; the current folder is searched, too, after all else.

    A folder of photos may hold whatever its author wants: in front, its `scipy.py` would run in the place of
    the package. (`python -m` puts the folder in front itself.)
    """
    module_name, _, function_name = factory.partition(":")
    if not module_name or not function_name:
        raise UserError(f"--model: expected module:function, got {factory!r}")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise UserError(f"--model: cannot import {module_name!r}: {type(error).__name__}: {error}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        found = getattr(module, "__file__", None) or "built in"
        raise UserError(f"--model: {module_name!r} ({found}) has no function {function_name!r}")
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
    if (told := _told_size(config)) is not None:
        _checked_side(told)  # a network may be as large as its images
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
    told = _told_size(getattr(model, "config", None))
    if told is None:
        told = getattr(model, "image_size", None)
    if told is None:
        told = (getattr(model, "pretrained_cfg", None) or {}).get("input_size") or 224
        told = told[-2:] if isinstance(told, list | tuple) else told  # timm: channels, height, width
    return _checked_side(told)


def _told_size(config: Any) -> Any:
    return getattr(getattr(config, "vision_config", config), "image_size", None)


def _checked_side(told: Any) -> int:
    """The longer side of an image size, if an image so large can be tried."""
    sides: Sequence[Any] = told if isinstance(told, list | tuple) and told else [told]
    if not all(type(side) is int and 1 <= side <= MAX_SIDE for side in sides):
        raise UserError(f"--model: expected an image_size of 1 to {MAX_SIDE} pixels, got {quote(told)}")
    return int(max(sides))


# ------------------------------------------------------------------------------------------------ weights


def _with_weights(build: Callable[[int | None], nn.Module], path: str) -> nn.Module:
    """A network with as many classes as the weights have."""
    model = build(None)
    state = _read_state(Path(path), model)
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
    """Load a state dict of a file into the network; every name, shape and kind of numbers must fit."""
    return _load_state(model, _read_state(Path(path), model), path)


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
    said = [
        f"{what} {len(names)}: {', '.join(name[:200] for name in names[:3])}"
        for what, names in problems
        if names
    ]
    if said:
        raise UserError(f"{path}: does not fit the model; it {'; it '.join(said)}")
    for name, value in state.items():
        if why := _misfit(value, own[name]):
            raise UserError(f"{path}: cannot be used: {name} {why}")
    try:
        model.load_state_dict(state)
    except Exception as error:  # a network may load its weights in ways of its own
        raise UserError(f"{path}: does not fit the model: {_first_line(error)}") from error
    return model


def _misfit(value: Tensor, own: Tensor) -> str | None:
    """Why a tensor of its shape cannot take the place of the model's own."""
    if (value.is_floating_point(), value.is_complex()) != (own.is_floating_point(), own.is_complex()):
        return f"is of {value.dtype}, the model's own of {own.dtype}"
    odd = ~value.to(own.dtype).isfinite()
    if odd.any() and not torch.equal(value[odd], own.cpu()[odd].to(value.dtype)):  # such as a mask of -inf
        return f"has values that are not finite in {own.dtype}"
    return None


def _read_state(path: Path, model: nn.Module) -> dict[str, Tensor]:
    """State dict of a file of weights for this model."""
    content: Any
    if path.suffix not in {".pt", ".pth", ".npz", ".safetensors"}:
        raise UserError(f"{path}: expected weights in .safetensors, .pt, .pth or .npz")
    try:
        if path.suffix == ".npz":
            content = _read_npz(path, model)
        elif path.suffix == ".safetensors":
            open_file(path).close()  # says in plain words if it is none
            content = import_extra("safetensors.torch", "--weights", "safetensors").load_file(path)
        else:
            content = read_torch_file(path)
    except (OSError, UserError):
        raise
    except Exception as error:
        said = _first_line(error).removeprefix(f"{path}: ")
        raise UserError(f"{path}: cannot read these weights without running code: {said}") from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a state dict (name -> tensor), got {type(content).__name__}")
    for name, value in content.items():
        if not isinstance(name, str):
            raise UserError(f"{path}: expected a state dict (name -> tensor), got the name {quote(name)}")
        if not isinstance(value, Tensor) or _is_odd(value):
            raise UserError(
                f"{path}: {name[:200]}: expected a dense tensor with values, got {_kind_of(value)}"
            )
    return content


def _is_odd(value: Tensor) -> bool:
    return value.layout != torch.strided or value.is_quantized or value.is_nested or value.is_meta


def _kind_of(value: object) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"one of layout {value.layout} and {value.dtype} on {value.device}"


def _read_npz(path: Path, model: nn.Module) -> dict[str, Tensor]:
    """Arrays of an archive, which may be compressed: it has to unpack to what such a model can take."""
    most = sum(16 * value.numel() for value in model.state_dict().values()) + SPARE_BYTES
    with open_file(path) as file:
        with zipfile.ZipFile(file) as archive:
            check_archive(archive, most, "the model can take")
        file.seek(0)
        with np.load(file, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:500]
