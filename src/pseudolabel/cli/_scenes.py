"""Drawn scenes with known masks: what `pseudolabel demo` runs on, with nothing to download.

The scenes are built to be hard where real photos are hard. Every object wears a *mark*, a small part that
gives its class away, on a body whose colour it shares with other classes and with the clutter behind: a
classifier looks at the mark, and its activation maps miss the rest, more so for some classes than for others.
Objects overlap, small ones on top of big ones; some classes are common and some rare; two come mostly
together; one likes a background of its own.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["CLASSES", "draw_scenes"]

CLASSES = ("background", "fish", "beetle", "star", "leaf", "ring", "house")
FREQUENCY = (0.30, 0.24, 0.18, 0.12, 0.09, 0.07)  # of the first object of a scene, class by class
BEETLE, LEAF, FISH = (CLASSES.index(name) - 1 for name in ("beetle", "leaf", "fish"))
MAX_OBJECTS, CLUTTER = 3, 9
# Body and clutter colours: one pool for all, so that colour alone tells little.
POOL = torch.tensor(
    [
        [0.55, 0.42, 0.30],
        [0.32, 0.44, 0.58],
        [0.45, 0.55, 0.32],
        [0.62, 0.56, 0.42],
        [0.50, 0.34, 0.42],
        [0.38, 0.38, 0.40],
        [0.66, 0.48, 0.44],
        [0.34, 0.52, 0.50],
    ],
    dtype=torch.float32,
    device="cpu",
)

Shape = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def _box(u: Tensor, v: Tensor, half_u: float, half_v: float) -> Tensor:
    return torch.maximum(u.abs() - half_u, v.abs() - half_v)


def _disc(u: Tensor, v: Tensor, radius: float) -> Tensor:
    return torch.hypot(u, v) - radius


def _wave(x: Tensor, period: float) -> Tensor:
    return 0.5 + 0.5 * torch.sin(x * (2 * torch.pi / period))


# A shape takes coordinates (u to the right, v down, 1 = the object's radius) and returns three maps: the
# signed distance to the body (negative inside), the one to the mark, and the mark's pattern in [0, 1].


def _fish(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    body = 0.5 * (torch.hypot((u - 0.15) / 0.85, v / 0.46) - 1)
    tail = torch.maximum(v.abs() - 0.55 * (-u - 0.35), -u - 1.0)
    head = torch.maximum(body, 0.45 - u)
    return torch.minimum(body, tail), head, _wave(u, 0.22)


def _beetle(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    body = 0.7 * (torch.hypot(u / 0.92, v / 0.7) - 1)
    return body, torch.maximum(body, 0.42 - u), _wave(u, 0.3) * _wave(v, 0.3)


def _star(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    radius, fifth = torch.hypot(u, v), 2 * torch.pi / 5
    fold = (torch.atan2(v, u).remainder(fifth) - fifth / 2).abs()  # 0 in the middle between two points
    # The edge from the inner corner (0.5, 0) to the tip, which lies at the folded angle pi / 5.
    x, y = radius * torch.cos(fold), radius * torch.sin(fold)
    along, across = math.cos(math.pi / 5) - 0.5, math.sin(math.pi / 5)
    body = ((x - 0.5) * across - y * along) / math.hypot(along, across)
    return body, _disc(u, v, 0.3), _wave(radius, 0.2)


def _leaf(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    body = torch.maximum(_disc(u, v - 0.55, 1.1), _disc(u, v + 0.55, 1.1))
    return body, torch.maximum(body, u.abs() - 0.2), _wave(u + v.abs(), 0.25)


def _ring(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    radius = torch.hypot(u, v)
    body = (radius - 0.68).abs() - 0.28
    sector = torch.maximum(body, 0.75 * v.abs() - u)
    return body, sector, _wave(torch.atan2(v, u), 0.35)


def _house(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    roof = torch.maximum(0.7 * (u.abs() - v - 0.95), v + 0.15)
    body = torch.minimum(_box(u, v - 0.35, 0.68, 0.5), roof)
    return body, _box(u, v - 0.3, 0.32, 0.3), ((_wave(u, 0.3) - 0.5) * (_wave(v, 0.3) - 0.5) > 0).to(u)


SHAPES: tuple[Shape, ...] = (_fish, _beetle, _star, _leaf, _ring, _house)
MARKS = torch.tensor(  # the colour of each class's mark
    [
        [0.98, 0.58, 0.12],
        [0.88, 0.10, 0.12],
        [0.98, 0.90, 0.25],
        [0.25, 0.85, 0.25],
        [0.15, 0.35, 0.95],
        [0.97, 0.95, 0.85],
    ],
    dtype=torch.float32,
    device="cpu",
)
FAINT = (0.5, 0.1, 0.3, 0.5, 0.1, 0.2)  # strength of the pattern on the rest of the body, class by class


def _noise(count: int, size: tuple[int, int], cells: int, generator: torch.Generator) -> Tensor:
    """Smooth noise (count,1,H,W) in [0, 1] with about ``cells`` bumps along each side."""
    coarse = torch.rand(count, 1, cells, cells, generator=generator)
    return F.interpolate(coarse, size=size, mode="bicubic", align_corners=False).clamp(0, 1)


def _local_grid(
    size: tuple[int, int], centre: Tensor, radius: Tensor, angle: Tensor
) -> tuple[Tensor, Tensor]:
    """Coordinates (n,H,W) of all pixels in the frame of each object."""
    y = torch.arange(size[0])[None, :, None] + 0.5 - centre[:, 0, None, None]
    x = torch.arange(size[1])[None, None, :] + 0.5 - centre[:, 1, None, None]
    cos, sin = (torch.cos(angle) / radius)[:, None, None], (torch.sin(angle) / radius)[:, None, None]
    return x * cos + y * sin, y * cos - x * sin


def _paint(image: Tensor, cover: Tensor, colour: Tensor) -> Tensor:
    return image + cover.unsqueeze(1) * (colour - image)


def _backgrounds(first: Tensor, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Two noisy colours mixed, with clutter in the colours of the objects; water for most of the fish."""
    count = len(first)
    pick = torch.randint(len(POOL), (2, count), generator=generator)
    near, far = (POOL[index] + 0.16 * torch.randn(count, 3, generator=generator) for index in pick)
    water = (first == FISH) & (torch.rand(count, generator=generator) < 0.6)
    near[water] = torch.tensor([0.30, 0.50, 0.66]) + 0.05 * torch.randn(
        int(water.sum()), 3, generator=generator
    )
    mix = 0.65 * _noise(count, size, 4, generator) + 0.35 * _noise(count, size, 14, generator)
    image = torch.lerp(near[:, :, None, None], far[:, :, None, None], mix)
    for _ in range(CLUTTER):
        place, stretch, angle = (torch.rand(count, n, generator=generator) for n in (2, 2, 1))
        radius = min(size) * (0.03 + 0.09 * stretch[:, 0])
        u, v = _local_grid(size, place * torch.tensor(size), radius, 2 * torch.pi * angle[:, 0])
        thin = (0.25 + stretch[:, 1])[:, None, None]
        edge = (torch.hypot(u, v / thin) - 1) * thin * radius[:, None, None]
        pick = torch.randint(len(POOL), (count,), generator=generator)
        colour = (POOL[pick] + 0.1 * torch.randn(count, 3, generator=generator))[:, :, None, None]
        image = _paint(image, (0.5 - edge).clamp(0, 1), colour)
    return image


