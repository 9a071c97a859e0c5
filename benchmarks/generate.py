"""`pseudolabel generate` from outside: where its time goes, what its memory does, threads against processes.

    OMP_NUM_THREADS=1 python benchmarks/generate.py [--parts throughput memory processes] [--rounds 3]
        [--rows a b c d] [--photos N] [--sizes 1000 4000 16000] [--crf]

Photos of 500 x 375 are drawn, each shows 3 of 80 classes, networks have random weights.

**throughput**: each stage alone (reading, network, refinement, writing with its fsync) by as many threads as
the command has workers, then the whole command less its start-up, which is the same command on photos that
are done. The whole cannot be faster than the bound: the larger of the slowest stage's wall time and of the
CPU seconds of all stages over the cores in use. Rounds take turns, a ratio is the median over rounds. There
is no accelerator here: the "device" of set-ups c and d is a network that waits some milliseconds a view, one
call at a time, and then gives cheap features.

**memory**: seconds and peak resident memory of the command for more and more photos (Linux).

**processes**: one process of two workers against two of one worker (`--shard`), and batches of photos.
"""

import argparse
import copy
import json
import os
import queue
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pseudolabel
from pseudolabel import io, recipes
from pseudolabel.cam import CAM, multi_scale_cam
from pseudolabel.refine import CRF_PRESETS, DenseCRF

SIZE, CLASSES, PRESENT = (375, 500), 80, 3
TEXTURES = 200
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
WAIT = "BENCHMARK_DEVICE_MS"  # environment: how long the stand-in device takes for a view

# ----------------------------------------------------------------------------------------------- networks
# `--model generate:NAME`: the command finds this file by PYTHONPATH.


def layer(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


def classifier(channels: int, *layers: nn.Module) -> nn.Module:
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(nn.Sequential(*layers), pool, nn.Linear(channels, CLASSES))


def small() -> nn.Module:
    return classifier(64, layer(3, 16, 5, 4), layer(16, 32, 3, 2), layer(32, 64, 3, 2), layer(64, 64, 3))


class Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.path = nn.Sequential(
            layer(inputs, width, 1), layer(width, width, 3, stride), layer(width, 4 * width, 1)[:2]
        )
        straight = inputs == 4 * width
        self.shortcut = nn.Identity() if straight else layer(inputs, 4 * width, 1, stride)[:2]

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.path(x) + self.shortcut(x))


def resnet50() -> nn.Module:
    layers: list[nn.Module] = [layer(3, 64, 7, 2), nn.MaxPool2d(3, 2, 1)]
    inputs = 64
    for width, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for block in range(blocks):
            layers.append(Bottleneck(inputs, width, 1 if block else stride))
            inputs = 4 * width
    return classifier(inputs, *layers)


class Wait(nn.Module):
    """Waits as for a device that takes one call at a time. No core is busy meanwhile."""

    one_call = threading.Lock()

    def forward(self, views: Tensor) -> Tensor:
        with self.one_call:
            time.sleep(len(views) * float(os.environ[WAIT]) / 1e3)
        return views


def device() -> nn.Module:
    return classifier(64, Wait(), nn.AvgPool2d(16), layer(3, 64, 1))


NETWORKS: dict[str, Callable[[], nn.Module]] = {"small": small, "resnet50": resnet50, "device": device}


# --------------------------------------------------------------------------------------------------- data


class Data(NamedTuple):
    """A folder with photos, labels.csv, few.txt (names of the first photos) and weights."""

    folder: Path
    names: list[str]
    labels: io.ImageLabels


