"""From a classifier to class activation maps."""

from pseudolabel.cam.class_activation_map import CAM, class_activation_map
from pseudolabel.cam.normalize import NormalizationMethod, normalize_cam
from pseudolabel.cam.views import make_views, merge_views, multi_scale_cam

__all__ = [
    "CAM",
    "NormalizationMethod",
    "class_activation_map",
    "make_views",
    "merge_views",
    "multi_scale_cam",
    "normalize_cam",
]
