"""What the extractors share: modes of a network, and its modules by name."""

from contextlib import ExitStack
from typing import Self

from torch import nn

__all__ = ["EvalMode", "find_module", "last_names"]


class EvalMode:
    """Eval mode inside `with`, which may be nested; afterwards each module has the mode that it had."""

    def __init__(self, model: nn.Module, active: bool = True) -> None:
        self.model = model
        self.active = active
        self._restore = ExitStack()
        self._depth = 0

    def __enter__(self) -> Self:
        if self._depth == 0 and self.active:
            for module in self.model.modules():
                self._restore.callback(setattr, module, "training", module.training)
            self.model.eval()
        self._depth += 1
        return self

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._restore.close()


def find_module(model: nn.Module, argument: str, wanted: str | nn.Module) -> nn.Module:
    """Look up a module by its name, or make sure that it belongs to the model."""
    if isinstance(wanted, str):
        modules: dict[str, nn.Module] = dict(model.named_modules())
        if wanted not in modules:
            raise ValueError(
                f"{argument}: expected the name of a module, got {wanted!r}; modules: {last_names(model)}"
            )
        return modules[wanted]
    if not any(module is wanted for module in model.modules()):
        raise ValueError(f"{argument}: expected a module of the model, got another {type(wanted).__name__}")
    return wanted


def last_names(model: nn.Module) -> list[str]:
    """Names of the last modules, which are the likely ones."""
    names = [name for name, _ in model.named_modules() if name]
    return names[-12:]
