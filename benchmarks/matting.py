"""Matting of this library against pymatting: time on one thread, memory, labels.

    OMP_NUM_THREADS=1 python benchmarks/matting.py [--repeats 3]

Three photos of scikit-image at 500 x 375, each with a wide unknown zone, cut from smooth maps at stride 16,
and with a narrow one, a band of 8 pixels. Both sides start from photo and trimap and end with a matte, to a
residual of 1e-4; closed form at eps 1e-5 on both. Of the preconditioners of pymatting the fastest counts that
labels at least 99.5 % of the unknown pixels as the converged solution does. The sides take turns in one
process, times are CPU seconds, and a ratio is the median over paired runs. Memory is what a fresh process
grows by (Linux).
"""

import argparse
import contextlib
import ctypes
import importlib.util
import io
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from pseudolabel.matting import closed_form_matting, large_kernel_matting, random_walk_matting

os.environ.setdefault("NUMBA_NUM_THREADS", "1")

SIZE = (375, 500)
EPS, RTOL, AGREE = 1e-5, 1e-4, 0.995
# Ellipses (y, x, half height, half width) that outline the object, and how smooth the wide zone's maps are.
PHOTOS = {
    "astronaut": ([(95, 210, 82, 72), (185, 225, 80, 80), (360, 200, 150, 165)], 4),
    "chelsea": ([(190, 235, 180, 195), (330, 230, 150, 235)], 30),
    "coffee": ([(190, 215, 172, 178)], 10),
}
ZONES = ("wide", "narrow")
PRECONDITIONERS = ("ichol", "jacobi", "vcycle")
MIB = 2**20


