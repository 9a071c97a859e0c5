"""What every room does with maps: resize them, and run on the present classes only."""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "clamp_keeping_slope",
    "exact_dtype",
    "gather_present",
    "label_places",
    "place_labels",
    "present_classes",
    "resize",
    "scatter_present",
    "stretch",
    "stretched_mean",
    "working_dtype",
]


def working_dtype(value: Tensor) -> torch.dtype:
    """Float dtype to accumulate in: float32 for half precision, else the tensor's own."""
    return torch.float32 if value.dtype in (torch.float16, torch.bfloat16) else value.dtype


def exact_dtype(device: torch.device) -> torch.dtype:
    """Float dtype for long sums, of which float32 loses the last terms: float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def clamp_keeping_slope(x: Tensor, low: float | None = None, high: float | None = None) -> Tensor:
    """Clamp with a gradient of 1 from bound to bound, both included, and of 0 outside.

    Maps hold many zeros and ones, which are as good values as those between. `Tensor.clamp` has a gradient of
    1 at its bounds in some releases of PyTorch and of 0 in others: it is for what has no gradient, and for
    guards.
    """
    if low is not None:
        x = torch.where(x < low, low, x)
    return x if high is None else torch.where(x > high, high, x)


def resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize (B,C,h,w) maps to ``size`` (H,W), bilinear, ``align_corners=False``."""
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    if maps.shape[1] == 0:  # no class, which `interpolate` refuses
        return maps.new_zeros(*maps.shape[:2], *size)
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


def stretch(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize (B,C,h,w) maps to ``size`` (H,W) from corner to corner, bilinear, ``align_corners=True``."""
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    if maps.shape[1] == 0:  # no class, which `interpolate` refuses
        return maps.new_zeros(*maps.shape[:2], *size)
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=True)


def stretched_mean(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Mean (B,C) over the pixels of `stretch(maps, size)`, which is linear, without making them."""
    height, width = maps.shape[-2:]
    eye = torch.eye(max(height, width), dtype=maps.dtype, device=maps.device)[None, None]
    rows = stretch(eye[..., :height, :height], (size[0], height)).mean(2)[0, 0]
    columns = stretch(eye[..., :width, :width], (size[1], width)).mean(2)[0, 0]
    return torch.einsum("bcyx,y,x->bc", maps, rows, columns)


def present_classes(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the present classes of each image, padded to the largest count P of the batch.

    Returns ``index`` (B,P) int64, ascending within an image, and ``valid`` (B,P) bool, False on the padding.
    """
    present = labels != 0
    most = int(present.sum(1).max()) if present.numel() else 0
    index = torch.argsort(present.to(torch.int8), dim=1, descending=True, stable=True)[:, :most]
    return index, present.gather(1, index)


def gather_present(maps: Tensor, index: Tensor) -> Tensor:
    """Pick the class channels ``index`` (B,P) of (B,C,h,w) maps: (B,P,h,w)."""
    return maps.gather(1, index[:, :, None, None].expand(-1, -1, *maps.shape[-2:]))


def place_labels(index: Tensor) -> Tensor:
    """Labels (B,1+P) of the background and the places of `present_classes`: 0, then class c as c+1."""
    return F.pad(index + 1, (1, 0))


def label_places(mask: Tensor, index: Tensor) -> Tensor:
    """Turn a mask (B,H,W) of places, 0 background and p+1 place p, into one of classes."""
    return place_labels(index).gather(1, mask.flatten(1)).view_as(mask)


def scatter_present(values: Tensor, index: Tensor, valid: Tensor, num_channels: int) -> Tensor:
    """Put (B,P,h,w) values back to their class channels among zeros: (B,C,h,w)."""
    values = values.masked_fill(~valid[:, :, None, None], 0)
    full = values.new_zeros(values.shape[0], num_channels, *values.shape[-2:])
    return full.scatter(1, index[:, :, None, None].expand_as(values), values)
