"""The dense CRF of this library against pydensecrf: time on one thread, throughput, memory, agreement.

    OMP_NUM_THREADS=1 python benchmarks/dense_crf.py [--repeats 3]

Both sides start from a photo and label probabilities and end with probabilities: 10 iterations, 500 x 375.
They take turns in one process, and ratios are medians over paired runs. The Gaussian lattice, which the
library keeps for each image size, is there before the clock starts; everything else is built in every run.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pseudolabel.refine import CRF_PRESETS, dense_crf

SIZE = (375, 500)
SETTINGS = {"80/13": (80.0, 13.0, 10.0), "67/3": (67.0, 3.0, 10.0), "50/5": (50.0, 5.0, 10.0)}
LABELS = (2, 5, 21)
GAUSSIAN = (3.0, 3.0)
GOALS = {"80/13": 2.0, "67/3": 1.5, "50/5": 1.5}


def photos() -> list[Tensor]:
    """Four photos of scikit-image as (1,3,H,W) in [0, 1], rounded to 8 bits."""
    from skimage import data, transform

    images = []
    for name in ("astronaut", "coffee", "chelsea", "rocket"):
        photo = transform.resize(getattr(data, name)(), SIZE, anti_aliasing=True)
        images.append(torch.from_numpy(photo).permute(2, 0, 1)[None].mul(255).round().div(255).float())
    return images


def smooth_probs(labels: int, seed: int) -> Tensor:
    """Softmax of smooth random fields (1,L,H,W)."""
    coarse = torch.randn(1, labels, 12, 16, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, SIZE, mode="bicubic").mul(1.5).softmax(1)


def proportional_maps(classes: int, seed: int) -> Tensor:
    """The binary problems of proportional masks, (1,K,2,H,W): [(1 - u)^11, u]."""
    u = smooth_probs(classes + 1, seed)[:, 1:]
    u = u / u.amax((2, 3), keepdim=True)
    return torch.stack([(1 - u) ** 11, u], 2)


def pydensecrf(
    image: Tensor,
    probs: Tensor,
    bilateral: tuple[float, float, float],
    gaussian: tuple[float, float] = GAUSSIAN,
    iterations: int = 10,
) -> np.ndarray:
    """The peer as its README has it, for (1,3,H,W) and (1,L,H,W)."""
    from pydensecrf.densecrf import DenseCRF2D

    photo = np.ascontiguousarray((image[0] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())
    labels, height, width = probs.shape[1:]
    crf = DenseCRF2D(width, height, labels)
    crf.setUnaryEnergy(-np.log(np.clip(probs[0].numpy(), 1e-5, 1)).reshape(labels, -1))
    crf.addPairwiseGaussian(sxy=gaussian[0], compat=gaussian[1])
    sxy, srgb, compat = bilateral
    crf.addPairwiseBilateral(sxy=sxy, srgb=srgb, rgbim=photo, compat=compat)
    return np.array(crf.inference(iterations)).reshape(labels, height, width)


def peer_one_by_one(image: Tensor, maps: Tensor) -> list[np.ndarray]:
    return [pydensecrf(image, maps[:, k], SETTINGS["80/13"], (3.0, 10.0)) for k in range(maps.shape[1])]


def paired(
    ours: Callable[[], object], peer: Callable[[], object], clock: Callable[[], float]
) -> tuple[float, float]:
    """Milliseconds of both, one after the other."""
    begin = clock()
    ours()
    middle = clock()
    peer()
    return (middle - begin) * 1e3, (clock() - middle) * 1e3


def row(name: str, pairs: Sequence[tuple[float, float]], goal: str, unit: str = "ms") -> str:
    ours, peer = (statistics.median(values) for values in zip(*pairs, strict=True))
    ratio = statistics.median(b / a for a, b in pairs)
    if unit == "MiB":
        ratio = 1 / ratio
    return f"| {name} | {ours:.0f} {unit} | {peer:.0f} {unit} | {ratio:.2f} | {goal} |"


def peak_memory(backend: str, setting: str, labels: int) -> float:
    """Peak resident memory above the start, in MiB, in this process (Linux)."""
    image, probs = photos()[0], smooth_probs(labels, 0)
    corner = (..., slice(0, 16), slice(0, 16))
    run = {"torch": _torch, "pydensecrf": pydensecrf}[backend]
    run(image[corner].contiguous(), probs[corner].contiguous(), SETTINGS[setting])  # imports

    def status(name: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith(name)) / 1024

    import ctypes

    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    start = status("VmRSS")
    run(image, probs, SETTINGS[setting])
    return status("VmHWM") - start


def _torch(image: Tensor, probs: Tensor, bilateral: tuple[float, float, float]) -> Tensor:
    return dense_crf(image, probs, gaussian=GAUSSIAN, bilateral=bilateral, iterations=10)


def _peak_in_fresh_process(backend: str, setting: str, labels: int) -> float:
    command = [sys.executable, __file__, "--peak", backend, setting, str(labels)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3, help="paired runs of each photo")
    parser.add_argument("--peak", nargs=3, metavar=("BACKEND", "SETTING", "LABELS"), help=argparse.SUPPRESS)
    parser.add_argument("--cuda", action="store_true", help="time batches on a GPU instead")
    arguments = parser.parse_args(argv)
    if arguments.cuda:
        report_cuda(arguments.repeats)
        return
    try:
        import pydensecrf.densecrf  # noqa: F401
    except Exception as error:  # noqa: BLE001 - a broken build raises anything
        sys.exit(
            f"benchmarks/dense_crf.py compares with pydensecrf, which cannot be imported ({error}): "
            'pip install "pseudolabel[crf]" (Python < 3.13 and a C++ compiler)'
        )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if arguments.peak:
            backend, setting, labels = arguments.peak
            print(peak_memory(backend, setting, int(labels)))
        else:
            report(arguments.repeats)
    finally:
        torch.set_num_threads(threads)


def report(repeats: int) -> None:
    images = photos()
    _torch(images[0], smooth_probs(2, 0), SETTINGS["80/13"])  # imports, and the Gaussian lattice
    print(f"Dense CRF, {SIZE[1]} x {SIZE[0]}, 10 iterations, {len(images)} photos x {repeats} paired runs.")
    print(f"torch {torch.__version__}, 1 torch thread; Gaussian lattice kept.\n")
    print("| case | this library | pydensecrf | ratio | goal |\n|---|---|---|---|---|")
    agreement = []
    for setting, bilateral in SETTINGS.items():
        for labels in LABELS:
            pairs = []
            for seed, image in enumerate(images):
                probs = smooth_probs(labels, seed)
                ours, peer = (
                    partial(_torch, image, probs, bilateral),
                    partial(pydensecrf, image, probs, bilateral),
                )
                pairs += [paired(ours, peer, time.process_time) for _ in range(repeats)]
                agreement.append((setting, labels, _differences(image, probs, bilateral)))
            goal = f">= {GOALS[setting]:g}"
            print(row(f"{setting}, {labels} labels, 1 thread, CPU time", pairs, goal), flush=True)

    pairs = []
    for seed, image in enumerate(images):
        maps = proportional_maps(3, seed)
        ours = partial(dense_crf, image, maps, **CRF_PRESETS["pmm"])
        peer = partial(peer_one_by_one, image, maps)
        pairs += [paired(ours, peer, time.process_time) for _ in range(repeats)]
    print(row("proportional masks, 3 classes, 1 thread, CPU time", pairs, ">= 5"), flush=True)

    eight = images + [image.flip(3) for image in images]
    for labels in LABELS:
        jobs = [(image, smooth_probs(labels, seed), SETTINGS["80/13"]) for seed, image in enumerate(eight)]
        with ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            list(pool.map(lambda job: _torch(*job), jobs[:2]))
            pairs = [
                paired(
                    lambda j=jobs: list(pool.map(lambda job: _torch(*job), j)),
                    lambda j=jobs: [pydensecrf(*job) for job in j],
                    time.perf_counter,
                )
                for _ in range(repeats)
            ]
        print(row(f"80/13, {labels} labels, 8 images, 2 Python threads, wall", pairs, ">= 3"), flush=True)

    if Path("/proc/self/clear_refs").exists():
        for setting, labels in [("80/13", labels) for labels in LABELS] + [("67/3", 21)]:
            peaks = [_peak_in_fresh_process(backend, setting, labels) for backend in ("torch", "pydensecrf")]
            name = f"{setting}, {labels} labels, peak memory, Gaussian lattice included"
            print(row(name, [(peaks[0], peaks[1])], "<= 1.5", "MiB"), flush=True)

    print("\nAgreement (all photos)\n\n| case | max | 99.9 % quantile | labels equal |\n|---|---|---|---|")
    for setting in SETTINGS:
        for labels in LABELS:
            found = [values for s, count, values in agreement if (s, count) == (setting, labels)]
            largest, quantile = max(v[0] for v in found), max(v[1] for v in found)
            equal = min(v[2] for v in found)
            print(f"| {setting}, {labels} labels | {largest:.1e} | {quantile:.1e} | {equal:.4%} |")


def report_cuda(repeats: int, batch: int = 16) -> None:
    """Batches of one lattice on a GPU, beside the same code on the CPU."""
    images = torch.cat(photos() * (batch // 4))
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, batches of {batch} photos.\n")
    print("| case | ms an image, GPU | ms an image, CPU, 1 thread | labels equal |\n|---|---|---|---|")
    torch.set_num_threads(1)
    for setting, bilateral in SETTINGS.items():
        for labels in LABELS:
            probs = torch.cat([smooth_probs(labels, seed) for seed in range(batch)])
            inputs = images.cuda(), probs.cuda(), bilateral
            result, seconds = _torch(*inputs), []
            for _ in range(repeats):
                torch.cuda.synchronize()
                start = time.perf_counter()
                _torch(*inputs)
                torch.cuda.synchronize()
                seconds.append(time.perf_counter() - start)
            start = time.perf_counter()
            few = _torch(images[:4], probs[:4], bilateral)
            on_cpu = (time.perf_counter() - start) / 4
            equal = (result[:4].cpu().argmax(1) == few.argmax(1)).double().mean()
            on_gpu = statistics.median(seconds) / batch
            print(f"| {setting}, {labels} labels | {1e3 * on_gpu:.1f} | {1e3 * on_cpu:.0f} | {equal:.4%} |")


def _differences(
    image: Tensor, probs: Tensor, bilateral: tuple[float, float, float]
) -> tuple[float, float, float]:
    ours, peer = _torch(image, probs, bilateral)[0].numpy(), pydensecrf(image, probs, bilateral)
    gap = np.abs(ours - peer)
    return float(gap.max()), float(np.quantile(gap, 0.999)), float((ours.argmax(0) == peer.argmax(0)).mean())


if __name__ == "__main__":
    main()
