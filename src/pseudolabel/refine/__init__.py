"""From maps to better maps. A refiner is a callable `(image, maps) -> maps`."""

from pseudolabel.refine.attention_affinity import (
    AttentionAffinity,
    attention_affinity,
    box_mask,
    feature_affinity,
    propagate_affinity,
)
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
from pseudolabel.refine.pixel_adaptive import PAMR, PAR, VARM, dilated_neighbors, pamr, par, varm
from pseudolabel.refine.pixel_correlation import (
    PixelCorrelation,
    cam_seed,
    keep_max_class,
    pixel_correlation,
)
from pseudolabel.refine.random_walk import (
    RandomWalk,
    affinity_from_features,
    affinity_labels,
    affinity_offsets,
    random_walk,
)
from pseudolabel.refine.superpixels import (
    felzenszwalb_superpixels,
    merge_superpixels,
    region_mean,
    slic_superpixels,
    superpixel_refine,
)

__all__ = [
    "CRF_PRESETS",
    "PAMR",
    "PAR",
    "VARM",
    "AttentionAffinity",
    "CRFBackend",
    "CRFSettings",
    "CoefficientOfVariationSmoothing",
    "DenseCRF",
    "PixelCorrelation",
    "RandomWalk",
    "affinity_from_features",
    "affinity_labels",
    "affinity_offsets",
    "attention_affinity",
    "box_mask",
    "cam_seed",
    "coefficient_of_variation",
    "coefficient_of_variation_smoothing",
    "dense_crf",
    "dilated_neighbors",
    "feature_affinity",
    "felzenszwalb_superpixels",
    "keep_max_class",
    "merge_superpixels",
    "pamr",
    "par",
    "pixel_correlation",
    "probs_from_mask",
    "propagate_affinity",
    "random_walk",
    "region_mean",
    "slic_superpixels",
    "superpixel_refine",
    "varm",
]
