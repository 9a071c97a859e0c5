"""Pixel-adaptive refinement against its plain way: time on one thread, peak memory, agreement.

    OMP_NUM_THREADS=1 python benchmarks/pixel_adaptive.py [--repeats 3]

The plain way writes the formulas down with the stack of all 48 shifted copies, of the image and, in each of
the ten passes, of the maps. Times are CPU seconds of one thread; the two sides take turns in one process and
a ratio is the median over these pairs. A peak is what the memory of a fresh process grows to beyond what was
there before (Linux).
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from pseudolabel.refine import dilated_neighbors, pamr, par, varm

SIZES = {"448 x 448, halved": (224, 224), "375 x 500": (375, 500)}
MAPS = (3, 21)
DILATIONS = (1, 2, 4, 8, 12, 24)
ITERATIONS = 10
MIB = 2**20


def example(size: tuple[int, int], maps: int) -> tuple[Tensor, Tensor]:
    """A smooth image with noise, and smooth maps."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3 + maps, 12, 16, generator=generator)
    fields = F.interpolate(coarse, size, mode="bicubic").clamp(0, 1)
    noise = 0.05 * torch.rand(1, 3, *size, generator=generator)
    return (0.95 * fields[:, :3] + noise).contiguous(), fields[:, 3:].contiguous()


def plain_passes(maps: Tensor, weights: Tensor) -> Tensor:
    for _ in range(ITERATIONS):
        maps = (weights * dilated_neighbors(maps, DILATIONS)).sum(2)
    return maps


def plain_pamr(image: Tensor, maps: Tensor) -> Tensor:
    sigma = dilated_neighbors(image, DILATIONS, include_center=True).std(2, keepdim=True)
    difference = (dilated_neighbors(image, DILATIONS) - image[:, :, None]).abs()
    logits = -(difference / (1e-8 + 0.1 * sigma)).mean(1, keepdim=True)
    return plain_passes(maps, logits.softmax(2))


def plain_par(image: Tensor, maps: Tensor) -> Tensor:
    near = dilated_neighbors(image, DILATIONS)
    difference = (near - image[:, :, None]).abs()
    logits = -((difference / (near.std(2, keepdim=True) + 1e-8) / 0.3) ** 2).mean(1, keepdim=True)
    steps = torch.tensor([2**0.5, 1, 2**0.5, 1, 1, 2**0.5, 1, 2**0.5])
    rho = torch.cat([d * steps for d in DILATIONS]).view(1, 1, -1, 1, 1)
    place = -((rho / (rho.std() + 1e-8) / 0.3) ** 2)
    return plain_passes(maps, logits.softmax(2) + 0.01 * place.softmax(2))


def plain_varm(image: Tensor, maps: Tensor) -> Tensor:
    near = dilated_neighbors(image, DILATIONS)
    difference = (near - image[:, :, None]).abs()
    logits = -((4 * difference / (near.std(2, keepdim=True) + 1e-8)) ** 2).mean(1, keepdim=True)
    below = F.pad(near[..., :-1, :] - near[..., 1:, :], (0, 0, 0, 1))
    right = F.pad(near[..., :-1] - near[..., 1:], (0, 1))
    rough = (below**2 + right**2).mean(1, keepdim=True)
    return plain_passes(maps, logits.softmax(2) - 0.01 * rough.softmax(2))


Refine = Callable[[Tensor, Tensor], Tensor]
WAYS: dict[str, tuple[Refine, Refine]] = {
    "pamr": (pamr, plain_pamr),
    "par": (par, plain_par),
    "varm": (varm, plain_varm),
}


def timed(refine: Refine, image: Tensor, maps: Tensor) -> tuple[float, Tensor]:
    start = time.process_time()
    refined = refine(image, maps)
    return time.process_time() - start, refined


def memory(name: str) -> int:
    """A figure of this process's memory in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")


def peak_here(name: str, side: int, size: tuple[int, int], maps: int) -> int:
    """What one refinement adds to the memory of this process, at most."""
    refine = WAYS[name][side]
    refine(*example((32, 32), 2))  # the first calls load what they need
    image, cam = example(size, maps)
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    refine(image, cam)
    return memory("VmHWM") - before


def peak(name: str, side: int, size: tuple[int, int], maps: int) -> int:
    """The same in a fresh process."""
    words = [sys.executable, __file__, "--peak", name, *map(str, (side, *size, maps))]
    return int(subprocess.run(words, check=True, capture_output=True, text=True).stdout)


def table(names: Sequence[str], repeats: int) -> str:
    lines = [
        "| refiner | image | maps | this library | plain | times faster | peak | peak plain | times less |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name in names:
        for shown, size in SIZES.items():
            for maps in MAPS:
                image, cam = example(size, maps)
                pairs = []
                for _ in range(repeats):
                    ours, plain = (timed(refine, image, cam) for refine in WAYS[name])
                    assert (ours[1] - plain[1]).abs().max() < 1e-4, f"{name}, {shown}: results differ"
                    pairs.append((ours[0], plain[0]))
                seconds = [statistics.median(side) for side in zip(*pairs, strict=True)]
                faster = statistics.median(plain / ours for ours, plain in pairs)
                grown = [peak(name, side, size, maps) / MIB for side in (0, 1)]
                lines.append(
                    f"| `{name}` | {shown} | {maps} "
                    f"| {seconds[0]:.2f} s | {seconds[1]:.2f} s | {faster:.1f} "
                    f"| {grown[0]:.0f} MiB | {grown[1]:.0f} MiB | {grown[1] / grown[0]:.1f} |"
                )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3, help="pairs of runs")
    parser.add_argument("--refiners", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument(
        "--peak", nargs=5, metavar=("REFINER", "SIDE", "HEIGHT", "WIDTH", "MAPS"), help=argparse.SUPPRESS
    )
    arguments = parser.parse_args(argv)
    if not Path("/proc/self/clear_refs").exists():
        sys.exit("benchmarks/pixel_adaptive.py reads peak memory from /proc, which this system does not have")
    torch.set_num_threads(1)
    with torch.inference_mode():
        if arguments.peak:
            name, side, height, width, maps = arguments.peak
            print(peak_here(name, int(side), (int(height), int(width)), int(maps)))
            return
        print(table(arguments.refiners, arguments.repeats))


if __name__ == "__main__":
    main()
