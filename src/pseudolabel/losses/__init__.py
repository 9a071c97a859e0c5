"""Training on noisy masks, and the losses of the networks that make them."""

from pseudolabel.losses.affinity import affinity_loss
from pseudolabel.losses.equivariance import (
    EquivarianceLoss,
    EquivariantCrossLoss,
    equivariance_loss,
    equivariant_cross_loss,
)
from pseudolabel.losses.min_pooling import MinPoolingLoss, min_pooling_loss
from pseudolabel.losses.pretended_under_fitting import (
    PretendedUnderFittingLoss,
    UnderFittingMode,
    pretended_under_fitting_loss,
)

__all__ = [
    "EquivarianceLoss",
    "EquivariantCrossLoss",
    "MinPoolingLoss",
    "PretendedUnderFittingLoss",
    "UnderFittingMode",
    "affinity_loss",
    "equivariance_loss",
    "equivariant_cross_loss",
    "min_pooling_loss",
    "pretended_under_fitting_loss",
]
