"""Training on noisy masks, and the losses of the networks that make them."""

from pseudolabel.losses.activation_aware_mask import (
    ActivationAwareMaskLoss,
    ActivationAwareMode,
    EmptySaliency,
    activation_aware_mask_loss,
    refine_saliency_target,
)
from pseudolabel.losses.affinity import affinity_loss
from pseudolabel.losses.balanced_mask_cross_entropy import (
    BalancedMaskCrossEntropy,
    balanced_mask_cross_entropy,
)
from pseudolabel.losses.equivariance import (
    EquivarianceLoss,
    EquivariantCrossLoss,
    equivariance_loss,
    equivariant_cross_loss,
)
from pseudolabel.losses.min_pooling import MinPoolingLoss, min_pooling_loss
from pseudolabel.losses.pixel_prototype_nce import PixelPrototypeNCE, pixel_prototype_nce
from pseudolabel.losses.pretended_under_fitting import (
    PretendedUnderFittingLoss,
    UnderFittingMode,
    pretended_under_fitting_loss,
)

__all__ = [
    "ActivationAwareMaskLoss",
    "ActivationAwareMode",
    "BalancedMaskCrossEntropy",
    "EmptySaliency",
    "EquivarianceLoss",
    "EquivariantCrossLoss",
    "MinPoolingLoss",
    "PixelPrototypeNCE",
    "PretendedUnderFittingLoss",
    "UnderFittingMode",
    "activation_aware_mask_loss",
    "affinity_loss",
    "balanced_mask_cross_entropy",
    "equivariance_loss",
    "equivariant_cross_loss",
    "min_pooling_loss",
    "pixel_prototype_nce",
    "pretended_under_fitting_loss",
    "refine_saliency_target",
]
