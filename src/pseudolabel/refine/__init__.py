"""From maps to better maps. A refiner is a callable `(image, maps) -> maps`."""

from pseudolabel.refine.coefficient_of_variation import (
    CoefficientOfVariationSmoothing,
    coefficient_of_variation,
    coefficient_of_variation_smoothing,
)
from pseudolabel.refine.dense_crf import (
    CRF_PRESETS,
    CRFBackend,
    CRFSettings,
    DenseCRF,
    dense_crf,
    probs_from_mask,
)

__all__ = [
    "CRF_PRESETS",
    "CRFBackend",
    "CRFSettings",
    "CoefficientOfVariationSmoothing",
    "DenseCRF",
    "coefficient_of_variation",
    "coefficient_of_variation_smoothing",
    "dense_crf",
    "probs_from_mask",
]
