"""ViTMatte: a matting network that has been trained on alpha mattes, so with more than image-level labels."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pseudolabel._checks import (
    check_callable,
    check_count,
    check_float,
    check_shapes,
    check_unit_range,
)
from pseudolabel.matting._classes import check_inputs, join_mattes, known_pixels

__all__ = ["ViTMatte", "vitmatte_matting"]

SIZE_DIVISOR = 32


def vitmatte_matting(image: Tensor, trimap: Tensor, model: nn.Module, *, batch_size: int = 1) -> Tensor:
    """Let a ViTMatte network predict mattes, of each present class by itself.

    The network sees `[2 image - 1, trimap]`, padded by zeros at the right and below to multiples of 32. Known
    pixels stay as the trimap has them. Where mattes of several classes sum to more than 1 they are divided by
    their sum.

    **Extra supervision**: such networks are trained on alpha mattes. List results with them apart from those
    of image-level labels alone, and mind the licence of the weights and of the data behind them.

    Args:
        image: Images (B,3,H,W) in [0, 1].
        trimap: Trimaps (B,C,H,W): 1 foreground, 0 background, 0.5 unknown; see `closed_form_matting`.
        model: A `VitMatteForImageMatting` of the package transformers, or any module that returns `alphas`
            (N,1,h,w) in [0, 1] for (N,4,h,w). It runs as it is: put it in evaluation mode first.
        batch_size: Mattes computed at a time, >= 1. Memory grows with it, and fast with the image.

    Returns:
        Mattes (B,C,H,W) in [0, 1], in the dtype of ``trimap``. No gradients.

    Raises:
        TypeError: If a tensor is not floating-point.
        ValueError: If shapes or values do not fit, or a setting is out of range.

    Examples:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> class Half(torch.nn.Module):  # in the place of the network
        ...     def forward(self, x):
        ...         return SimpleNamespace(alphas=x[:, 3:] * 0.6)
        >>> vitmatte_matting(torch.rand(1, 3, 1, 3), torch.tensor([[[[1.0, 0.5, 0.0]]]]), Half())
        tensor([[[[1.0000, 0.3000, 0.0000]]]])

    Source:
        Yao et al., "ViTMatte: Boosting Image Matting with Pre-trained Plain Vision Transformers", Information
        Fusion 2024; the input is prepared as by `VitMatteImageProcessor` of transformers.
    """
    check_inputs(image, trimap)
    check_callable(model=model)
    check_count(batch_size=batch_size)
    known, seeds = known_pixels(trimap.detach())
    present = (trimap > 0).flatten(2).any(2) & ~known.flatten(2).all(2)
    b, c = present.nonzero(as_tuple=True)
    network_input = torch.cat([2 * image[b] - 1, seeds.where(known, 0.5)[b, c, None].to(image)], 1)
    height, width = network_input.shape[2:]
    network_input = F.pad(network_input, (0, -width % SIZE_DIVISOR, 0, -height % SIZE_DIVISOR))
    alpha = torch.zeros_like(seeds)
    if len(b) > 0:
        with torch.no_grad():
            found = [
                _alphas(model, part)[:, 0, :height, :width] for part in torch.split(network_input, batch_size)
            ]
        alpha[b, c] = torch.cat(found).to(alpha.dtype)
    return join_mattes(alpha, known, seeds)


def _alphas(model: nn.Module, network_input: Tensor) -> Tensor:
    """Mattes (N,1,H,W) that the network returns for its input, checked."""
    alphas: Tensor = getattr(model(network_input), "alphas", None)  # type: ignore[assignment]
    n, _, height, width = network_input.shape
    check_shapes(**{"model(image).alphas": (alphas, f"{n} 1 {height} {width}")})
    check_float(**{"model(image).alphas": alphas})
    check_unit_range(**{"model(image).alphas": alphas})  # type: ignore[arg-type]
    return alphas


class ViTMatte(nn.Module):
    """Module twin of `vitmatte_matting`, which holds the network.

    Args:
        model: The network, or a local folder with its configuration and `model.safetensors`, as
            `save_pretrained` writes it. Nothing is downloaded, nothing is unpickled.
        batch_size: Mattes computed at a time, >= 1.
    """

    extra_supervision = True
    """The network has learnt from alpha mattes."""

    def __init__(self, model: nn.Module | str | Path, *, batch_size: int = 1) -> None:
        super().__init__()
        check_count(batch_size=batch_size)
        self.model = model if isinstance(model, nn.Module) else _load(Path(model))
        self.batch_size = batch_size

    def forward(self, image: Tensor, trimap: Tensor) -> Tensor:
        """See `vitmatte_matting`."""
        return vitmatte_matting(image, trimap, self.model, batch_size=self.batch_size)

    def extra_repr(self) -> str:
        """Settings, for `print`."""
        return f"batch_size={self.batch_size}"


def _load(folder: Path) -> nn.Module:
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"model: expected a network or a folder with its model.safetensors, got {str(folder)!r}. "
            "Nothing is downloaded here: fetch it first, or pass the network itself"
        )
    try:
        from transformers import VitMatteForImageMatting  # noqa: PLC0415 - an extra
    except Exception as error:
        raise ImportError(
            f"transformers cannot be imported ({type(error).__name__}: {error}). "
            'Install it by pip install "pseudolabel[hub]"'
        ) from error
    model: nn.Module = VitMatteForImageMatting.from_pretrained(
        folder, local_files_only=True, use_safetensors=True
    )
    return model.eval()
