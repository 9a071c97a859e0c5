"""Losses of maps look at the present classes."""

from torch import Tensor

from pseudolabel._checks import check_labels, check_shapes

__all__ = ["zero_absent"]


def zero_absent(maps: Tensor, labels: Tensor | None, name: str) -> Tensor:
    """Set (B,C,h,w) maps, an argument called ``name``, to 0 where a class is absent by (B,C) labels."""
    if labels is None:
        return maps
    check_shapes(**{name: (maps, "B C h w"), "labels": (labels, "B C")})
    if labels.device.type == "cpu":  # accelerators would have to be waited for
        check_labels(labels)
    return maps.where(labels[:, :, None, None] != 0, 0)
