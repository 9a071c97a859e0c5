"""The training loop of `pseudolabel train`, in which every step is a function of the settings and its number.

Order and augmentation of the data, dropout and learning rate all follow from (seed, step). So a checkpoint
needs no more than weights, optimiser, loss scaler and step, and a run that goes on from one is the run that
was never stopped.
"""

import io
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from pseudolabel.cli._console import UserError, differences, progress
from pseudolabel.io._atomic import write_atomically
from pseudolabel.io._files import MAX_BYTES, open_file
from pseudolabel.io._torch_file import read_torch_file

__all__ = ["Settings", "is_first", "num_processes", "random_view", "sum_over_processes", "train"]

Sample = Callable[[int, np.random.Generator], tuple[Tensor, Tensor]]
"""An example's number and random numbers -> input and target, of one shape each."""

Loss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Output and target of this process's part of a batch -> sum of the losses, and how many they are."""


@dataclass(frozen=True)
class Settings:
    """All that decides what a step does, but for the data, the network and the loss.

    Attributes:
        steps: Updates of the weights.
        batch_size: Examples a step, over all processes.
        optimizer: `sgd` (momentum 0.9) or `adamw`.
        lr: Learning rate at the start; it falls as `lr (1 - step / steps)^0.9`.
        weight_decay: Of the optimiser.
        seed: Of order, augmentation and dropout.
        amp: Mixed precision: `no`, `bf16`, or `fp16` with a loss scaler (CUDA).
        crop: Height and width of what the network sees.
        scales: The photo's longer side becomes between `scales[0]` and `scales[1]` times ``crop``.
        flip: Mirror every second photo, at random.
        mean: The network sees `(image - mean) / std`.
        std: See ``mean``.
    """

    steps: int
    batch_size: int = 16
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.01
    weight_decay: float = 5e-4
    seed: int = 0
    amp: Literal["no", "bf16", "fp16"] = "no"
    crop: int = 320
    scales: tuple[float, float] = (0.5, 2.0)
    flip: bool = True
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "crop", "lr"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a number > 0, got {getattr(self, name)!r}")
        for name in ("weight_decay", "seed"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: expected a number >= 0, got {getattr(self, name)!r}")
        if not 0 < self.scales[0] <= self.scales[1] < math.inf:
            raise ValueError(f"scales: expected two numbers > 0, the smaller first, got {self.scales!r}")
        if min(self.std) <= 0:
            raise ValueError(f"std: expected numbers > 0, got {self.std!r}")


def train(
    model: nn.Module,
    sample: Sample,
    count: int,
    loss: Loss,
    settings: Settings,
    *,
    out: str | os.PathLike[str] | None = None,
    about: Mapping[str, Any] | None = None,
    save_every: int = 200,
    workers: int = 2,
    show: bool = True,
) -> list[float]:
    """Train a network where it is, on `count` examples; go on from `out/checkpoint.pt` where there is one.

    Args:
        model: The network, on its device; trained in place. Parameters without `requires_grad` stay.
        sample: Makes an example, and nothing but its arguments decides which; called on threads.
        count: Number of examples.
        loss: See `Loss`. The sums and numbers of all processes together make the mean.
        settings: See `Settings`.
        out: Folder of `checkpoint.pt`, `log.jsonl` (a line a step) and, at the end, `weights.pt`.
        about: Plain values that, like the settings, have to be those of the checkpoint to go on from it.
        save_every: Steps between checkpoints.
        workers: Threads that make examples, one batch ahead.
        show: Show a progress bar.

    Returns:
        The loss of each step of this call.

    Raises:
        ValueError: If the checkpoint was made with other settings, or a loss is not finite.
        OSError: If the folder cannot be written.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise UserError("the network has no parameter that requires a gradient")
    if settings.batch_size < num_processes():
        raise UserError(
            f"a batch of {settings.batch_size} has no part for each of {num_processes()} processes"
        )
    device = parameters[0].device
    if settings.amp == "fp16" and device.type != "cuda":
        raise UserError(f"mixed precision fp16 needs a CUDA device, this is {device.type}; take bf16")

    optimizer = _optimizer(parameters, settings)
    scaler = torch.amp.GradScaler(device.type, enabled=settings.amp == "fp16")
    state = {"model": model, "optimizer": optimizer, "scaler": scaler}
    # As JSON has it: a checkpoint holds plain values alone, and tuples come back as lists.
    decisive = json.loads(json.dumps({**(about or {}), **asdict(settings)}))
    start = _resume(Path(out), state, decisive) if out is not None else 0
    if sum_over_processes(torch.tensor(start, device=device)) != start * num_processes():
        raise UserError(
            f"{out}: the processes find different checkpoints here; they have to share this folder"
        )
    network = nn.parallel.DistributedDataParallel(model) if num_processes() > 1 else model

    losses: list[float] = []
    model.train()
    with (
        _log(out, start) as log,
        _progress(settings.steps - start, show=show) as done,
        torch.random.fork_rng([device] if device.type == "cuda" else []),
    ):
        batches = _batches(sample, count, settings, start, workers)
        for step, (inputs, targets) in enumerate(batches, start):
            lr = settings.lr * (1 - step / settings.steps) ** 0.9
            for group in optimizer.param_groups:
                group["lr"] = lr
            torch.manual_seed(_seed(settings.seed, step, _rank()))  # for dropout and the like
            dtype = torch.float16 if settings.amp == "fp16" else torch.bfloat16
            with torch.autocast(device.type, dtype, enabled=settings.amp != "no"):
                outputs = network(inputs.to(device))
            total, number = loss(outputs, targets.to(device))
            mean = total / sum_over_processes(number).clamp(min=1)
            value = float(sum_over_processes(mean.detach()))
            if not math.isfinite(value):
                raise UserError(f"step {step + 1}: the loss is {value}; a lower learning rate may help")
            # Gradients are averaged over the processes; theirs have to be summed.
            scaler.scale(mean * num_processes()).backward()  # type: ignore[no-untyped-call]
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            losses.append(value)
            log({"step": step + 1, "loss": value, "lr": lr})
            if out is not None and ((step + 1) % save_every == 0 or step + 1 == settings.steps):
                _save(Path(out) / "checkpoint.pt", _checkpoint(state, step + 1, decisive))
            done()
    if out is not None:
        cpu = {name: value.cpu() for name, value in model.state_dict().items()}
        _save(Path(out) / "weights.pt", cpu)
    return losses


def random_view(
    image: Tensor, mask: Tensor | None, settings: Settings, random: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """An image and its mask, resized, mirrored and cropped at random.

    Args:
        image: Image (3,H,W) in [0, 1].
        mask: Mask (H,W), integer, or None.
        settings: `crop`, `scales`, `flip`, `mean`, `std` of them.
        random: Decides.

    Returns:
        Image (3,crop,crop) as the network wants it, and mask (crop,crop) int64. What lies outside of the
        photo is 0 in the one, its mean colour, and 255 in the other.
    """
    if mask is None:
        mask = image.new_zeros(image.shape[1:], dtype=torch.uint8)
    low, high = (math.log(scale) for scale in settings.scales)
    longer = settings.crop * math.exp(random.uniform(low, high))
    size = [max(1, round(side * longer / max(mask.shape))) for side in mask.shape]
    image = F.interpolate(image[None], size, mode="bilinear", align_corners=False, antialias=True)[0]
    mask = F.interpolate(mask[None, None].to(torch.uint8), size, mode="nearest-exact")[0, 0]
    mean, std = (image.new_tensor(values).view(3, 1, 1) for values in (settings.mean, settings.std))
    image = (image - mean) / std
    if random.random() < 0.5 and settings.flip:
        image, mask = image.flip(-1), mask.flip(-1)
    pad: list[int] = []
    for side in reversed(size):  # negative padding cuts off
        missing = settings.crop - side
        before = int(random.integers(abs(missing) + 1)) * (1 if missing > 0 else -1)
        pad += [before, missing - before]
    return F.pad(image, pad), F.pad(mask, pad, value=255).long()


# Which example comes when


def _batches(
    sample: Sample, count: int, settings: Settings, start: int, workers: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """This process's part of each batch from a step on, made on threads one batch ahead."""
    pool = ThreadPoolExecutor(workers)

    def make(position: int) -> tuple[Tensor, Tensor]:
        epoch, place = divmod(position, count)
        index = _order(settings.seed, epoch, count)[place]
        return sample(index, np.random.default_rng((settings.seed, epoch, 1 + index)))

    def begin(step: int) -> list[Future[tuple[Tensor, Tensor]]]:
        first = step * settings.batch_size
        mine = range(first + _rank(), first + settings.batch_size, num_processes())
        return [pool.submit(make, position) for position in mine]

    try:
        ahead = begin(start) if start < settings.steps else []
        for step in range(start, settings.steps):
            now, ahead = ahead, begin(step + 1) if step + 1 < settings.steps else []
            inputs, targets = zip(*(future.result() for future in now), strict=True)
            yield torch.stack(inputs), torch.stack(targets)
    finally:
        pool.shutdown(cancel_futures=True)


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, count: int) -> list[int]:
    """Order of the examples in an epoch."""
    # The 0 is no example's: those have 1 + index.
    return [int(index) for index in np.random.default_rng((seed, epoch, 0)).permutation(count)]


