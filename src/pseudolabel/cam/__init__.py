"""From a classifier to class activation maps."""

from pseudolabel.cam.class_activation_map import CAM, class_activation_map
from pseudolabel.cam.multi_crop import crop_labels, multi_crop_boxes, multi_crop_cam
from pseudolabel.cam.normalize import NormalizationMethod, normalize_cam
from pseudolabel.cam.views import make_views, merge_views, multi_scale_cam

__all__ = [
    "CAM",
    "NormalizationMethod",
    "class_activation_map",
    "crop_labels",
    "make_views",
    "merge_views",
    "multi_crop_boxes",
    "multi_crop_cam",
    "multi_scale_cam",
    "normalize_cam",
]
