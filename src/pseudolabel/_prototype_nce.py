"""InfoNCE of pixels and prototypes, which the head that makes prototypes and the loss of that name share."""

import torch
from torch import Tensor
from torch.nn import functional as F

from pseudolabel._maps import working_dtype

__all__ = ["prototype_logits", "prototype_nce"]


def prototype_logits(features: Tensor, prototypes: Tensor, temperature: float) -> Tensor:
    """Cosine of features (B,D,h,w) and prototypes (K,D) of length 1 or 0, over ``temperature``: (B,K,h,w)."""
    dtype = torch.promote_types(working_dtype(features), working_dtype(prototypes))
    with torch.autocast(features.device.type, enabled=False):
        unit = F.normalize(features.to(dtype), dim=1)
        return torch.einsum("kd,bdhw->bkhw", prototypes.detach().to(dtype), unit) / temperature


def prototype_nce(
    logits: Tensor, targets: Tensor, *, ignored: Tensor | None = None, valid: Tensor | None = None
) -> Tensor:
    """Cross-entropy of each pixel (B,h,w) with logits (B,K,h,w): 0 where ``ignored``.

    Negatives are the classes ``valid`` (K,) bool.
    """
    positive = targets.long()[:, None]
    if ignored is not None:
        positive = positive.masked_fill(ignored[:, None], 0)
    if valid is not None:  # the positive is always part of the sum
        negatives = logits.masked_fill(~valid[:, None, None], -torch.inf)
        logits = negatives.scatter(1, positive, logits.gather(1, positive))
    with torch.autocast(logits.device.type, enabled=False):
        loss = F.cross_entropy(logits, positive[:, 0], reduction="none")
    return loss if ignored is None else loss.where(~ignored, 0)
