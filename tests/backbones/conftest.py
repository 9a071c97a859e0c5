"""Libraries of architectures, where they are installed: `make test-backbones` installs them all.

Networks are built from their configurations with random weights; nothing is downloaded.
"""

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable
from types import ModuleType

import pytest
import torch

OPERATORS: list[torch.library.Library] = []  # operators live as long as their library is referred to


def _import(name: str) -> ModuleType:
    """Import a library without its warnings.

    torchvision beside a torch build that its compiled operators do not fit fails, because it cannot find
    them. No network here calls one, so they are declared, without a definition.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(name)
        except RuntimeError as error:
            if "torchvision::nms does not exist" not in str(error) or OPERATORS:
                raise
        for half in [module for module in sys.modules if module.split(".")[0] == "torchvision"]:
            del sys.modules[half]
        OPERATORS.append(torch.library.Library("torchvision", "FRAGMENT"))
        for operator in ("nms", "qnms"):
            OPERATORS[0].define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return importlib.import_module(name)


@pytest.fixture
def library() -> Callable[[str], ModuleType]:
    """Import an optional library, or skip."""

    def load(name: str) -> ModuleType:
        try:
            if importlib.util.find_spec("torchvision") is not None:  # which the others import
                _import("torchvision")
            return _import(name)
        except Exception as error:  # noqa: BLE001  (a broken one fails in its own ways)
            pytest.skip(f"{name} cannot be imported ({error}): run `make test-backbones`")

    return load
