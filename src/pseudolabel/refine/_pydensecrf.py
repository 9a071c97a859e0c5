"""The dense CRF of the optional package pydensecrf, a C++ program on one CPU thread."""

import numpy as np
import torch
from torch import Tensor

__all__ = ["mean_field"]


def mean_field(
    pixels: Tensor,
    probs: Tensor,
    gaussian: tuple[float, float] | None,
    bilateral: tuple[float, float, float] | None,
    iterations: int,
) -> Tensor:
    """Run (B,3,H,W) pixels of 0..255 and (B,P,L,H,W) maps, one problem at a time."""
    try:
        from pydensecrf.densecrf import DenseCRF2D  # noqa: PLC0415 - optional, built from source
    except Exception as error:
        raise ImportError(
            f"backend 'pydensecrf' cannot be imported ({type(error).__name__}: {error}). "
            'Install it by pip install "pseudolabel[crf]" (Python < 3.13 and a C++ compiler), '
            'or use backend="torch", which needs nothing'
        ) from error

    labels, height, width = probs.shape[-3:]
    photos = np.ascontiguousarray(pixels.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy())
    energies = probs.float().clamp(1e-5, 1).log_().neg_().cpu().contiguous().numpy()
    result = np.empty_like(energies)
    for photo, problems, answers in zip(photos, energies, result, strict=True):
        for energy, answer in zip(problems, answers, strict=True):
            crf = DenseCRF2D(width, height, labels)
            crf.setUnaryEnergy(energy.reshape(labels, -1))
            if gaussian is not None:
                sxy, compat = gaussian
                crf.addPairwiseGaussian(sxy=sxy, compat=compat)
            if bilateral is not None:
                sxy, srgb, compat = bilateral
                crf.addPairwiseBilateral(sxy=sxy, srgb=srgb, rgbim=photo, compat=compat)
            answer[:] = np.asarray(crf.inference(iterations)).reshape(answer.shape)
    return torch.from_numpy(result).to(probs.device)
