"""All benchmarks that need no data: `make bench`.

Each runs in a process of its own, one after the other, with one spinning-free OpenMP thread unless it states
another count. Benchmarks on real photos take folders and minutes: see `voc_animals.py`.
"""

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch

import pseudolabel

BENCHMARKS = (
    "import_time.py",
    "background_sweep.py",
    "dense_crf.py",
    "random_walk.py",
    "pixel_adaptive.py",
    "superpixels.py",
    "class_conditional.py",
    "matting.py",
)


def main() -> None:
    folder = Path(__file__).parent
    print(
        f"pseudolabel {pseudolabel.__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}, "
        f"{platform.machine()}, {os.cpu_count()} cores, {datetime.now(UTC):%Y-%m-%d}",
        flush=True,
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    for name in BENCHMARKS:
        print(f"\n## {name}\n", flush=True)
        subprocess.run([sys.executable, folder / name], env=environment, check=True)


if __name__ == "__main__":
    main()