def draw_textures(folder: Path) -> list[Path]:
    """Photos of noise at all wavelengths."""
    from PIL import Image

    folder.mkdir()
    paths = [folder / f"{number:03d}.jpg" for number in range(TEXTURES)]
    for number, path in enumerate(paths):
        generator = torch.Generator().manual_seed(number)
        image = torch.zeros(1, 3, *SIZE)
        for cells in (3, 6, 12, 24, 48, 96):
            noise = torch.randn(1, 3, cells, cells * 4 // 3, generator=generator)
            image += F.interpolate(noise, SIZE, mode="bicubic") / cells**0.5
        pixels = ((image[0] - image.min()) / (image.max() - image.min()) * 255).round().to(torch.uint8)
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(path, quality=90)
    return paths


def make_data(folder: Path, textures: Sequence[Path], photos: int) -> Data:
    """So many photos, names for the textures by turns: they are drawn once."""
    (folder / "photos").mkdir(parents=True)
    names = [f"photo_{number:06d}" for number in range(photos)]
    for number, name in enumerate(names):
        os.link(textures[number % len(textures)], folder / "photos" / f"{name}.jpg")
    draws = torch.rand(photos, CLASSES, generator=torch.Generator().manual_seed(0))
    present = torch.zeros(photos, CLASSES).scatter_(1, draws.topk(PRESENT).indices, 1)
    labels = io.ImageLabels(tuple(names), tuple(f"class {c}" for c in range(CLASSES)), present)
    io.write_labels(folder / "labels.csv", labels)
    (folder / "few.txt").write_text("\n".join(names[:8]) + "\n")
    for name, factory in NETWORKS.items():
        torch.manual_seed(0)
        torch.save(factory().state_dict(), folder / f"{name}.pt")
    return Data(folder, names, labels)


# ------------------------------------------------------------------------------------------------ command


class Used(NamedTuple):
    """What a process used: seconds, CPU seconds, MiB."""

    wall: float
    cpu: float
    peak: float = 0.0


# A process of its own: to the system, a child's peak begins with the size of the process that starts it.
LAUNCHER = """
import json, os, subprocess, sys, time
start = time.perf_counter()
child = subprocess.Popen(sys.argv[1:], stdout=sys.stderr)
_, status, usage = os.wait4(child.pid, 0)
wall = time.perf_counter() - start
print(json.dumps([wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024]))
sys.exit(os.waitstatus_to_exitcode(status))
"""


def at_once(*commands: Sequence[str]) -> Used:
    """Run commands side by side: the time until all are done, CPU time and peaks of all together."""
    here, library = Path(__file__).resolve().parent, Path(pseudolabel.__file__).resolve().parents[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{here}{os.pathsep}{library}"}

    def launch(command: Sequence[str]) -> list[float]:
        arguments = [sys.executable, "-c", LAUNCHER, *command]
        done = subprocess.run(arguments, capture_output=True, text=True, env=environment, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
        return json.loads(done.stdout)

    with ThreadPoolExecutor(len(commands)) as pool:
        walls, cpus, peaks = zip(*pool.map(launch, commands), strict=True)
    return Used(max(walls), sum(cpus), sum(peaks))


def command(data: Data, network: str, out: Path, *options: object) -> list[str]:
    files = (data.folder / "photos", "--labels", data.folder / "labels.csv", "--out", out)
    source = ("--model", f"generate:{network}", "--weights", data.folder / f"{network}.pt")
    return [sys.executable, "-m", "pseudolabel", "generate", *map(str, (*files, *source, *options))]


def run_fresh(data: Data, network: str, *runs: Sequence[object]) -> tuple[Used, Used]:
    """Run the command with each of the options at once into a new folder; then again for a few photos, which
    are done by then: the start-up."""
    out = data.folder / "masks"
    shutil.rmtree(out, ignore_errors=True)
    whole = at_once(*(command(data, network, out, *options) for options in runs))
    if (made := len(list(out.glob("*.png")))) != len(data.names):
        raise RuntimeError(f"expected {len(data.names)} masks, got {made}")
    few = ("--list", data.folder / "few.txt")
    return whole, at_once(*(command(data, network, out, *options, *few) for options in runs))


# --------------------------------------------------------------------------------------------- throughput


class SetUp(NamedTuple):
    """One kind of work: a network, with a CRF or without."""

    what: str
    network: str
    photos: int
    crf: str
    scales: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0)
    wait: Callable[[dict[str, Used]], float] | None = None  # the device's seconds, from the stages' without

    def options(self, workers: int, batch_size: int = 1) -> list[object]:
        threads = ("--workers", workers, "--batch-size", batch_size)
        return [self.crf, "--scales", *self.scales, *threads]


def cpu_bound(stages: dict[str, Used], workers: int) -> float:
    return sum(used.cpu for used in stages.values()) / min(workers, CORES)


def longer_than_all(stages: dict[str, Used]) -> float:
    return 1.5 * cpu_bound(stages, 2)


def as_refinement(stages: dict[str, Used]) -> float:
    return cpu_bound({"refinement": stages["refinement"]}, 2)


SET_UPS = {
    "a": SetUp("ResNet-50, CRF, scales 0.5 and 1", "resnet50", 24, "--crf", (0.5, 1.0)),
    "b": SetUp("small network, CRF", "small", 64, "--crf"),
    "c": SetUp("device, no CRF", "device", 96, "--no-crf", wait=longer_than_all),
    "d": SetUp("device, CRF", "device", 96, "--crf", wait=as_refinement),
}


def in_threads(work: Callable[..., Any], workers: int, *items: Sequence[Any]) -> tuple[list[Any], Used]:
    wall, cpu = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        results = list(pool.map(work, *items))
    return results, Used(time.perf_counter() - wall, time.process_time() - cpu)


def time_stages(data: Data, setup: SetUp, workers: int) -> dict[str, Used]:
    """Each stage by itself, on what the stage before has left."""
    model = NETWORKS[setup.network]().requires_grad_(False).eval()
    model.load_state_dict(torch.load(data.folder / f"{setup.network}.pt", weights_only=True))
    cams: queue.SimpleQueue[CAM] = queue.SimpleQueue()  # hooks belong to one thread at a time
    for _ in range(workers):
        cams.put(CAM(copy.deepcopy(model)))
    crf = DenseCRF(**CRF_PRESETS["pmm"]) if setup.crf == "--crf" else None
    labels = torch.ones(1, PRESENT)
    out = data.folder / "alone"
    out.mkdir(exist_ok=True)

    def read(name: str) -> Tensor:
        return io.read_image(data.folder / "photos" / f"{name}.jpg")[None]

    def look(image: Tensor, name: str) -> Tensor:
        present, cam = data.labels[name].nonzero()[:, 0], cams.get()
        try:
            return multi_scale_cam(
                lambda views: cam(views)[:, present], (image - MEAN) / STD, None, setup.scales
            )
        finally:
            cams.put(cam)

    def refine(image: Tensor, maps: Tensor) -> Tensor:
        return recipes.pmm(image, maps, labels, crf=crf)[0]

    def write(name: str, mask: Tensor) -> None:
        io.write_mask(out / f"{name}.png", mask)

    used = {}
    images, used["reading"] = in_threads(read, workers, data.names)
    maps, used["network"] = in_threads(look, workers, images, data.names)
    masks, used["refinement"] = in_threads(refine, workers, images, maps)
    _, used["writing"] = in_threads(write, workers, data.names, masks)
    shutil.rmtree(out)
    return used


def print_row(*cells: object) -> None:
    """A row of a table, numbers with two digits behind the point."""
    print(f"| {' | '.join(f'{c:.2f}' if isinstance(c, float) else str(c) for c in cells)} |", flush=True)


def print_head(*names: str) -> None:
    print_row(*names)
    print_row("---", *["--:"] * (len(names) - 1))


def medians(rounds: Sequence[Sequence[float]]) -> list[float]:
    return [statistics.median(values) for values in zip(*rounds, strict=True)]


def report_throughput(draw: Callable[[int], Data], rows: Sequence[str], photos: int, rounds: int) -> None:
    stages = ("reading", "network", "refinement", "writing")
    print("\nStages alone, bound and whole in seconds; whole without start-up\n")
    columns = ("CPU / cores", "bound", "whole", "whole / bound", "CPU, whole / stages", "start-up")
    print_head("set-up", "photos", "workers", *stages, *columns)
    for row in rows:
        setup = SET_UPS[row]
        data, what = draw(photos or setup.photos), f"{row}: {setup.what}"
        if setup.wait:
            os.environ[WAIT] = "0"
            views = 2 * len(setup.scales) * len(data.names)
            os.environ[WAIT] = f"{1e3 * setup.wait(time_stages(data, setup, 2)) / views:.2f}"
            what += f", {os.environ[WAIT]} ms a view"
        for workers in (2, 4) if setup.wait else (2,):
            found = []
            for _ in range(rounds):
                alone = time_stages(data, setup, workers)
                whole, start_up = run_fresh(data, setup.network, setup.options(workers))
                bounds = [*(alone[stage].wall for stage in stages), cpu_bound(alone, workers)]
                seconds, bound = whole.wall - start_up.wall, max(bounds)
                work = (whole.cpu - start_up.cpu) / sum(used.cpu for used in alone.values())
                found.append([*bounds, bound, seconds, seconds / bound, work, start_up.wall])
            print_row(what, len(data.names), workers, *medians(found))
        shutil.rmtree(data.folder)


# ------------------------------------------------------------------------------------ memory and processes


def report_memory(draw: Callable[[int], Data], sizes: Sequence[int], crf: bool) -> None:
    options = ("--method", "pmm", "--crf" if crf else "--no-crf", "--scales", 1.0, "--workers", 2)
    print(f"\nSmall network, `{' '.join(map(str, options))}`; start-up, again: 8 or all are done already\n")
    columns = ("start-up, s", "ms a photo", "times first", "peak MiB", "times first", "again, s")
    print_head("photos", "s", *columns)
    first = None
    for size in sizes:
        data = draw(size)
        whole, start_up = run_fresh(data, "small", options)
        again = at_once(command(data, "small", data.folder / "masks", *options))
        each = 1e3 * (whole.wall - start_up.wall) / size
        first = first or (each, whole.peak)
        times = (each, each / first[0], whole.peak, f"{whole.peak / first[1]:.3f}")
        print_row(size, whole.wall, start_up.wall, *times, again.wall)
        shutil.rmtree(data.folder)


def report_processes(draw: Callable[[int], Data], photos: int, rounds: int) -> None:
    print("\nSeconds without start-up; peak memory of all processes together\n")
    print_head("set-up, way", "photos", "s", "times first", "CPU s", "peak MiB")
    for setup in (SET_UPS["b"], SET_UPS["a"]):
        data, one = draw(photos or setup.photos), setup.options(1)
        ways = {
            "one process, 2 workers": [setup.options(2)],
            "two processes, 1 worker each": [[*one, "--shard", "1/2"], [*one, "--shard", "2/2"]],
            "one process, 2 workers, --batch-size 4": [setup.options(2, batch_size=4)],
        }
        found: dict[str, list[list[float]]] = {way: [] for way in ways}
        for _ in range(rounds):
            first = None
            for way, runs in ways.items():
                whole, start_up = run_fresh(data, setup.network, *runs)
                seconds = whole.wall - start_up.wall
                first = first or seconds
                found[way].append([seconds, seconds / first, whole.cpu - start_up.cpu, whole.peak])
        for way, values in found.items():
            print_row(f"{setup.what}: {way}", len(data.names), *medians(values))
        shutil.rmtree(data.folder)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parts = ("throughput", "memory", "processes")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each, by turns (memory: one)")
    parser.add_argument("--rows", nargs="+", choices=[*SET_UPS], default=[*SET_UPS], help="of throughput")
    parser.add_argument("--photos", type=int, default=0, help="for all set-ups, instead of their own numbers")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 4000, 16000], help="photos of memory")
    parser.add_argument("--crf", action="store_true", help="memory with a CRF: some ten times as long")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    load = f"load before {os.getloadavg()[0]:.1f}"
    print(f"torch {torch.__version__}, {CORES} cores, {load}, {arguments.rounds} rounds", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        textures = draw_textures(Path(scratch, "textures"))

        def draw(photos: int) -> Data:
            return make_data(Path(tempfile.mkdtemp(dir=scratch)), textures, photos)

        if "throughput" in arguments.parts:
            report_throughput(draw, arguments.rows, arguments.photos, arguments.rounds)
        if "memory" in arguments.parts:
            report_memory(draw, arguments.sizes, arguments.crf)
        if "processes" in arguments.parts:
            report_processes(draw, arguments.photos, arguments.rounds)


if __name__ == "__main__":
    main()
