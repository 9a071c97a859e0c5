"""From a classifier to class activation maps."""

from pseudolabel.cam.class_activation_map import CAM, class_activation_map
from pseudolabel.cam.class_conditional import (
    ClassConditionalInference,
    ResponseMap,
    class_center_boxes,
    class_conditional_response,
    infer_response_map,
)
from pseudolabel.cam.multi_crop import crop_labels, multi_crop_boxes, multi_crop_cam
from pseudolabel.cam.normalize import NormalizationMethod, normalize_cam
from pseudolabel.cam.saliency import saliency_from_features
from pseudolabel.cam.views import make_views, merge_views, multi_scale_cam

__all__ = [
    "CAM",
    "ClassConditionalInference",
    "NormalizationMethod",
    "ResponseMap",
    "class_activation_map",
    "class_center_boxes",
    "class_conditional_response",
    "crop_labels",
    "infer_response_map",
    "make_views",
    "merge_views",
    "multi_crop_boxes",
    "multi_crop_cam",
    "multi_scale_cam",
    "normalize_cam",
    "saliency_from_features",
]
