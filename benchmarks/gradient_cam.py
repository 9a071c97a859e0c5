"""Grad-CAM of several classes an image against grad-cam and torchcam: CPU time of one thread, maps, memory.

    pip install grad-cam torchcam torchvision
    OMP_NUM_THREADS=1 python benchmarks/gradient_cam.py [--rounds 2]

torchvision's ResNet-50 with random weights and 20 classes, 8 images of 448 x 448, 3 classes each. grad-cam
takes one class of each image a call, with a forward pass and a backward pass through the whole network.
torchcam is called in its fast way: one forward pass, then one call a class. Each round runs all ways in turn;
a ratio is the median over the rounds. Maps are compared after the normalisation and resizing that a peer
forces. Memory is looked at over 200 calls on a small network.
"""

import argparse
import gc
import resource
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pseudolabel.cam import CAM, GradCAM, normalize_cam

IMAGES, SIZE, CLASSES, PRESENT, CALLS = 8, 448, 20, 3, 200
OPERATORS = []  # operators live as long as their library is referred to


def network() -> nn.Module:
    """ResNet-50; torchvision is imported beside any torch build by declaring the operators it looks for."""
    try:
        import torchvision
    except RuntimeError:
        import sys

        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        OPERATORS.append(torch.library.Library("torchvision", "FRAGMENT"))
        for name in ("nms", "qnms"):
            OPERATORS[0].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision
    torch.manual_seed(0)
    return torchvision.models.resnet50(num_classes=CLASSES).eval()


def listed(labels: Tensor) -> list[list[int]]:
    """The k-th present class of each image, for each k."""
    return labels.nonzero()[:, 1].view(IMAGES, PRESENT).T.tolist()


def ours(model: nn.Module, image: Tensor, labels: Tensor, layer: str, relu: bool = True) -> Tensor:
    with GradCAM(model, layer, relu=relu) as cam:
        return cam(image, labels)


def plain(model: nn.Module, image: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad(), CAM(model) as cam:
        return cam(image).relu() * labels[:, :, None, None]


def by_torchcam(model: nn.Module, image: Tensor, labels: Tensor, layer: str) -> Tensor:
    from torchcam.methods import GradCAM as Peer

    with Peer(model, layer) as cam:
        scores = model(image)
        lists = listed(labels)
        found = [cam(classes, scores, retain_graph=k < len(lists) - 1)[0] for k, classes in enumerate(lists)]
    return torch.stack(found, 1)


def by_grad_cam(model: nn.Module, image: Tensor, labels: Tensor, trained: str = "") -> Tensor:
    from pytorch_grad_cam import GradCAM as Peer
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(trained))
    found = []
    with Peer(model=model, target_layers=[model.layer4[-1]]) as cam:
        for classes in listed(labels):
            targets = [ClassifierOutputTarget(c) for c in classes]
            found.append(torch.from_numpy(cam(input_tensor=image, targets=targets)))
    model.zero_grad()
    model.requires_grad_(True)
    return torch.stack(found, 1)


def seconds(work: Callable[[], Tensor]) -> tuple[float, Tensor]:
    gc.collect()
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def normalised(maps: Tensor, labels: Tensor, eps: float, size: int = 0) -> Tensor:
    """Present classes' maps (B,P,h,w), min-max as the peers do; as grad-cam does, resized and once more."""
    maps = maps[labels.bool()].view(IMAGES, PRESENT, *maps.shape[2:])
    maps = normalize_cam(maps, "minmax", eps=eps)
    if size:
        maps = normalize_cam(F.interpolate(maps, size=(size, size), mode="bilinear"), "minmax", eps=eps)
    return maps


def times(rounds: int) -> Iterator[str]:
    model = network()
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(IMAGES, 3, SIZE, SIZE, generator=generator)
    labels = torch.zeros(IMAGES, CLASSES)
    labels.scatter_(1, torch.rand(IMAGES, CLASSES, generator=generator).topk(PRESENT).indices, 1)
    ways: dict[str, Callable[[], Tensor]] = {
        "`GradCAM`, `layer4`": lambda: ours(model, image, labels, "layer4"),
        "`CAM`": lambda: plain(model, image, labels),
        "torchcam, `layer4`": lambda: by_torchcam(model, image, labels, "layer4"),
        "grad-cam, as documented": lambda: by_grad_cam(model, image, labels),
        "grad-cam, all but `layer4` frozen by hand": lambda: by_grad_cam(model, image, labels, "layer4"),
        "`GradCAM`, `layer3`": lambda: ours(model, image, labels, "layer3"),
        "torchcam, `layer3`": lambda: by_torchcam(model, image, labels, "layer3"),
    }
    first, second = list(ways)[:2]
    taken: dict[str, list[float]] = {name: [] for name in ways}
    maps: dict[str, Tensor] = {}
    ways[first]()
    for _ in range(rounds):
        for name, work in ways.items():
            cost, maps[name] = seconds(work)
            taken[name].append(cost)
    yield f"| way | CPU s | against {first} | against {second} |"
    yield "|---|--:|--:|--:|"
    for name, costs in taken.items():
        ratios = [
            statistics.median(cost / base for cost, base in zip(costs, taken[other], strict=True))
            for other in (first, second)
        ]
        yield f"| {name} | {statistics.median(costs):.1f} | {ratios[0]:.2f} | {ratios[1]:.2f} |"
    yield ""
    yield "| largest difference of normalised maps | |"
    yield "|---|--:|"
    raw = ours(model, image, labels, "layer4", relu=False).clamp(min=0)
    peers = {
        "`CAM`": (normalised(maps["`CAM`"], labels, 1e-8), normalised(raw, labels, 1e-8)),
        "torchcam, `layer4`": (maps["torchcam, `layer4`"], normalised(raw, labels, 1e-8)),
        "torchcam, `layer3`": (
            maps["torchcam, `layer3`"],
            normalised(maps["`GradCAM`, `layer3`"], labels, 1e-8),
        ),
        "grad-cam, as documented": (maps["grad-cam, as documented"], normalised(raw, labels, 1e-7, SIZE)),
    }
    for name, (theirs, own) in peers.items():
        yield f"| {name} | {(theirs - own).abs().max().item():.1e} |"


def memory() -> str:
    """What 200 calls leave: tensors, and growth of the process at its peak."""
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.Flatten(), nn.Linear(32 * 60**2, 5)
    )
    cam, image, labels = GradCAM(model, "1"), torch.rand(4, 3, 64, 64), torch.ones(4, 5)

    def state() -> tuple[int, float]:
        tensors = sum(issubclass(type(value), Tensor) for value in gc.get_objects())
        return tensors, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    for _ in range(20):
        cam(image, labels)
    before = state()
    for _ in range(CALLS):
        cam(image, labels)
    after = state()
    return (
        f"{CALLS} calls: {after[0] - before[0]} tensors more, peak memory {after[1] - before[1]:.1f} MiB more"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2, help="runs of each way")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(memory(), flush=True)
    print("\n".join(times(arguments.rounds)))


if __name__ == "__main__":
    main()
