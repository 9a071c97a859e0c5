"""From an image and a trimap to mattes."""

from pseudolabel.matting._system import MattingReport
from pseudolabel.matting.closed_form import closed_form_matting, matting_energy
from pseudolabel.matting.guided_filter import guided_filter, guided_filter_matting
from pseudolabel.matting.knn import knn_matting
from pseudolabel.matting.large_kernel import large_kernel_matting
from pseudolabel.matting.pymatting_matting import PymattingSolver, pymatting_matting
from pseudolabel.matting.random_walk import random_walk_matting
from pseudolabel.matting.refiner import MattingMethod, MattingRefiner
from pseudolabel.matting.vitmatte import ViTMatte, vitmatte_matting

__all__ = [
    "MattingMethod",
    "MattingRefiner",
    "MattingReport",
    "PymattingSolver",
    "ViTMatte",
    "closed_form_matting",
    "guided_filter",
    "guided_filter_matting",
    "knn_matting",
    "large_kernel_matting",
    "matting_energy",
    "pymatting_matting",
    "random_walk_matting",
    "vitmatte_matting",
]
