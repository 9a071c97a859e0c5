"""Training on noisy masks."""

from pseudolabel.losses.pretended_under_fitting import (
    PretendedUnderFittingLoss,
    UnderFittingMode,
    pretended_under_fitting_loss,
)

__all__ = [
    "PretendedUnderFittingLoss",
    "UnderFittingMode",
    "pretended_under_fitting_loss",
]