def _classes(count: int, generator: torch.Generator) -> Tensor:
    """Classes (count,3) of the objects of each scene, -1 where there is none."""
    frequency = torch.tensor(FREQUENCY)
    classes = torch.multinomial(
        frequency.expand(count, -1), MAX_OBJECTS, replacement=True, generator=generator
    )
    lucky = torch.rand(count, MAX_OBJECTS, generator=generator)
    beetle = (classes[:, 0] == BEETLE) & (lucky[:, 0] < 0.5)
    classes[beetle, 1] = LEAF  # a beetle sits by its leaf
    classes[:, 1][~beetle & (lucky[:, 1] > 0.55)] = -1
    classes[:, 2][(classes[:, 1] < 0) | (lucky[:, 2] > 0.35)] = -1
    return classes


def draw_scenes(
    count: int, size: tuple[int, int] = (96, 96), *, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw scenes of one to three objects, and the masks that belong to them.

    Args:
        count: Number of scenes N.
        size: Height and width (H,W).
        generator: Source of all randomness.

    Returns:
        Images (N,3,H,W) in [0, 1]; masks (N,H,W) int64, values in the order of `CLASSES`; labels (N,C) bool,
        the classes that the mask of the scene shows.

    Examples:
        >>> images, masks, labels = draw_scenes(4, generator=torch.Generator().manual_seed(0))
        >>> images.shape, masks.shape, labels.shape
        (torch.Size([4, 3, 96, 96]), torch.Size([4, 96, 96]), torch.Size([4, 6]))
    """
    classes = _classes(count, generator)
    image = _backgrounds(classes[:, 0], size, generator)
    mask = torch.zeros(count, *size, dtype=torch.int64)
    # Radii fall from one object to the next: small ones lie on top of big ones.
    radius = torch.rand(count, MAX_OBJECTS, generator=generator).sort(descending=True).values
    radius = min(size) * (0.14 + 0.20 * radius)
    first = 0.25 + 0.5 * torch.rand(count, 2, generator=generator)
    for slot in range(MAX_OBJECTS):
        apart = torch.rand(count, 2, generator=generator) - 0.5  # objects gather round the first one
        place = (first + min(slot, 1) * 0.7 * apart).clamp(0.12, 0.88)
        turn = 2 * torch.pi * torch.rand(count, generator=generator)
        pick = torch.randint(len(POOL), (count,), generator=generator)
        body_colour = (POOL[pick] + 0.10 * torch.randn(count, 3, generator=generator)).clamp(0.1, 0.9)
        grain = _noise(count, size, 24, generator) - 0.5
        for label, shape in enumerate(SHAPES):
            chosen = (classes[:, slot] == label).nonzero()[:, 0]
            if len(chosen) == 0:
                continue
            upright = turn[chosen] * (0.08 if CLASSES[label + 1] in ("house", "fish") else 1.0)
            scale = radius[chosen, slot]
            u, v = _local_grid(size, place[chosen] * torch.tensor(size), scale, upright)
            body, mark, pattern = shape(u, v)
            reach = scale[:, None, None]
            shade = 1 - 0.15 * (u + v).clamp(-1, 1).unsqueeze(1)
            colour = body_colour[chosen][:, :, None, None] * shade + 0.16 * grain[chosen]
            # The pattern is strong on the mark, faint elsewhere; the body's colour shows between its lines.
            strength = FAINT[label] + (1 - FAINT[label]) * (0.5 - mark * reach).clamp(0, 1)
            colour = _paint(colour, strength * pattern, MARKS[label][:, None, None])
            image[chosen] = _paint(image[chosen], (0.5 - body * reach).clamp(0, 1), colour)
            mask[chosen] = torch.where(body < 0, label + 1, mask[chosen])
    image = image + 0.03 * torch.randn(image.shape, generator=generator)
    labels = F.one_hot(mask, len(CLASSES)).flatten(1, 2).any(1)[:, 1:]
    return image.clamp(0, 1), mask, labels
