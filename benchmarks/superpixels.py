"""Merging of superpixels against the plain way, and refinement against planes: CPU time of one thread.

    OMP_NUM_THREADS=1 python benchmarks/superpixels.py [--repeats 5]

Merging starts from regions of a 375 x 500 photo with features of 320 channels; the plain way looks through
the whole matrix of pairs for each merge. Refinement is that of 16 crops of 321 x 321, two of 20 classes in
each, at 41 x 41 cells, which fall on pixels, and at 40 x 40, which do not; the plain way makes a plane for
each region and resizes them all.

The two take turns, their results are compared, and a ratio is the median over paired runs.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from pseudolabel.refine import merge_superpixels, region_mean, superpixel_refine

HEIGHT, WIDTH, CHANNELS, TARGET = 375, 500, 320, 64
CROPS, CROP, REGIONS, CLASSES = 16, 321, 64, 20


def blocks(rows: int, columns: int, height: int, width: int) -> Tensor:
    """Regions in rows and columns."""
    y, x = torch.arange(height) * rows // height, torch.arange(width) * columns // width
    return y[:, None] * columns + x


def merge_plainly(superpixels: Tensor, features: Tensor, max_regions: int) -> Tensor:
    """All pairs, again and again."""
    pixels = torch.bincount(superpixels.flatten()).double()
    features, survivor = features.double().clone(), torch.arange(len(pixels))
    directions = F.normalize(features, dim=1)
    likeness = directions @ directions.T + 1 - (pixels[:, None] + pixels) / superpixels.numel()
    likeness = likeness.masked_fill(torch.ones_like(likeness).tril().bool(), -torch.inf)
    for _ in range(len(pixels) - max_regions):
        kept, gone = divmod(int(likeness.argmax()), len(pixels))
        survivor[survivor == gone] = kept
        both = pixels[kept] + pixels[gone]
        features[kept] = (pixels[kept] * features[kept] + pixels[gone] * features[gone]) / both
        directions[kept] = F.normalize(features[kept], dim=0)
        pixels[kept] = both
        row = directions @ directions[kept] + 1 - (pixels + both) / superpixels.numel()
        likeness[:kept, kept] = row[:kept].where(likeness[:kept, kept].isfinite(), -torch.inf)
        alive = likeness[kept, kept + 1 :].isfinite()
        likeness[kept, kept + 1 :] = row[kept + 1 :].where(alive, -torch.inf)
        likeness[gone] = likeness[:, gone] = -torch.inf
    return torch.unique(survivor, return_inverse=True)[1][superpixels]


def refine_by_planes(scores: Tensor, superpixels: Tensor, labels: Tensor) -> Tensor:
    """A plane for each region, resized to the cells."""
    planes = F.one_hot(superpixels).movedim(-1, 1).float()
    planes = F.interpolate(planes, size=scores.shape[2:], mode="bilinear", align_corners=True).flatten(2)
    part = (planes / planes.sum(2, keepdim=True).clamp(min=1e-5)).transpose(1, 2)
    f = (scores * labels[:, :, None, None]).flatten(2)
    vote = f.sign() @ planes.transpose(1, 2)
    share = f.clamp(min=0) / f.amax(1, keepdim=True).clamp(min=1e-5)
    winner = F.one_hot((share @ part).argmax(1), f.shape[1]).transpose(1, 2).bool()
    foreground = winner & (vote.amax(1, keepdim=True) > 1e-5) & (labels[:, :, None] > 0)
    value = torch.where(foreground, f.clamp(min=0) @ part, f.clamp(max=0) @ part)
    return (value @ planes).view_as(scores)


def seconds(work: Callable[[], Tensor]) -> tuple[float, Tensor]:
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def row(name: str, ours: Callable[[], Tensor], plain: Callable[[], Tensor], repeats: int) -> str:
    ours()
    pairs = []
    for _ in range(repeats):
        (one, result), (other, wanted) = seconds(ours), seconds(plain)
        torch.testing.assert_close(result, wanted, atol=1e-5, rtol=1e-4)
        pairs.append((one, other))
    middle = [statistics.median(times) for times in zip(*pairs, strict=True)]
    ratio = statistics.median(other / one for one, other in pairs)
    return f"| {name} | {1e3 * middle[0]:.0f} | {1e3 * middle[1]:.0f} | {ratio:.1f} |"


def table(repeats: int) -> Iterator[str]:
    yield "| work | CPU ms | plain way, CPU ms | times ours |"
    yield "|---|--:|--:|--:|"
    generator = torch.Generator().manual_seed(0)
    for rows, columns in ((12, 20), (25, 40), (40, 50)):
        ids = blocks(rows, columns, HEIGHT, WIDTH)
        network = torch.randn(1, CHANNELS, 24, 32, generator=generator).relu()
        network = F.avg_pool2d(network, 5, stride=1, padding=2)  # neighbours are alike
        features = region_mean(network, ids[None])[0]
        yield row(
            f"merge {rows * columns} regions to {TARGET}",
            lambda ids=ids, features=features: merge_superpixels(ids, features, TARGET),
            lambda ids=ids, features=features: merge_plainly(ids, features, TARGET),
            repeats,
        )
    ids = blocks(8, 8, CROP, CROP).expand(CROPS, -1, -1)
    labels = torch.zeros(CROPS, CLASSES)
    labels[:, :2] = 1
    for side in (41, 40):
        scores = torch.randn(CROPS, CLASSES, side, side, generator=generator)
        yield row(
            f"refine {CROPS} x {side} x {side} by {REGIONS} regions",
            lambda scores=scores: superpixel_refine(scores, ids, labels, num_regions=REGIONS),
            lambda scores=scores: refine_by_planes(scores, ids, labels),
            repeats,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="paired runs")
    torch.set_num_threads(1)
    with torch.inference_mode():
        print("\n".join(table(parser.parse_args().repeats)))


if __name__ == "__main__":
    main()
