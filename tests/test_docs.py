"""The documentation is code: its Python blocks run, its tables and commands are checked."""

import importlib.util
import io
import re
import shlex
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

import pseudolabel as pl
from pseudolabel.cli import main

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
TEXTS = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
FENCE = re.compile(
    r"(?:<!-- not run: (?P<why>.+?) -->\n)?^```(?P<language>\w+)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
# Blocks of a page that do not run, each marked there by the reason. Every other block does.
NOT_RUN: dict[str, int] = {}


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(path: Path, *languages: str) -> list[re.Match[str]]:
    return [match for match in FENCE.finditer(path.read_text()) if match["language"] in languages]


def load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


WITH_PYTHON = [page for page in PAGES if blocks(page, "python")]


def test_blocks_are_found() -> None:
    """What the finder of blocks would miss in silence: other spellings, indentation, unknown marks."""
    assert {"README.md", "docs/index.md", "docs/masks.md"} <= set(map(name, WITH_PYTHON))
    for page in TEXTS:
        fences = re.findall(r"^ *(```.*)$", page.read_text(), re.MULTILINE)
        assert set(fences[::2]) <= {"```python", "```bash", "```"}, name(page)
        assert fences.count("```python") == len(blocks(page, "python")), name(page)
    marked = {name(page): sum(block["why"] is not None for block in blocks(page, "python")) for page in PAGES}
    assert {page: count for page, count in marked.items() if count} == NOT_RUN


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name)
def test_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page run in order in one namespace; `print(...)  # text` prints that text."""
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for block in blocks(page, "python"):
            if block["why"]:
                continue
            line = page.read_text().count("\n", 0, block.start("code"))
            code = "\n" * line + block["code"]  # tracebacks name the page's own line
            printed = io.StringIO()
            with redirect_stdout(printed):
                exec(compile(code, str(page), "exec"), namespace)
            claims = re.findall(r"^ *print\(.*\)  # (.+)$", block["code"], re.MULTILINE)
            if claims:
                assert printed.getvalue().splitlines() == claims


def test_readme_example_is_short() -> None:
    (example,) = blocks(ROOT / "README.md", "python")
    lines = [
        line
        for line in example["code"].splitlines()
        if line.strip() and not line.startswith(("import", "from"))
    ]
    assert len(lines) <= 15


def test_metrics_page_tells_the_figures() -> None:
    """The page names the figures of its loop in prose."""
    mask, truth = torch.tensor([[[0, 1, 255, 255]]]), torch.tensor([[[0, 1, 1, 0]]])
    found = []
    for meaning in ("background", "exclude", "wrong"):
        confusion = pl.metrics.confusion_matrix(mask, truth, num_classes=2, pred_ignore=meaning)
        found.append(round(pl.metrics.iou_from_confusion(confusion).nanmean().item(), 3))
    assert f"prints {found[0]}, {found[1]} and {found[2]}." in (ROOT / "docs/metrics.md").read_text()


@pytest.mark.parametrize("room", [name for name in pl.__all__ if name != "__version__"])
def test_reference_is_complete(room: str) -> None:
    """The page of a room documents each of its public names, and no other."""
    shown = re.findall(
        rf"^::: pseudolabel\.{room}\.(?:\w+\.)?(\w+)$", (ROOT / f"docs/{room}.md").read_text(), re.MULTILINE
    )
    assert sorted(shown) == sorted(getattr(pl, room).__all__)


# ------------------------------------------------------------------------------------------ precision


def cases(batch: int = 2) -> dict[str, tuple[Callable[[Tensor], Tensor], Tensor]]:
    """For each row of the table of docs/precision.md a call and its input, of two images or fewer."""
    generator = torch.Generator().manual_seed(0)
    image, cam = torch.rand(2, 2, 3, 8, 12, generator=generator)
    scores, labels = torch.rand(2, 4, 8, 12, generator=generator), torch.tensor([[1, 0, 1], [0, 1, 0]])
    truth = torch.randint(0, 4, (2, 8, 12), generator=generator)
    counts = torch.arange(1, 17).view(4, 4)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    tokens = torch.rand(2, 7, 4, generator=generator)
    attention = torch.rand(2, 2, 7, 7, generator=generator).softmax(-1)
    directions, present, embedding = cam[0, :, 0, :3], labels[0], tokens[0]
    image, cam, scores, labels, truth, tokens, attention = (
        value[:batch] for value in (image, cam, scores, labels, truth, tokens, attention)
    )
    attend = nn.Module()
    attend.forward = lambda x: nn.functional.scaled_dot_product_attention(*[x[:, None]] * 3)

    def capture(x: Tensor) -> Tensor:
        with pl.cam.capture_attention(attend, detach=False) as found:
            attend(x)
        return found[0]

    cam_room, refine, masks, losses, metrics = pl.cam, pl.refine, pl.masks, pl.losses, pl.metrics
    heads = pl.heads
    pooled = nn.functional.normalize(scores[:, :, 0, :3], dim=2)
    trimap = (cam * 3).floor() / 2
    matting_network = lambda x: SimpleNamespace(alphas=x[:, 3:])  # noqa: E731
    affinity = refine.affinity_from_features(image, 3)
    return {
        "cam.class_activation_map": (
            lambda x: cam_room.class_activation_map(x, torch.ones(5, 3, dtype=x.dtype)),
            cam,
        ),
        "cam.CAM": (lambda x: cam_room.CAM(network.to(x.dtype))(x), image),
        "cam.capture_attention": (capture, tokens),
        "cam.class_attention_map": (lambda x: cam_room.class_attention_map(x, (2, 3)), attention),
        "cam.tokens_to_map": (lambda x: cam_room.tokens_to_map(x, (2, 3)), tokens),
        "cam.interpolate_position_embedding": (
            lambda x: cam_room.interpolate_position_embedding(x, (2, 3), (4, 5)),
            embedding,
        ),
        "cam.patch_token_cam": (
            lambda x: cam_room.patch_token_cam(x, torch.ones(5, 4, dtype=x.dtype), grid=(2, 3)),
            tokens,
        ),
        "cam.top_k_pool": (lambda x: cam_room.top_k_pool(x, 3), cam),
        "cam.grad_cam": (lambda x: cam_room.grad_cam(x, x[:, None] - 0.5), cam),
        "cam.grad_cam_plus_plus": (lambda x: cam_room.grad_cam_plus_plus(x, x[:, None] - 0.5), cam),
        "cam.layer_cam": (lambda x: cam_room.layer_cam(x, x[:, None] - 0.5), cam),
        "cam.present_softmax": (lambda x: cam_room.present_softmax(x, labels), scores[:, :, 0, 0]),
        "cam.normalize_cam": (cam_room.normalize_cam, cam),
        "cam.make_views": (lambda x: torch.cat([view.flatten() for view in cam_room.make_views(x)]), image),
        "cam.merge_views": (lambda x: cam_room.merge_views([x, x], (16, 24)), cam),
        "cam.multi_scale_cam": (lambda x: cam_room.multi_scale_cam(lambda view: view, x), image),
        "cam.multi_crop_boxes": (
            lambda x: cam_room.multi_crop_boxes(tuple(x.shape), crop_size=4, stride=3),
            counts,
        ),
        "cam.multi_crop_cam": (
            lambda x: cam_room.multi_crop_cam(lambda crop: crop, x, scales=(1.0, 2.0), crop_size=8, stride=6),
            image,
        ),
        "cam.crop_labels": (lambda x: cam_room.crop_labels(x, torch.tensor([[0, 0, 8, 6]])), scores),
        "cam.class_center_boxes": (lambda x: cam_room.class_center_boxes(x, labels), cam),
        "cam.class_conditional_response": (
            lambda x: cam_room.class_conditional_response(lambda view: view, [x], labels, (8, 12)).response,
            image,
        ),
        "cam.infer_response_map": (
            lambda x: cam_room.infer_response_map(lambda view: view, x, labels).response,
            image,
        ),
        "cam.saliency_from_features": (cam_room.saliency_from_features, cam),
        "refine.coefficient_of_variation": (refine.coefficient_of_variation, cam),
        "refine.coefficient_of_variation_smoothing": (refine.coefficient_of_variation_smoothing, cam),
        "refine.dense_crf": (lambda x: refine.dense_crf(image.to(x.dtype), x), scores),
        "refine.probs_from_mask": (lambda x: refine.probs_from_mask(x, 4), truth),
        "refine.cam_seed": (refine.cam_seed, cam),
        "refine.keep_max_class": (refine.keep_max_class, scores),
        "refine.pixel_correlation": (lambda x: refine.pixel_correlation(x, image.to(x.dtype)), cam),
        "refine.attention_affinity": (refine.attention_affinity, attention),
        "refine.feature_affinity": (refine.feature_affinity, cam),
        "refine.propagate_affinity": (
            lambda x: refine.propagate_affinity(x, torch.ones(len(x), 96, 96, dtype=x.dtype) / 96),
            cam,
        ),
        "refine.box_mask": (refine.box_mask, cam),
        "refine.affinity_from_features": (lambda x: refine.affinity_from_features(x, 3), image),
        "refine.affinity_labels": (lambda x: refine.affinity_labels(x, 3), truth),
        "refine.random_walk": (lambda x: refine.random_walk(x, affinity.to(x.dtype), log_steps=1), scores),
        "refine.pamr": (lambda x: refine.pamr(image.to(x.dtype), x, [1, 2], 2), cam),
        "refine.par": (lambda x: refine.par(image.to(x.dtype), x, [1, 2], 2), cam),
        "refine.varm": (lambda x: refine.varm(image.to(x.dtype), x, [1, 2], 2), cam),
        "refine.dilated_neighbors": (refine.dilated_neighbors, cam),
        "refine.superpixel_refine": (
            lambda x: refine.superpixel_refine(x, truth, labels, num_regions=4),
            cam,
        ),
        "refine.region_mean": (lambda x: refine.region_mean(x, truth, num_regions=4), cam),
        "refine.merge_superpixels": (lambda x: refine.merge_superpixels(truth, x[:, :, 0], 2), scores),
        "refine.felzenszwalb_superpixels": (refine.felzenszwalb_superpixels, image),
        "refine.slic_superpixels": (refine.slic_superpixels, image),
        "masks.constant_background": (lambda x: masks.constant_background(x, 0.2), cam),
        "masks.power_background": (lambda x: masks.power_background(x, 4), cam),
        "masks.scores_to_mask": (masks.scores_to_mask, scores),
        "masks.fuse_segmentation_and_class": (
            lambda x: masks.fuse_segmentation_and_class(x, cam.to(x.dtype), (9, 13)),
            scores,
        ),
        "masks.dual_threshold_mask": (masks.dual_threshold_mask, cam),
        "masks.class_foreground": (lambda x: masks.class_foreground(image, x, crf=None), cam),
        "masks.proportional_argmax": (lambda x: masks.proportional_argmax(x, x > 0.3), cam),
        "masks.proportional_pseudo_mask": (
            lambda x: masks.proportional_pseudo_mask(image, x, labels, crf=None),
            cam,
        ),
        "masks.icd_seed": (lambda x: masks.icd_seed(x - 0.5, cam.to(x.dtype), labels), cam),
        "masks.trimap_from_cam": (lambda x: masks.trimap_from_cam(x, labels), cam),
        "masks.trimap_from_mask": (lambda x: masks.trimap_from_mask(x, 4, erode=1), truth),
        "masks.trimap_areas": (lambda x: masks.trimap_areas(x).foreground, cam),
        "masks.vote_regions": (lambda x: masks.vote_regions(x, image > 0.5), scores),
        "masks.vote_superpixels": (
            lambda x: masks.vote_superpixels(x, truth, num_regions=4),
            scores,
        ),
        "masks.alpha_to_mask": (masks.alpha_to_mask, cam),
        "masks.slide_logits": (lambda x: masks.slide_logits(lambda crop: crop, x, (6, 6), (4, 4)), image),
        "masks.average_views": (lambda x: masks.average_views([x, x.flip(-1)], tuple(x.shape[2:])), cam),
        "masks.relabel": (lambda x: masks.relabel(image, [x], flip=False, crf=None), cam),
        "matting.closed_form_matting": (
            lambda x: pl.matting.closed_form_matting(image, trimap.to(x.dtype), prior=x),
            cam,
        ),
        "matting.matting_energy": (lambda x: pl.matting.matting_energy(x, image), cam),
        "matting.random_walk_matting": (
            lambda x: pl.matting.random_walk_matting(x, trimap.to(x.dtype)),
            image,
        ),
        "matting.large_kernel_matting": (
            lambda x: pl.matting.large_kernel_matting(image, trimap.to(x.dtype), radius=2, prior=x),
            cam,
        ),
        "matting.guided_filter": (lambda x: pl.matting.guided_filter(image, x), cam),
        "matting.guided_filter_matting": (
            lambda x: pl.matting.guided_filter_matting(image, trimap.to(x.dtype), prior=x),
            cam,
        ),
        "matting.knn_matting": (
            lambda x: pl.matting.knn_matting(image, trimap.to(x.dtype), prior=x, max_iter=20),
            cam,
        ),
        # Without unknown pixels, so that nothing needs the package.
        "matting.pymatting_matting": (
            lambda x: pl.matting.pymatting_matting(image, (x > 0.5).to(x.dtype)),
            cam,
        ),
        "matting.vitmatte_matting": (lambda x: pl.matting.vitmatte_matting(image, x, matting_network), cam),
        "heads.icd_project": (lambda x: heads.icd_project(x, directions), image),
        "heads.icd_bottom_up_loss": (
            lambda x: heads.icd_bottom_up_loss(image.to(x.dtype), x, labels),
            directions,
        ),
        "heads.icd_side_statistics": (lambda x: heads.icd_side_statistics(x, x, labels)[0], cam - 0.5),
        "heads.icd_update_sides": (
            lambda x: heads.icd_update_sides(x, torch.ones(3, 2), torch.arange(3)),
            directions[:, :2],
        ),
        "heads.icd_orient": (lambda x: heads.icd_orient(x, directions[:, :2]), cam),
        "heads.icd_targets": (lambda x: heads.icd_targets(x)[0], cam - 0.5),
        "heads.icd_top_down_loss": (lambda x: heads.icd_top_down_loss(x, cam - 0.5, labels), cam),
        "heads.cross_representation_refine": (
            lambda x: heads.cross_representation_refine(x, [image.to(x.dtype)] * 2),
            scores,
        ),
        "heads.confidence_scores": (heads.confidence_scores, scores),
        "heads.assign_pseudo_labels": (lambda x: heads.assign_pseudo_labels(x, labels), scores),
        "heads.topk_pixels": (lambda x: heads.topk_pixels(x).values, scores),
        "heads.prototypes_from_topk": (lambda x: heads.prototypes_from_topk(x, heads.topk_pixels(x)), scores),
        "heads.cross_transform_contrast": (
            lambda x: sum(
                heads.cross_transform_contrast(x, x, truth % 3, truth % 3, directions, directions).values()
            ),
            image,
        ),
        "heads.prototype_separation": (
            lambda x: heads.prototype_separation(x, x.flip(0), present),
            directions,
        ),
        "heads.compensate": (
            lambda x: heads.compensate(x, x, heads.topk_pixels(x), torch.ones(4)),
            scores,
        ),
        "heads.compensation_loss": (
            lambda x: heads.compensation_loss(x, scores.to(x.dtype), labels),
            cam,
        ),
        "heads.d2cam_logits": (lambda x: heads.d2cam_logits(x, directions, directions), image),
        "heads.d2cam_posterior": (lambda x: heads.d2cam_posterior(x, labels), scores),
        "heads.d2cam_pool": (lambda x: heads.d2cam_pool(x, scores.to(x.dtype)), image),
        "heads.d2cam_category_loss": (
            lambda x: heads.d2cam_category_loss(pooled.to(x.dtype), x, labels),
            directions,
        ),
        "heads.d2cam_foreground_background_loss": (
            lambda x: heads.d2cam_foreground_background_loss(pooled.to(x.dtype), x, x, labels),
            directions,
        ),
        "heads.d2cam_contrast_loss": (lambda x: heads.d2cam_contrast_loss(x, labels), pooled[:, :2]),
        "heads.d2cam_triplet_loss": (
            lambda x: heads.d2cam_triplet_loss(x, scores.to(x.dtype), directions, labels),
            image,
        ),
        "heads.d2cam_anchor_loss": (lambda x: heads.d2cam_anchor_loss(x, truth * 0, labels), scores),
        "heads.d2cam_exclusivity_loss": (lambda x: heads.d2cam_exclusivity_loss(x, labels), scores),
        "losses.pretended_under_fitting_loss": (
            lambda x: losses.pretended_under_fitting_loss(x, truth),
            scores,
        ),
        "losses.balanced_mask_cross_entropy": (
            lambda x: losses.balanced_mask_cross_entropy(x, truth, labels),
            scores,
        ),
        "losses.activation_aware_mask_loss": (
            lambda x: losses.activation_aware_mask_loss(x, image[:, 0], cam, labels),
            scores,
        ),
        "losses.refine_saliency_target": (
            lambda x: losses.refine_saliency_target(x, cam, labels, mode="soft")[1],
            image[:, 0],
        ),
        "losses.equivariance_loss": (
            lambda x: losses.equivariance_loss(x, cam.to(x.dtype).sqrt(), labels),
            cam,
        ),
        "losses.equivariant_cross_loss": (
            lambda x: losses.equivariant_cross_loss(cam.to(x.dtype), x, labels),
            scores,
        ),
        "losses.min_pooling_loss": (lambda x: losses.min_pooling_loss(x, labels), cam),
        "losses.pixel_prototype_nce": (
            lambda x: losses.pixel_prototype_nce(x, truth.clamp(max=2), directions),
            image,
        ),
        "losses.affinity_loss": (
            lambda x: losses.affinity_loss(x, refine.affinity_labels(truth, 2)),
            affinity[:, :4],
        ),
        "metrics.confusion_matrix": (lambda x: metrics.confusion_matrix(x, truth, 4), truth),
        "metrics.background_sweep": (lambda x: metrics.background_sweep(x, truth, [0.1, 0.2]), cam),
        "metrics.boundary_counts": (lambda x: metrics.boundary_counts(x, truth, 4), truth),
        "metrics.iou_from_confusion": (metrics.iou_from_confusion, counts),
        "metrics.over_under_segmentation": (lambda x: metrics.over_under_segmentation(x)[0], counts),
        "metrics.boundary_f_from_counts": (metrics.boundary_f_from_counts, counts),
        "recipes.icd": (lambda x: pl.recipes.icd(image, x, cam, labels, crf=None), cam - 0.5),
        "recipes.infercam": (lambda x: pl.recipes.infercam(x, lambda view: view, labels), image),
        "recipes.rtc": (
            lambda x: pl.recipes.rtc(x, lambda view: (view[:, 1:], view), crf=None),
            image,
        ),
        "recipes.matlabel": (
            lambda x: pl.recipes.matlabel(
                image, x, labels, refine=None, matting=lambda _, trimap, __: trimap
            ),
            scores / scores.sum(1, keepdim=True),
        ),
        "recipes.pmm": (lambda x: pl.recipes.pmm(image, x, labels, crf=None), cam),
    }


ROWS = {
    row[0].strip("`"): row[1:]
    for row in re.findall(
        r"^\| (`\w+\.\w+`) \| (.+?) \| (.+?) \| (.+?) \|$",
        (ROOT / "docs/precision.md").read_text(),
        re.MULTILINE,
    )
}
FLOATS = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}


def test_precision_table_is_complete() -> None:
    functions = {
        f"{room}.{name}"
        for room in ("cam", "refine", "masks", "matting", "heads", "losses", "metrics", "recipes")
        for name in getattr(pl, room).__all__
        if callable(value := getattr(getattr(pl, room), name)) and type(value).__name__ == "function"
    }
    no_tensor = {
        "cam.find_classifier",
        "cam.find_target_layer",
        "masks.choose_background",
        "refine.affinity_offsets",
        "heads.d2cam_anchor_weight",
        "heads.icd_warmup",
    }
    assert set(ROWS) == set(cases()) == functions - no_tensor | {"cam.CAM"}


@pytest.mark.parametrize("function", ROWS)
def test_precision_table(function: str) -> None:
    """Each cell of the table says what happens, "no" included."""
    out, gradient, one_graph = ROWS[function]
    call, value = cases()[function]
    if "from integers" in out:
        assert f"{str(call(value).dtype).removeprefix('torch.')}, from integers" == out
    else:
        found = [str(call(value.to(dtype)).dtype).removeprefix("torch.") for dtype in FLOATS.values()]
        same = found == list(FLOATS)
        told = "same" if same else found[0] if len(set(found)) == 1 else " / ".join(found)
        assert told == out
        assert gradient == ("yes" if call(value.clone().requires_grad_()).requires_grad else "no")
    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend="eager")
    try:
        assert torch.equal(compiled(value), call(value))
        compiles = "yes"
    except (torch._dynamo.exc.TorchDynamoException, GuardOnDataDependentSymNode):
        compiles = "no"
    recent = "yes" if torch.__version__ >= (2, 10) else "no"
    assert compiles == {"from 2.10": recent}.get(one_graph, one_graph)


# What cannot do without an image says so: no maps tell the classes, or no pixels can be chosen.
ONE_IMAGE_AT_LEAST = {
    "cam.multi_crop_cam": "image: ",
    "masks.slide_logits": "image: ",
    "heads.topk_pixels": "k: ",
    "heads.prototypes_from_topk": "k: ",
    "heads.compensate": "k: ",
}


@pytest.mark.parametrize("function", ROWS)
def test_empty_batch(function: str) -> None:
    """No image: a result of the dtype and the shape that one and two images lead to."""
    if function in ONE_IMAGE_AT_LEAST:
        call, value = cases(0)[function]
        with pytest.raises(ValueError, match=ONE_IMAGE_AT_LEAST[function]):
            call(value)
        return
    none, one, two = (call(value) for call, value in (cases(batch)[function] for batch in range(3)))
    assert none.dtype == two.dtype
    assert none.shape == tuple(
        2 * of_one - of_two for of_one, of_two in zip(one.shape, two.shape, strict=True)
    )
    assert none.isfinite().all()
    if ROWS[function][1] == "yes" and not function.endswith("_matting"):  # no system, so no graph
        call, value = cases(0)[function]
        call(value.clone().requires_grad_()).sum().backward()


@pytest.mark.parametrize("function", [function for function in ROWS if ROWS[function][1] == "yes"])
def test_gradient_at_bounds(function: str, flat_clamp: Callable) -> None:
    """Maps of many zeros and ones have one gradient, whatever that of `Tensor.clamp` is at its bounds."""
    call, value = cases()[function]
    value = (value * 2).round() / 2

    def gradient() -> Tensor:
        x = value.clone().requires_grad_()
        return torch.autograd.grad(call(x).sum(), x, materialize_grads=True)[0]

    as_installed = gradient()
    assert as_installed.isfinite().all()
    with flat_clamp():
        torch.testing.assert_close(gradient(), as_installed)


# ------------------------------------------------------------------------------------ commands, links, files


def commands() -> list[tuple[str, list[str]]]:
    lines = [
        (name(page), shlex.split(line, comments=True))
        for page in TEXTS
        for block in blocks(page, "bash")
        for line in block["code"].replace("\\\n", " ").splitlines()
    ]
    return [(page, words) for page, words in lines if words]


def test_commands_exist(capsys: pytest.CaptureFixture[str]) -> None:
    """Options of `pseudolabel` are in its help, targets of make in the Makefile, scripts in the tree."""
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    seen = set()
    for page, words in commands():
        program, *rest = words
        seen.add(program)
        if program == "pseudolabel":
            assert main([rest[0], "--help"]) == 0
            known = capsys.readouterr().out
            for word in rest[1:]:
                assert not word.startswith("--") or re.search(rf"{word}\b", known), (
                    f"{page}: {' '.join(words)}"
                )
        elif program == "make":
            assert rest[0] in targets, f"{page}: {' '.join(words)}"
        elif program in {"python", ".ci/run"}:
            script = rest[0] if program == "python" else program
            assert (ROOT / script).is_file(), f"{page}: {' '.join(words)}"
        else:
            assert program == "pip", f"{page}: {' '.join(words)}"
    assert {"pseudolabel", "make", "python", "pip"} <= seen


@pytest.mark.parametrize("page", TEXTS, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        assert "://" in target or (page.parent / target).is_file(), f"{name(page)}: {target}"


def test_nothing_names_this_machine() -> None:
    for path in [*TEXTS, ROOT / "mkdocs.yml", ROOT / "CITATION.cff", *(ROOT / "examples").glob("*.py")]:
        assert not re.search(r"(?<![\w.])/(work|root|tmp|home)/", path.read_text()), name(path)


def test_gallery_pictures() -> None:
    """Each picture of the script is shown, and they are small."""
    script = (ROOT / "docs/gallery/make_gallery.py").read_text()
    made = set(re.findall(r'^    "(\w+)": \w+,$', script, re.MULTILINE))
    shown = set(re.findall(r"!\[.+\]\((\w+)\.png\)", (ROOT / "docs/gallery/index.md").read_text()))
    sizes = {path.stem: path.stat().st_size for path in (ROOT / "docs/gallery").glob("*.png")}
    assert made == shown == set(sizes)
    assert max(sizes.values()) < 150 * 1024
    assert sum(sizes.values()) < 1024 * 1024


def test_gallery_script(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: the gallery script is not run")
    script = load(ROOT / "docs/gallery/make_gallery.py")
    script.save(script.background(), tmp_path / "background.png")
    assert (tmp_path / "background.png").stat().st_size > 10_000


def test_versions_agree() -> None:
    assert f"\nversion: {pl.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {pl.__version__} - " in (ROOT / "CHANGELOG.md").read_text()


# ------------------------------------------------------------------------------------------ examples


def test_custom_loop() -> None:
    assert load(ROOT / "examples/custom_loop.py").main(["--steps", "40", "--images", "32"]) > 0.4


def test_swap_generator() -> None:
    example = load(ROOT / "examples/swap_generator.py")
    masks = example.main(height=48)
    assert masks.keys() == example.GENERATORS.keys()
    assert all(mask.shape == (1, 48, 72) and mask.dtype == torch.int64 for mask in masks.values())
    assert 255 in masks["double threshold"]
    assert not torch.equal(masks["my own"], masks["proportional, no CRF"])
