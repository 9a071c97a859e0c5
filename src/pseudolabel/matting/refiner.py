"""One front for all methods of matting that need no network."""

import inspect
from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn import functional as F

from pseudolabel._checks import check_choice, check_number
from pseudolabel._maps import clamp_keeping_slope, resize, working_dtype
from pseudolabel.matting._classes import check_inputs, known_pixels
from pseudolabel.matting.closed_form import closed_form_matting
from pseudolabel.matting.guided_filter import guided_filter_matting
from pseudolabel.matting.knn import knn_matting
from pseudolabel.matting.large_kernel import large_kernel_matting
from pseudolabel.matting.pymatting_matting import pymatting_matting
from pseudolabel.matting.random_walk import random_walk_matting

__all__ = ["MattingMethod", "MattingRefiner"]

MattingMethod = Literal["closed_form", "guided_filter", "knn", "large_kernel", "pymatting", "random_walk"]
METHODS: dict[str, Callable[..., Tensor]] = {
    "closed_form": closed_form_matting,
    "guided_filter": guided_filter_matting,
    "knn": knn_matting,
    "large_kernel": large_kernel_matting,
    "pymatting": pymatting_matting,
    "random_walk": random_walk_matting,
}
OF_AN_IMAGE = {"image", "guidance", "trimap", "prior", "x0", "return_report"}  # no settings


class MattingRefiner(nn.Module):
    """A method of matting with its settings: `refiner(image, trimap) -> alpha`.

    `ViTMatte`, which needs a network, is called alike.

    Args:
        method: Which of the functions `closed_form_matting`, `guided_filter_matting` and so on.
        scale: In (0, 1]. Below 1 the mattes are found on images of so much of the sides, and enlarged again;
            known pixels stay as the trimap has them. Half the sides take about a quarter of the time. A pixel
            then stands for several, and so does its `prior_weight`: for the same result divide that by
            `scale^2`.
        **settings: Of the function, by name.

    Raises:
        TypeError: If the function has no such setting.
        ValueError: If ``method`` is unknown or ``scale`` out of range.

    Examples:
        >>> import torch
        >>> image, trimap = torch.zeros(1, 3, 3, 4), torch.tensor([0.0, 0.5, 0.5, 1.0]).expand(1, 1, 3, 4)
        >>> MattingRefiner("random_walk", rtol=1e-6)(image, trimap)[0, 0, 0].round(decimals=3)
        tensor([0.0000, 0.3330, 0.6670, 1.0000])
    """

    def __init__(self, method: MattingMethod = "closed_form", *, scale: float = 1.0, **settings: Any) -> None:
        super().__init__()
        check_choice("method", method, MattingMethod)
        check_number("scale", scale, above=0, at_most=1)
        known = inspect.signature(METHODS[method]).parameters
        if method != "pymatting" and (wrong := settings.keys() - (known.keys() - OF_AN_IMAGE)):
            names = [name for name in known if name not in OF_AN_IMAGE]
            raise TypeError(f"settings: expected some of {names} for {method!r}, got {sorted(wrong)}")
        self.method: MattingMethod = method
        self.scale = scale
        self.settings = settings

    def forward(self, image: Tensor, trimap: Tensor, prior: Tensor | None = None) -> Tensor:
        """Find mattes.

        Args:
            image: Images (B,3,H,W) in [0, 1].
            trimap: Trimaps (B,C,H,W): 1 foreground, 0 background, 0.5 unknown.
            prior: Expected mattes (B,C,H,W). Not for method `pymatting`.

        Returns:
            Mattes (B,C,H,W) in [0, 1].
        """
        optional = {} if prior is None else {"prior": prior}
        if self.method == "pymatting" and prior is not None:
            raise ValueError("prior: expected None, method 'pymatting' takes none")
        solve = METHODS[self.method]
        if self.scale == 1:
            return solve(image, trimap, **optional, **self.settings)
        check_inputs(image, trimap)
        height, width = image.shape[2:]
        size = (max(3, round(self.scale * height)), max(3, round(self.scale * width)))
        optional = {name: _shrink(maps, size) for name, maps in optional.items()}
        given = F.interpolate(trimap, size=size, mode="nearest-exact")
        alpha = solve(_shrink(image, size), given, **optional, **self.settings)
        known, seeds = known_pixels(trimap)
        return seeds.where(known, resize(alpha, (height, width)))

    def extra_repr(self) -> str:
        """Settings, for `print`."""
        settings = {"scale": self.scale, **self.settings}
        return ", ".join([repr(self.method), *(f"{name}={value!r}" for name, value in settings.items())])


def _shrink(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Each pixel of the smaller maps is a mean."""
    small = F.interpolate(maps.to(working_dtype(maps)), size=size, mode="bilinear", antialias=True)
    return clamp_keeping_slope(small, 0, 1).to(maps.dtype)
