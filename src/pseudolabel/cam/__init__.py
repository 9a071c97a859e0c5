"""From a classifier to class activation maps."""

from pseudolabel.cam.attention import capture_attention, class_attention_map
from pseudolabel.cam.class_activation_map import CAM, class_activation_map
from pseudolabel.cam.class_conditional import (
    ClassConditionalInference,
    ResponseMap,
    class_center_boxes,
    class_conditional_response,
    infer_response_map,
)
from pseudolabel.cam.find_layers import FoundLayer, find_classifier, find_target_layer
from pseudolabel.cam.gradient_cam import (
    GradCAM,
    GradCAMPlusPlus,
    LayerCAM,
    grad_cam,
    grad_cam_plus_plus,
    layer_cam,
    present_softmax,
)
from pseudolabel.cam.multi_crop import crop_labels, multi_crop_boxes, multi_crop_cam
from pseudolabel.cam.normalize import NormalizationMethod, normalize_cam
from pseudolabel.cam.saliency import saliency_from_features
from pseudolabel.cam.tokens import (
    TopKPool,
    interpolate_position_embedding,
    patch_token_cam,
    tokens_to_map,
    top_k_pool,
)
from pseudolabel.cam.views import make_views, merge_views, multi_scale_cam

__all__ = [
    "CAM",
    "ClassConditionalInference",
    "FoundLayer",
    "GradCAM",
    "GradCAMPlusPlus",
    "LayerCAM",
    "NormalizationMethod",
    "ResponseMap",
    "TopKPool",
    "capture_attention",
    "class_activation_map",
    "class_attention_map",
    "class_center_boxes",
    "class_conditional_response",
    "crop_labels",
    "find_classifier",
    "find_target_layer",
    "grad_cam",
    "grad_cam_plus_plus",
    "infer_response_map",
    "interpolate_position_embedding",
    "layer_cam",
    "make_views",
    "merge_views",
    "multi_crop_boxes",
    "multi_crop_cam",
    "multi_scale_cam",
    "normalize_cam",
    "patch_token_cam",
    "present_softmax",
    "saliency_from_features",
    "tokens_to_map",
    "top_k_pool",
]
