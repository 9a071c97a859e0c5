"""What the extractors share: modes of a network, hooks on it, and its modules by name.

Networks are shared by threads, and so are their modes and hooks.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

__all__ = ["EvalMode", "find_module", "hook_here", "last_names"]

_lock = threading.RLock()  # reentrant, as what is collected meanwhile may leave an EvalMode
_users: WeakKeyDictionary[nn.Module, tuple[int, bool]] = WeakKeyDictionary()  # how many, the mode before them


class EvalMode:
    """Eval mode inside `with`; afterwards each module has the mode that it had.

    It may be nested, and entered for one network by several threads and extractors. Modules are in eval mode
    while anyone uses them: who leaves last gives them back the mode that the first one found.
    """

    def __init__(self, model: nn.Module, active: bool = True) -> None:
        self.model = model
        self.active = active
        self._held: list[nn.Module] = []
        self._depth = 0

    def __enter__(self) -> Self:
        with _lock:
            if self._depth == 0 and self.active:
                self._held = _hold(self.model)
            self._depth += 1
        return self

    def __exit__(self, *_: object) -> None:
        with _lock:
            self._depth -= 1
            if self._depth == 0:
                held, self._held = self._held, []
                _let_go(held)


def _hold(model: nn.Module) -> list[nn.Module]:
    """Put a network in eval mode, and count a user more of each of its modules."""
    modules = list(model.modules())  # counted one by one: extractors may be given a network and a part of it
    for module in modules:
        count, training = _users.get(module, (0, module.training))
        _users[module] = count + 1, training
    try:
        if any(module.training for module in modules):
            model.eval()
    except BaseException:  # of a network that has an `eval` or `train` of its own
        _let_go(modules)
        raise
    return modules


def _let_go(modules: list[nn.Module]) -> None:
    for module in modules:
        count, training = _users.pop(module)
        if count > 1:
            _users[module] = count - 1, training
        elif module.training != training:
            module.training = training


@contextmanager
def hook_here(
    register: Callable[[Callable[..., Any]], RemovableHandle], hook: Callable[..., Any]
) -> Iterator[None]:
    """Hook a module inside `with`, for what this thread runs: `hook_here(layer.register_forward_hook, see)`.

    Hooks belong to the module, and it calls all of them, whoever runs it.
    """
    thread = threading.get_ident()

    def here(*arguments: Any) -> Any:
        # While dynamo traces a network, it cannot be asked for its thread.
        if torch.compiler.is_dynamo_compiling() or threading.get_ident() == thread:
            return hook(*arguments)
        return None

    with _lock:  # PyTorch numbers hooks without one: of two with the same number the first would be lost
        handle = register(here)
    try:
        yield
    finally:
        handle.remove()


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
