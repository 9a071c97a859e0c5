"""What `import pseudolabel` costs beyond `import torch`: fresh interpreters, paired runs, medians."""

import statistics
import subprocess
import sys

PAIRS = 9
CASES = {
    "import torch": "import torch",
    "import torch, pseudolabel": "import torch, pseudolabel",
    "the same, all rooms": "import torch, pseudolabel as pl; [getattr(pl, name) for name in pl.__all__]",
}
CLOCK = "import time; start = time.process_time(); {}; print(time.process_time() - start)"


def seconds(statement: str) -> float:
    run = subprocess.run(
        [sys.executable, "-c", CLOCK.format(statement)], capture_output=True, text=True, check=True
    )
    return float(run.stdout)


def main() -> None:
    for statement in CASES.values():
        seconds(statement)  # warm the file cache
    times = {name: [] for name in CASES}
    for _ in range(PAIRS):
        for name, statement in CASES.items():
            times[name].append(seconds(statement))
    base = times["import torch"]
    print(f"CPU milliseconds, median of {PAIRS} fresh interpreters by turns\n")
    print("| statement | ms | beyond torch, ms (paired) |\n|---|---|---|")
    for name, values in times.items():
        beyond = statistics.median(
            value - torch_alone for value, torch_alone in zip(values, base, strict=True)
        )
        print(f"| `{name}` | {1e3 * statistics.median(values):.0f} | {1e3 * beyond:.0f} |")


if __name__ == "__main__":
    main()