def photo(name: str) -> Tensor:
    """A photo (1,3,H,W) in [0, 1], cut to the shape and resized."""
    from skimage import data, transform

    image = getattr(data, name)()
    height, width = image.shape[:2]
    if 3 * width > 4 * height:
        start = (width - 4 * height // 3) // 2
        image = image[:, start : start + 4 * height // 3]
    else:
        image = image[: 3 * width // 4]
    image = transform.resize(image, SIZE, anti_aliasing=True)
    return torch.from_numpy(image).permute(2, 0, 1)[None].float().contiguous()


def outline(name: str) -> Tensor:
    y, x = torch.meshgrid(torch.arange(SIZE[0]), torch.arange(SIZE[1]), indexing="ij")
    ellipses = [((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 < 1 for cy, cx, ry, rx in PHOTOS[name][0]]
    return torch.stack(ellipses).any(0).float()[None, None]


def trimap(name: str, zone: str) -> Tensor:
    """A trimap (1,1,H,W)."""
    inside = outline(name)
    if zone == "narrow":
        sure, possible = 1 - F.max_pool2d(1 - inside, 9, 1, 4), F.max_pool2d(inside, 9, 1, 4)
        return torch.where(sure == possible, sure, 0.5)
    maps = F.adaptive_avg_pool2d(inside, (SIZE[0] // 16 + 1, SIZE[1] // 16 + 1))
    for _ in range(PHOTOS[name][1]):
        maps = F.avg_pool2d(F.pad(maps, (1, 1, 1, 1), mode="replicate"), 3, 1)
    maps = (maps - maps.amin()) / (maps.amax() - maps.amin())
    maps = F.interpolate(maps, SIZE, mode="bilinear")
    return torch.where(maps > 0.8, 1.0, torch.where(maps < 0.2, 0.0, 0.5))


def three_classes(trimap: Tensor) -> Tensor:
    """The same unknown zone, with the foreground cut into three classes (1,3,H,W)."""
    row, column = (trimap[0, 0] == 1).nonzero().unbind(1)
    y, x = torch.meshgrid(torch.arange(SIZE[0]), torch.arange(SIZE[1]), indexing="ij")
    below, right = y > row.median(), x > column.median()
    parts = torch.stack([~below, below & ~right, below & right])[None]
    return trimap.where((trimap != 1) | parts, 0)


def peer(image: Tensor, trimap: Tensor, preconditioner: str = "ichol", rtol: float = RTOL) -> Tensor:
    """Closed form of pymatting (1,1,H,W). Its V-cycle needs the whole grid, with known pixels weighted."""
    import pymatting as pm

    picture, known = image[0].permute(1, 2, 0).double().numpy(), trimap[0, 0].double().numpy()
    laplacian, cg = {"epsilon": EPS}, {"rtol": rtol, "maxiter": 10_000}
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its hints on incomplete Cholesky
        if preconditioner == "vcycle":
            matrix, rhs = pm.make_linear_system(pm.cf_laplacian(picture, **laplacian), known)
            alpha = pm.cg(matrix, rhs, M=pm.vcycle(matrix, SIZE), **cg).clip(0, 1).reshape(SIZE)
        else:
            alpha = pm.estimate_alpha_cf(
                picture,
                known,
                preconditioner=getattr(pm, preconditioner),
                laplacian_kwargs=laplacian,
                cg_kwargs=cg,
            )
    return torch.from_numpy(alpha)[None, None].float()


def other_peer(name: str, image: Tensor, trimap: Tensor) -> Tensor:
    """Random walk or large kernel of pymatting, with its settings."""
    import pymatting as pm

    picture, known = image[0].permute(1, 2, 0).double().numpy(), trimap[0, 0].double().numpy()
    estimate = {"random walk": pm.estimate_alpha_rw, "large kernel": pm.estimate_alpha_lkm}[name]
    alpha = estimate(picture, known, cg_kwargs={"rtol": RTOL, "maxiter": 10_000})
    return torch.from_numpy(alpha)[None, None].float()


OURS = {
    "closed form": partial(closed_form_matting, eps=EPS, rtol=RTOL),
    "random walk": partial(random_walk_matting, rtol=RTOL, max_iter=1000),
    "large kernel": partial(large_kernel_matting, rtol=RTOL, max_iter=1000),
}


def seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def pairs(
    ours: Callable[[], object], theirs: Callable[[], object], repeats: int
) -> list[tuple[float, float]]:
    ours()
    theirs()
    return [(seconds(ours), seconds(theirs)) for _ in range(repeats)]


def agreement(alpha: Tensor, other: Tensor, unknown: Tensor) -> float:
    return float(((alpha > 0.5) == (other > 0.5))[unknown].double().mean())


def ratio(times: list[tuple[float, float]]) -> float:
    return statistics.median(theirs / ours for ours, theirs in times)


def report_closed_form(repeats: int) -> None:
    print("| photo, zone | unknown | this library | labels | pymatting | with | labels | ratio | goal |")
    print("|---|--:|--:|--:|--:|---|--:|--:|--:|")
    ratios = []
    for zone in ZONES:
        for name in PHOTOS:
            image, known = photo(name), trimap(name, zone)
            unknown = known == 0.5
            converged = peer(image, known, rtol=1e-9)
            fastest: dict[str, float] = {}
            labels = {}
            for preconditioner in PRECONDITIONERS:
                labels[preconditioner] = agreement(peer(image, known, preconditioner), converged, unknown)
                if labels[preconditioner] >= AGREE:
                    fastest[preconditioner] = seconds(partial(peer, image, known, preconditioner))
            best = min(fastest, key=lambda one: fastest[one])
            ours = partial(OURS["closed form"], image, known)
            times = pairs(ours, partial(peer, image, known, best), repeats)
            ratios.append(ratio(times))
            mine, theirs = (1e3 * statistics.median(side) for side in zip(*times, strict=True))
            print(
                f"| {name}, {zone} | {float(unknown.float().mean()):.0%} | {mine:.0f} ms | "
                f"{agreement(ours(), converged, unknown):.2%} | {theirs:.0f} ms | {best} | "
                f"{labels[best]:.2%} | {ratios[-1]:.1f} | >= 1 |",
                flush=True,
            )
    print(f"| median | | | | | | | {statistics.median(ratios):.1f} | >= 3 |\n", flush=True)


def report_classes(repeats: int) -> None:
    print("| photo, zone | one class | three classes | times one | goal |\n|---|--:|--:|--:|--:|")
    for zone in ZONES:
        for name in PHOTOS:
            image, known = photo(name), trimap(name, zone)
            one, three = (partial(OURS["closed form"], image, maps) for maps in (known, three_classes(known)))
            times = pairs(one, three, repeats)
            alone, together = (1e3 * statistics.median(side) for side in zip(*times, strict=True))
            print(
                f"| {name}, {zone} | {alone:.0f} ms | {together:.0f} ms | {ratio(times):.2f} | < 1.5 |",
                flush=True,
            )
    print(flush=True)


def report_others(repeats: int) -> None:
    print("| method, zone (median of the photos) | this library | pymatting | ratio |\n|---|--:|--:|--:|")
    for method in ("random walk", "large kernel"):
        for zone in ZONES:
            times = []
            for name in PHOTOS:
                image, known = photo(name), trimap(name, zone)
                times += pairs(
                    partial(OURS[method], image, known), partial(other_peer, method, image, known), repeats
                )
            mine, theirs = (statistics.median(side) for side in zip(*times, strict=True))
            print(
                f"| {method}, {zone} | {1e3 * mine:.0f} ms | {1e3 * theirs:.0f} ms | {ratio(times):.1f} |",
                flush=True,
            )
    print(flush=True)


def memory(name: str, zone: str, side: str) -> float:
    """What the matte of one photo adds to this process at its peak, in MiB (Linux)."""
    image, known = photo(name), trimap(name, zone)
    run = OURS["closed form"] if side == "ours" else peer
    small = known[..., ::10, ::10].contiguous()
    if side == "ours":  # the first calls load what they need
        run(image[..., ::10, ::10].contiguous(), small)
    else:
        import pymatting as pm

        pm.estimate_alpha_cf(
            image[0, :, ::10, ::10].permute(1, 2, 0).double().numpy(), small[0, 0].double().numpy()
        )

    def status(field: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith(field)) / 1024

    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    start = status("VmRSS")
    run(image, known)
    return status("VmHWM") - start


def report_memory() -> None:
    print("| photo, zone | this library | pymatting |\n|---|--:|--:|")
    for zone in ZONES:
        for name in PHOTOS:
            peaks = []
            for side in ("ours", "theirs"):
                command = [sys.executable, __file__, "--memory", name, zone, side]
                result = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                peaks.append(float(result.splitlines()[-1]))
            print(f"| {name}, {zone} | {peaks[0]:.0f} MiB | {peaks[1]:.0f} MiB |", flush=True)


def report_cuda(repeats: int, batch: int = 16) -> None:
    """A batch of photos on the GPU, wall time, labels against the CPU."""
    print(f"{torch.cuda.get_device_name()}, {batch} photos\n")
    print("| zone | batch | labels as on the CPU |\n|---|--:|--:|")
    for zone in ZONES:
        names = [name for _ in range(batch) for name in PHOTOS][:batch]
        image = torch.cat([photo(name) for name in names])
        known = torch.cat([trimap(name, zone) for name in names])
        there = image.cuda(), known.cuda()
        walls = []
        for _ in range(repeats + 1):
            torch.cuda.synchronize()
            start = time.perf_counter()
            alpha = OURS["closed form"](*there)
            torch.cuda.synchronize()
            walls.append(time.perf_counter() - start)
        few = slice(len(PHOTOS))
        same = agreement(alpha[few].cpu(), OURS["closed form"](image[few], known[few]), known[few] == 0.5)
        print(f"| {zone} | {statistics.median(walls[1:]):.2f} s | {same:.2%} |", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3, help="paired runs of each case")
    parser.add_argument("--cuda", action="store_true", help="time a batch on a GPU instead")
    parser.add_argument("--memory", nargs=3, metavar=("PHOTO", "ZONE", "SIDE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.cuda:
        report_cuda(arguments.repeats)
        return
    if importlib.util.find_spec("pymatting") is None:
        sys.exit('benchmarks/matting.py compares with pymatting: pip install "pseudolabel[matting]"')
    torch.set_num_threads(1)
    if arguments.memory:
        print(memory(*arguments.memory))
        return
    print(
        f"Matting, {SIZE[1]} x {SIZE[0]}, residual {RTOL:g}, torch {torch.__version__}, one thread.\n",
        flush=True,
    )
    report_closed_form(arguments.repeats)
    report_classes(arguments.repeats)
    report_others(arguments.repeats)
    report_memory()


if __name__ == "__main__":
    main()
