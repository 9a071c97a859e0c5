"""From maps to label maps: 0 background, c+1 class c, 255 ignore."""

from pseudolabel.masks.alpha_to_mask import alpha_to_mask
from pseudolabel.masks.background import constant_background, power_background
from pseudolabel.masks.choose_background import BackgroundChoice, choose_background
from pseudolabel.masks.icd_seed import icd_seed
from pseudolabel.masks.proportional import (
    ProportionalPseudoMask,
    class_foreground,
    proportional_argmax,
    proportional_pseudo_mask,
)
from pseudolabel.masks.relabel import average_views, relabel, slide_logits
from pseudolabel.masks.segmentation_and_class import fuse_segmentation_and_class
from pseudolabel.masks.thresholds import DualThresholdMask, dual_threshold_mask, scores_to_mask
from pseudolabel.masks.trimap import (
    TRIMAP_PRESETS,
    TrimapAreas,
    TrimapBuilder,
    trimap_areas,
    trimap_from_cam,
    trimap_from_mask,
)
from pseudolabel.masks.vote_regions import VoteRegions, vote_regions, vote_superpixels

__all__ = [
    "TRIMAP_PRESETS",
    "BackgroundChoice",
    "DualThresholdMask",
    "ProportionalPseudoMask",
    "TrimapAreas",
    "TrimapBuilder",
    "VoteRegions",
    "alpha_to_mask",
    "average_views",
    "choose_background",
    "class_foreground",
    "constant_background",
    "dual_threshold_mask",
    "fuse_segmentation_and_class",
    "icd_seed",
    "power_background",
    "proportional_argmax",
    "proportional_pseudo_mask",
    "relabel",
    "scores_to_mask",
    "slide_logits",
    "trimap_areas",
    "trimap_from_cam",
    "trimap_from_mask",
    "vote_regions",
    "vote_superpixels",
]
