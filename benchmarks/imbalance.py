"""Pretended under-fitting where one class is small: IoU of the foreground.

    OMP_NUM_THREADS=1 python benchmarks/imbalance.py [--seeds 2] [--steps 250]

Drawn pictures of 32 x 32 pixels of noise with a disc that is brighter, 3.4 % of all pixels; in the masks for
training 2 % of the pixels, drawn at random, have the other label. A network of three convolutions is trained
once for each row and seed, and scored on other pictures with true masks. "Open" is the share of the steps in
which the gate is open.
"""

import argparse
import statistics
import time
import warnings

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pseudolabel.losses import pretended_under_fitting_loss
from pseudolabel.losses.pretended_under_fitting import gate_mean, gate_terms
from pseudolabel.metrics import confusion_matrix, iou_from_confusion

SIDE, BATCH, TRAINING, SCORING = 32, 8, 200, 200
WEIGHT = torch.tensor([0.5, 12.0])
ROWS = {
    "cross-entropy": {"beta": 0.0},
    "the defaults": {},
    '`mode="ignore"`': {"mode": "ignore"},
    '`mode="pow"`': {"mode": "pow"},
    "`beta=0.05`": {"beta": 0.05},
    '`gate_over="classes"`': {"gate_over": "classes"},
    '`gate_over="classes", mode="pow"`': {"gate_over": "classes", "mode": "pow"},
    '`gate_over="classes", beta=0.8`': {"gate_over": "classes", "beta": 0.8},
    "`class_weight=(0.5, 12)`, cross-entropy": {"beta": 0.0, "class_weight": WEIGHT},
    "`class_weight=(0.5, 12)`": {"class_weight": WEIGHT},
    '`class_weight=(0.5, 12), gate_over="classes"`': {"class_weight": WEIGHT, "gate_over": "classes"},
}


def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pictures (N,1,S,S) and their true masks (N,S,S)."""
    y, x = (torch.rand(2, count, 1, 1, generator=generator) * SIDE).unbind()
    radius = 2.7 + 1.5 * torch.rand(count, 1, 1, generator=generator)
    axis = torch.arange(SIDE)
    mask = (axis[:, None] - y) ** 2 + (axis - x) ** 2 < radius**2
    image = torch.randn(count, 1, SIDE, SIDE, generator=generator) + 2.5 * mask[:, None]
    return image, mask.long()


def train(row: dict, seed: int, steps: int) -> tuple[float, float]:
    """IoU of the foreground, and the share of the steps with an open gate."""
    generator = torch.Generator().manual_seed(seed)
    image, mask = draw(TRAINING, generator)
    wrong = torch.rand(mask.shape, generator=generator) < 0.02
    noisy = mask.where(~wrong, 1 - mask)
    torch.manual_seed(seed)
    layers = [
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=2, dilation=2),
        nn.ReLU(),
    ]
    network = nn.Sequential(*layers, nn.Conv2d(16, 2, 1))
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
    beta, gate_over = row.get("beta", 0.5), row.get("gate_over", "all")
    opened = []
    for _ in range(steps):
        pick = torch.randint(TRAINING, (BATCH,), generator=generator)
        logits, truth = network(image[pick]), noisy[pick]
        loss = F.cross_entropy(logits.detach(), truth, row.get("class_weight"), reduction="none")
        gate = gate_mean(gate_terms(loss, truth, truth >= 0, gate_over, 2))
        opened.append(float(gate < beta))
        optimizer.zero_grad()
        pretended_under_fitting_loss(logits, truth, **row).backward()
        optimizer.step()
    image, mask = draw(SCORING, generator)
    with torch.no_grad():
        found = network(image).argmax(1)
    return float(iou_from_confusion(confusion_matrix(found, mask, 2))[1]), statistics.fmean(opened)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=250)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "pretended under-fitting")  # the table says it
    start = time.process_time()
    share = statistics.fmean(
        float(draw(TRAINING, torch.Generator().manual_seed(seed))[1].float().mean())
        for seed in range(options.seeds)
    )
    print("| loss | IoU | of each seed | open |\n|---|--:|---|--:|")
    for name, row in ROWS.items():
        scores, opened = zip(*(train(row, seed, options.steps) for seed in range(options.seeds)), strict=True)
        each = ", ".join(f"{score:.3f}" for score in scores)
        print(
            f"| {name} | {statistics.fmean(scores):.3f} | {each} | {statistics.fmean(opened):.0%} |",
            flush=True,
        )
    print(f"\n{share:.1%} foreground, {options.steps} steps, {time.process_time() - start:.0f} CPU s")


if __name__ == "__main__":
    main()
