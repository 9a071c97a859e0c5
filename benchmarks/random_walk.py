"""The random walk of this library against the dense one: time on one thread, peak memory, agreement.

    OMP_NUM_THREADS=1 python benchmarks/random_walk.py [--repeats 3]

The dense way is that of the published programs: the whole transition matrix, squared six times. Both start
from the affinities of 34 offsets and the scores of a background and three classes. Each run has a fresh
process: the time is CPU seconds of the walk, the peak what its memory grows to beyond what was there before
(Linux). The two take turns, a ratio is the median over paired runs. At 1000 x 1000 pixels the dense way does
not run: the size of one of its matrices is worked out.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from pseudolabel.refine import affinity_from_features, affinity_offsets, random_walk

PAIRED = {"281 x 375": (281, 375, 8), "375 x 500": (375, 500, 8)}
ALONE = {
    "1000 x 1000": (1000, 1000, 8),
    "1000 x 1000, stride 4": (1000, 1000, 4),
    "1000 x 1000, every pixel": (1000, 1000, 1),
}
RADIUS, BETA, LOG_STEPS, MAPS = 5, 8, 6, 4
MIB = 2**20


def sides(height: int, width: int, stride: int) -> tuple[int, int]:
    return -(-height // stride), -(-width // stride)


def example(size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Scores, and the affinities of smooth features."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 4 + MAPS, 12, 16, generator=generator)
    fields = torch.nn.functional.interpolate(coarse, size, mode="bicubic").clamp(0, 1)
    return fields[:, 4:], affinity_from_features(4 * fields[:, :4], RADIUS)


def dense_walk(scores: Tensor, affinity: Tensor) -> Tensor:
    """The published way, with the dense matrix of all pixels by all pixels."""
    height, width = scores.shape[2:]
    index = torch.arange(height * width).view(height, width)
    matrix = torch.eye(height * width)
    for channel, (dy, dx) in enumerate(affinity_offsets(RADIUS)):
        start = index[: height - dy, max(0, -dx) : min(width, width - dx)].flatten()
        value = affinity[0, channel].flatten()[start]
        matrix[start, start + dy * width + dx] = value
        matrix[start + dy * width + dx, start] = value
    transition = matrix**BETA
    del matrix
    transition = transition / transition.sum(0, keepdim=True)
    for _ in range(LOG_STEPS):
        transition = transition @ transition
    return (scores.flatten(2) @ transition).view_as(scores)


def our_walk(scores: Tensor, affinity: Tensor) -> Tensor:
    return random_walk(scores, affinity, beta=BETA, log_steps=LOG_STEPS)


WAYS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"ours": our_walk, "dense": dense_walk}


def memory(name: str) -> int:
    """A figure of this process's memory in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")


def run_here(way: str, height: int, width: int, stride: int) -> dict[str, float]:
    """Measure one walk in this process."""
    torch.set_num_threads(1)
    scores, affinity = example(sides(height, width, stride))
    our_walk(scores[..., :16, :16], affinity[..., :16, :16])  # the first calls load what they need
    torch.rand(64, 64) @ torch.rand(64, 64)
    Path("/proc/self/clear_refs").write_text("5")
    before, start = memory("VmRSS"), time.process_time()
    with torch.inference_mode():
        walked = WAYS[way](scores, affinity)
    seconds, peak = time.process_time() - start, memory("VmHWM")
    # A weighted sum tells the results of two processes apart.
    weight = torch.rand(walked.shape, generator=torch.Generator().manual_seed(1))
    return {
        "seconds": seconds,
        "grown": peak - before,
        "process": peak,
        "sum": float((walked * weight).double().mean()),
    }


def run(way: str, case: tuple[int, int, int]) -> dict[str, float]:
    """Measure one walk in a fresh process."""
    command = [sys.executable, __file__, "--run", way, *map(str, case)]
    result: dict[str, float] = json.loads(
        subprocess.run(command, check=True, capture_output=True, text=True).stdout
    )
    return result


def row(case: str, nodes: int, way: str, runs: list[dict[str, float]], ratio: str) -> str:
    middle = {name: statistics.median(one[name] for one in runs) for name in runs[0]}
    return (
        f"| {case} | {nodes} | {way} | {middle['seconds']:.2f} | {ratio} | {middle['grown'] / MIB:.0f} | "
        f"{middle['process'] / MIB:.0f} |"
    )


def table(repeats: int) -> str:
    lines = [
        "| image | pixels of the map | way | CPU s | times ours | peak of walk, MiB | of process, MiB |",
        "|---|--:|---|--:|--:|--:|--:|",
    ]
    for case, sizes in PAIRED.items():
        height, width = sides(*sizes)
        pairs = [{way: run(way, sizes) for way in WAYS} for _ in range(repeats)]
        for pair in pairs:
            assert abs(pair["ours"]["sum"] - pair["dense"]["sum"]) < 1e-5, f"{case}: results differ"
        ratio = statistics.median(pair["dense"]["seconds"] / pair["ours"]["seconds"] for pair in pairs)
        for way in WAYS:
            shown = "1" if way == "ours" else f"{ratio:.0f}"
            lines.append(row(case, height * width, way, [pair[way] for pair in pairs], shown))
    for case, sizes in ALONE.items():
        height, width = sides(*sizes)
        nodes = height * width
        lines.append(row(case, nodes, "ours", [run("ours", sizes) for _ in range(repeats)], "1"))
        lines.append(f"| {case} | {nodes} | dense | not run | | {4 * nodes**2 / MIB:.0f} a matrix | |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3, help="runs of each way")
    parser.add_argument(
        "--run", nargs=4, metavar=("WAY", "HEIGHT", "WIDTH", "STRIDE"), help=argparse.SUPPRESS
    )
    arguments = parser.parse_args(argv)
    if not Path("/proc/self/clear_refs").exists():
        sys.exit("benchmarks/random_walk.py reads peak memory from /proc, which this system does not have")
    if arguments.run:
        way, *sizes = arguments.run
        print(json.dumps(run_here(way, *map(int, sizes))))
        return
    print(table(arguments.repeats))


if __name__ == "__main__":
    main()
