"""The public surface: names and signatures are promised, `tests/surface.json` is the inventory.

After an addition: `python tests/test_surface.py` writes the inventory anew; the diff is part of the review. A
name or argument that is gone, or whose default changed, is no addition: see docs/stability.md.
"""

import importlib
import inspect
import json
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pseudolabel

INVENTORY = Path(__file__).with_name("surface.json")
ROOMS = [name for name in pseudolabel.__all__ if name != "__version__"]
PUBLIC = [*ROOMS, "cli.ray"]  # what else is to be imported


def signature(value: object) -> str:
    """Signature without what not every run prints: places in memory, and `pathlib._local` of Python 3.13."""
    try:
        return re.sub(r" at 0x[0-9a-f]+|(?<=pathlib\.)_local\.", "", str(inspect.signature(value)))
    except ValueError:  # exceptions have that of a built-in
        return "(...)"


def describe(value: object) -> object:
    if inspect.isclass(value):
        members = {
            name: signature(member)
            for name, member in vars(value).items()
            if inspect.isfunction(member) and not name.startswith("_")
        }
        return {"": signature(value), **members}
    if callable(value) and not hasattr(value, "__args__"):
        return signature(value)
    return repr(value)


def surface() -> dict[str, dict[str, object]]:
    return {
        room: {name: describe(getattr(module, name)) for name in sorted(module.__all__)}
        for room in PUBLIC
        for module in [importlib.import_module(f"pseudolabel.{room}")]
    }


def test_inventory() -> None:
    recorded, now = json.loads(INVENTORY.read_text()), json.loads(json.dumps(surface()))
    for room, names in recorded.items():
        assert room in now, f"the room {room} is gone"
        for name, description in names.items():
            assert name in now[room], f"pseudolabel.{room}.{name} is gone: names public once are kept"
            assert now[room][name] == description, (
                f"pseudolabel.{room}.{name} changed; if only by additions: write the inventory anew"
            )
    assert now == recorded, "there are additions: write the inventory anew (see the top of this file)"


@pytest.mark.parametrize("room", PUBLIC)
def test_every_name_is_documented(room: str) -> None:
    module = importlib.import_module(f"pseudolabel.{room}")
    assert module.__doc__
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert value.__doc__, f"pseudolabel.{room}.{name} has no docstring"


def test_every_file_says_what_it_exports() -> None:
    for info in pkgutil.walk_packages(pseudolabel.__path__, "pseudolabel."):
        if info.name.endswith("__main__"):
            continue
        module = importlib.import_module(info.name)
        assert hasattr(module, "__all__"), f"{info.name} has no __all__"
        assert all(hasattr(module, name) for name in module.__all__)


def test_promised_names() -> None:
    """What the design promises of the rooms that exist."""
    promised = {
        "cam": "class_activation_map CAM normalize_cam make_views merge_views multi_scale_cam "
        "multi_crop_boxes multi_crop_cam class_conditional_response class_center_boxes infer_response_map "
        "ClassConditionalInference GradCAM GradCAMPlusPlus LayerCAM tokens_to_map",
        "refine": "coefficient_of_variation coefficient_of_variation_smoothing "
        "CoefficientOfVariationSmoothing dense_crf DenseCRF CRF_PRESETS pixel_correlation random_walk "
        "superpixel_refine merge_superpixels region_mean pamr par varm PAMR PAR VARM attention_affinity",
        "masks": "constant_background power_background scores_to_mask dual_threshold_mask "
        "proportional_pseudo_mask ProportionalPseudoMask choose_background relabel icd_seed trimap_from_cam "
        "trimap_from_mask TrimapBuilder alpha_to_mask vote_regions",
        "matting": "closed_form_matting large_kernel_matting knn_matting guided_filter_matting "
        "MattingRefiner",
        "heads": "IntraClassDiscriminator DoubleDecoupledCAM CrossRepresentationRefinement "
        "CrossTransformRegularization Compensator",
        "losses": "pretended_under_fitting_loss PretendedUnderFittingLoss min_pooling_loss equivariance_loss "
        "equivariant_cross_loss activation_aware_mask_loss ActivationAwareMaskLoss "
        "balanced_mask_cross_entropy pixel_prototype_nce",
        "metrics": "confusion_matrix iou_from_confusion PseudoLabelMetric background_sweep",
        "recipes": "pmm infercam icd matlabel rtc",
    }
    for room, names in promised.items():
        assert set(names.split()) <= set(importlib.import_module(f"pseudolabel.{room}").__all__)


def test_unknown_names() -> None:
    with pytest.raises(AttributeError, match="module 'pseudolabel' has no attribute 'nope'"):
        _ = pseudolabel.nope
    assert dir(pseudolabel) == sorted(pseudolabel.__all__)


def test_import_is_quiet_and_light() -> None:
    """Rooms load on first use, extras and slow libraries only when something needs them."""
    rooms = "; ".join(f"pseudolabel.{room}" for room in ROOMS)
    code = (
        "import sys, pseudolabel\n"
        "assert not [m for m in sys.modules if m.startswith('pseudolabel.')], 'rooms load on first use'\n"
        f"{rooms}\n"
        "heavy = {'skimage', 'matplotlib', 'pydensecrf', 'rich', 'scipy.ndimage', 'torchvision'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert not run.stdout
    assert not run.stderr


if __name__ == "__main__":
    INVENTORY.write_text(json.dumps(surface(), indent=1, sort_keys=True) + "\n")
    sys.stdout.write(f"{INVENTORY} written\n")