def _seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def _optimizer(parameters: list[nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    if settings.optimizer == "sgd":
        return torch.optim.SGD(parameters, settings.lr, momentum=0.9, weight_decay=settings.weight_decay)
    return torch.optim.AdamW(parameters, settings.lr, weight_decay=settings.weight_decay)


# Files, of the first process


def _checkpoint(state: Mapping[str, Any], step: int, decisive: Mapping[str, Any]) -> dict[str, Any]:
    return {name: part.state_dict() for name, part in state.items()} | {"step": step, "settings": decisive}


def _resume(out: Path, state: Mapping[str, Any], decisive: Mapping[str, Any]) -> int:
    """Bring everything to where the checkpoint is; the steps done by then, 0 without a checkpoint."""
    path = out / "checkpoint.pt"
    if not path.exists():
        return 0
    try:
        checkpoint = read_torch_file(path)
        before, step = dict(checkpoint["settings"]), int(checkpoint["step"])
    except OSError:
        raise
    except Exception as error:
        raise UserError(
            f"{path}: not a checkpoint of this program: {error or type(error).__name__}"
        ) from error
    if said := differences(before, decisive):
        raise UserError(f"{out}: holds a run with {said}; take another --out, or --overwrite")
    try:
        for name, part in state.items():
            part.load_state_dict(checkpoint[name])
    except Exception as error:  # the factory returns another network than it did
        raise UserError(f"{path}: does not fit the network: {str(error).splitlines()[0]}") from error
    return step


def _save(path: Path, content: Mapping[str, Any]) -> None:
    if is_first():
        buffer = io.BytesIO()
        torch.save(content, buffer)
        write_atomically(path, buffer.getvalue())


@contextmanager
def _log(out: str | os.PathLike[str] | None, start: int) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Append lines to `log.jsonl`, after those of the steps that the checkpoint has seen."""
    if out is None or not is_first():
        yield lambda _: None
        return
    path = Path(out) / "log.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = []
    for line in _lines_of(path) if start and path.exists() else []:
        try:
            if json.loads(line)["step"] > start:
                break
        except (ValueError, LookupError, TypeError, RecursionError):
            break  # the process died half-way through this line, or it is somebody else's
        kept.append(line)
    write_atomically(path, b"".join(kept))
    with path.open("a", encoding="utf-8", buffering=1) as file:  # a line is there once it is written
        yield lambda entry: print(json.dumps(entry), file=file)


def _lines_of(path: Path) -> list[bytes]:
    with open_file(path, max_bytes=MAX_BYTES) as file:
        return [line for line in file if line.endswith(b"\n")]


@contextmanager
def _progress(steps: int, *, show: bool) -> Iterator[Callable[[], None]]:
    if not show or not is_first():
        yield lambda: None
        return
    with progress("train", steps) as done:
        yield done


# Several processes


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def num_processes() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this is the process that writes and speaks."""
    return _rank() == 0


def sum_over_processes(value: Tensor) -> Tensor:
    """The sum of a tensor over all processes; no gradient flows through it."""
    if num_processes() == 1:
        return value
    value = value.detach().clone()
    dist.all_reduce(value)
    return value
