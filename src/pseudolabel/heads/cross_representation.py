"""Cross-representation refinement: maps spread along what looks alike, shallow and deep features apart."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pseudolabel._checks import (
    check_choice,
    check_count,
    check_float,
    check_number,
    check_sequence,
    check_shapes,
)
from pseudolabel._maps import stretch
from pseudolabel.refine import cam_seed, pixel_correlation

__all__ = ["CrossRepresentationRefinement", "cross_representation_refine"]

Merge = Literal["mean", "sum"]


def cross_representation_refine(
    seed: Tensor,
    features: Sequence[Tensor],
    *,
    reduction: Merge = "mean",
    eps: float = 1e-5,
    chunk_size: int | None = None,
) -> Tensor:
    """Correlate maps with each of several features, and merge the results.

        refined = mean over f in features of pixel_correlation(seed, f)

    The affinities are merged after they did their work, not before: a pixel may follow its colour in one and
    its meaning in the other. The order of the features does not matter.

    Args:
        seed: Scores (B,1+C,h',w'), background first: `refine.cam_seed`. Any maps will do.
        features: Features (B,D_i,h,w) on one grid, such as shallow and deep ones. At least one.
        reduction: `mean` (official program), or `sum` (figure of the paper). What is normalised afterwards
            does not see the difference; `min_pooling_loss` does.
        eps: Guard of the divisions, > 0.
        chunk_size: See `refine.pixel_correlation`.

    Returns:
        Refined scores (B,1+C,h,w) in the dtype of ``seed``.

    Raises:
        TypeError: If a tensor is not floating-point.
        ValueError: If there are no features, shapes do not fit, or a setting is out of range.

    Examples:
        >>> import torch
        >>> seed = torch.tensor([[[[1.0, 0.0, 0.0]]]])
        >>> deep = torch.tensor([[[[1.0, 1.0, 0.0]], [[0.0, 0.0, 1.0]]]])  # the first two are alike
        >>> shallow = torch.tensor([[[[1.0, 0.0, 0.0]], [[0.0, 1.0, 1.0]]]])  # the last two are
        >>> cross_representation_refine(seed, [deep, shallow])
        tensor([[[[0.7500, 0.2500, 0.0000]]]])

    Source:
        As `CrossRepresentationRefinement`.
    """
    check_choice("reduction", reduction, Merge)
    check_shapes(seed=(seed, "B 1+C h' w'"))
    check_float(seed=seed)
    check_sequence(features=features)
    if not len(features):
        raise ValueError("features: expected at least one tensor, got none")
    for number, f in enumerate(features):
        check_shapes(
            seed=(seed, "B 1+C h' w'"),
            **{"features[0]": (features[0], "B D h w"), f"features[{number}]": (f, "B Di h w")},
        )
    refined = torch.stack([pixel_correlation(seed, f, eps=eps, chunk_size=chunk_size) for f in features])
    return refined.mean(0) if reduction == "mean" else refined.sum(0)


class CrossRepresentationRefinement(nn.Module):
    """Refines the maps of a classifier by what its backbone saw, near the image and far from it.

        g_i     = relu(W_i tap_i)                            fewer channels
        shallow = W_s [image; g of the shallow taps]
        deep    = W_d [g of the deep taps]
        refined = (pixel_correlation(seed, shallow) + pixel_correlation(seed, deep)) / 2

    All `W` are 1x1 convolutions without bias. The seed is `refine.cam_seed` of the maps, and has no gradient;
    taps and image are stretched to the grid of the maps. Nothing but the refined maps trains the
    convolutions: give them a loss, such as `losses.equivariant_cross_loss` and `losses.min_pooling_loss`.

    Args:
        shallow_channels: Channels of the shallow taps; may be empty with ``use_image``.
        deep_channels: Channels of the deep taps, one at least. The defaults are those of the stages conv4
            (shallow), conv5 and conv6 (deep) of a WideResNet38.
        shallow_reduce: Channels that each shallow tap is reduced to.
        deep_reduce: Channels that each deep tap is reduced to.
        shallow_embed: Channels of the shallow features.
        deep_embed: Channels of the deep features.
        use_image: The shallow features contain the image as well, which ``forward`` then needs.
        detach: Send no gradient to the taps (official).
        reduction: See `cross_representation_refine`.
        eps: Guard of the divisions, > 0.
        chunk_size: See `refine.pixel_correlation`: bounds the memory on large grids.

    Raises:
        ValueError: If a number is below 1, counts differ, or a branch has no input.

    Examples:
        >>> import torch
        >>> refine = CrossRepresentationRefinement([8], [16, 32], shallow_reduce=[4], deep_reduce=[5, 6])
        >>> cam, image = torch.randn(2, 3, 6, 9), torch.rand(2, 3, 48, 72)
        >>> shallow, deep = [torch.rand(2, 8, 12, 18)], [torch.rand(2, 16, 6, 9), torch.rand(2, 32, 6, 9)]
        >>> refine(cam, shallow, deep, image).shape  # with the background in front
        torch.Size([2, 4, 6, 9])

    Source:
        Wang, Zhang and Yan, "Boosting Weakly-Supervised Image Segmentation via Representation, Transform, and
        Compensator" (RTC), 2023 (IEEE TCSVT 2024), its CRR. Formulas and defaults are read off the official
        implementation at 9c777e0, which this matches, values and gradients; of the paper the abstract and the
        overview figure were at hand. Other numbers of taps, and a gradient to them, are ours.
    """

    def __init__(
        self,
        shallow_channels: Sequence[int] = (512,),
        deep_channels: Sequence[int] = (1024, 4096),
        *,
        shallow_reduce: Sequence[int] = (64,),
        deep_reduce: Sequence[int] = (128, 128),
        shallow_embed: int = 64,
        deep_embed: int = 128,
        use_image: bool = True,
        detach: bool = True,
        reduction: Merge = "mean",
        eps: float = 1e-5,
        chunk_size: int | None = None,
    ) -> None:
        super().__init__()
        check_choice("reduction", reduction, Merge)
        check_number("eps", eps, above=0)
        _check_channels("shallow", shallow_channels, shallow_reduce)
        _check_channels("deep", deep_channels, deep_reduce)
        check_count(shallow_embed=shallow_embed, deep_embed=deep_embed)
        if not len(shallow_channels) and not use_image:
            raise ValueError("shallow_channels: expected at least one tap without use_image, got none")
        if not len(deep_channels):
            raise ValueError("deep_channels: expected at least one tap, got none")
        if chunk_size is not None:
            check_count(chunk_size=chunk_size)
        self.use_image = use_image
        self.detach = detach
        self.reduction: Merge = reduction
        self.eps = eps
        self.chunk_size = chunk_size

        self.reduce_shallow = _reducers(shallow_channels, shallow_reduce)
        self.reduce_deep = _reducers(deep_channels, deep_reduce)
        self.embed_shallow = _conv1x1(3 * use_image + sum(shallow_reduce), shallow_embed)
        self.embed_deep = _conv1x1(sum(deep_reduce), deep_embed)
        nn.init.xavier_uniform_(self.embed_shallow.weight)
        nn.init.xavier_uniform_(self.embed_deep.weight, gain=4)

    def forward(
        self, cam: Tensor, shallow: Sequence[Tensor], deep: Sequence[Tensor], image: Tensor | None = None
    ) -> Tensor:
        """Refine raw maps (B,C,h,w) to scores (B,1+C,h,w), background first.

        Args:
            cam: Raw maps of foreground classes; no gradient flows to them.
            shallow: Taps (B,D_i,h_i,w_i) of the first layers, in the order of ``shallow_channels``.
            deep: Taps of the last layers, in the order of ``deep_channels``.
            image: Images (B,3,H,W) as the network sees them, normalised; with ``use_image`` only.
        """
        check_shapes(cam=(cam, "B C h w"))
        if (image is None) == self.use_image:
            wanted = "images (B, 3, H, W) with use_image" if self.use_image else "None without use_image"
            came = "None" if image is None else f"a tensor of shape {tuple(image.shape)}"
            raise ValueError(f"image: expected {wanted}, got {came}")
        size = (cam.shape[2], cam.shape[3])
        colours = []
        if image is not None:
            check_shapes(cam=(cam, "B C h w"), image=(image, "B 3 H W"))
            colours = [stretch(image, size)]
        shallow = colours + self._reduce("shallow", shallow, self.reduce_shallow, cam)
        deep = self._reduce("deep", deep, self.reduce_deep, cam)
        features = [self.embed_shallow(torch.cat(shallow, 1)), self.embed_deep(torch.cat(deep, 1))]
        return cross_representation_refine(
            cam_seed(cam.detach(), self.eps),
            features,
            reduction=self.reduction,
            eps=self.eps,
            chunk_size=self.chunk_size,
        )

    def _reduce(self, name: str, taps: Sequence[Tensor], convs: nn.ModuleList, cam: Tensor) -> list[Tensor]:
        if len(taps) != len(convs):
            raise ValueError(f"{name}: expected {len(convs)} taps, got {len(taps)}")
        reduced = []
        for number, (tap, conv) in enumerate(zip(taps, convs, strict=True)):
            wanted = f"B {conv.in_channels} hi wi"
            check_shapes(**{"cam": (cam, "B C h w"), f"{name}[{number}]": (tap, wanted)})
            g = F.relu(conv(tap.detach() if self.detach else tap))
            reduced.append(stretch(g, (cam.shape[2], cam.shape[3])))
        return reduced

    def extra_repr(self) -> str:
        """Settings, for `print`."""
        return (
            f"use_image={self.use_image}, detach={self.detach}, reduction={self.reduction!r}, "
            f"eps={self.eps}, chunk_size={self.chunk_size}"
        )


def _reducers(channels: Sequence[int], reduce: Sequence[int]) -> nn.ModuleList:
    convs = [_conv1x1(before, after) for before, after in zip(channels, reduce, strict=True)]
    for conv in convs:
        nn.init.kaiming_normal_(conv.weight)
    return nn.ModuleList(convs)


def _conv1x1(before: int, after: int) -> nn.Conv2d:
    return nn.Conv2d(before, after, 1, bias=False)


def _check_channels(branch: str, channels: Sequence[int], reduce: Sequence[int]) -> None:
    if len(channels) != len(reduce):
        raise ValueError(
            f"{branch}_reduce: expected {len(channels)} numbers as in {branch}_channels, got {len(reduce)}"
        )
    for before, after in zip(channels, reduce, strict=True):
        check_count(**{f"{branch}_channels": before, f"{branch}_reduce": after})
