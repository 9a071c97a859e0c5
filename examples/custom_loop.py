"""Train a segmenter on pseudo masks: image-level labels -> classifier -> maps -> masks -> segmenter.

    python examples/custom_loop.py            # some seconds on a CPU

All but the four marked lines is an ordinary PyTorch training loop; put your data and networks in their place.
The scenes are drawn: a coloured disc, a square, or both, on noise. Their true masks serve the scores alone.
"""

import argparse

import torch
from torch import Tensor, nn

import pseudolabel as pl

DISC, SQUARE = 1, 2  # values in a mask; the classes 0 and 1 of labels and maps


def draw_scenes(count: int, seed: int, size: int = 48) -> tuple[Tensor, Tensor, Tensor]:
    """Images (N,3,H,W), labels (N,2) and true masks (N,H,W)."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    image = 0.35 + 0.3 * torch.rand(count, 3, size, size, generator=generator)
    labels = torch.rand(count, 2, generator=generator) < 0.6
    centre = size * (0.25 + 0.5 * torch.rand(count, 2, 2, 1, 1, generator=generator))
    disc = ((y - centre[:, 0, 0]) ** 2 + (x - centre[:, 0, 1]) ** 2 < (size / 5) ** 2) & labels[:, :1, None]
    square = torch.maximum((y - centre[:, 1, 0]).abs(), (x - centre[:, 1, 1]).abs()) < size / 7
    square &= labels[:, 1:, None]
    truth = torch.zeros(count, size, size, dtype=torch.int64)
    truth[disc], truth[square] = DISC, SQUARE
    image[:, 0] += 0.35 * (truth == DISC)
    image[:, 2] += 0.35 * (truth == SQUARE)
    return image.clamp(0, 1), labels, truth


def small_network(outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 16, 5, padding=2),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, outputs, 1),
    )


def train(network: nn.Module, inputs: Tensor, targets: Tensor, loss_of: nn.Module, steps: int) -> None:
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        batch = torch.randint(len(inputs), (16,), generator=generator)
        loss = loss_of(network(inputs[batch]), targets[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def main(argv: list[str] | None = None) -> float:
    """Run, print the scores, and return the segmenter's mIoU."""
    parser = argparse.ArgumentParser(description="Train a segmenter on pseudo masks.")
    parser.add_argument("--steps", type=int, default=120, help="of each training (default: 120)")
    parser.add_argument("--images", type=int, default=96, help="scenes to train on (default: 96)")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    image, labels, truth = draw_scenes(args.images, seed=0)

    classifier = nn.Sequential(small_network(2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    train(classifier, image - 0.5, labels.float(), nn.BCEWithLogitsLoss(), args.steps)

    with torch.no_grad(), pl.cam.CAM(classifier) as cam:  # 1: the library reads maps off the classifier
        maps = pl.cam.multi_scale_cam(cam, image - 0.5, labels, scales=(1.0, 1.5))  # 2: several views
    maps = pl.cam.normalize_cam(maps)  # 3: in [0, 1]
    mask = pl.masks.proportional_pseudo_mask(image, maps, labels, alpha=2)  # 4: masks to train on

    segmenter = small_network(3)
    train(segmenter, image - 0.5, mask, nn.CrossEntropyLoss(ignore_index=255), args.steps)

    unseen, _, unseen_truth = draw_scenes(32, seed=1)
    metric = pl.metrics.PseudoLabelMetric(3, class_names=["background", "disc", "square"])
    metric.update(mask, truth)
    print(f"pseudo masks            mIoU {metric.compute().miou:.3f}")
    metric.reset()
    with torch.no_grad():
        metric.update(segmenter(unseen - 0.5).argmax(1), unseen_truth)
    result = metric.compute()
    print(f"segmenter, new scenes   mIoU {result.miou:.3f}")
    return result.miou


if __name__ == "__main__":
    main()
