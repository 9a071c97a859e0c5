"""From maps to label maps: 0 background, c+1 class c, 255 ignore."""

from pseudolabel.masks.background import constant_background, power_background
from pseudolabel.masks.choose_background import BackgroundChoice, choose_background
from pseudolabel.masks.proportional import (
    ProportionalPseudoMask,
    class_foreground,
    proportional_argmax,
    proportional_pseudo_mask,
)
from pseudolabel.masks.relabel import average_views, relabel, slide_logits
from pseudolabel.masks.thresholds import dual_threshold_mask, scores_to_mask

__all__ = [
    "BackgroundChoice",
    "ProportionalPseudoMask",
    "average_views",
    "choose_background",
    "class_foreground",
    "constant_background",
    "dual_threshold_mask",
    "power_background",
    "proportional_argmax",
    "proportional_pseudo_mask",
    "relabel",
    "scores_to_mask",
    "slide_logits",
]
