"""Affinity loss: teaches features which pairs of pixels are alike."""

import torch
from torch import Tensor

from pseudolabel._checks import check_float, check_integer, check_shapes, check_unit_range
from pseudolabel._maps import working_dtype

__all__ = ["affinity_loss"]


def affinity_loss(affinity: Tensor, pair_labels: Tensor) -> Tensor:
    """Cross-entropy of the affinities of pairs, balanced over three kinds of pairs.

    With `a` the affinity of a pair, and each mean a sum over the pairs of the batch that are of this kind,
    divided by their number plus 1e-5:

        loss =   mean over background pairs  -log(a + 1e-5)     / 4
               + mean over foreground pairs  -log(a + 1e-5)     / 4
               + mean over differing pairs   -log(1 + 1e-5 - a) / 2

    Args:
        affinity: Affinities of pairs (B,O,h,w) in [0, 1], such as those of `affinity_from_features`. Half
            precision is computed in float32.
        pair_labels: Labels of the same pairs (B,O,h,w), integer: 0 both are background, 1 both are of one
            class, 2 they differ (`affinity_labels`). Pairs with any other label have no loss.

    Returns:
        The loss, a scalar, float32 or better. A batch without a labelled pair gives 0 with a graph.

    Raises:
        TypeError: If ``affinity`` is not floating-point or ``pair_labels`` no integer tensor.
        ValueError: If shapes do not fit, or ``affinity`` leaves [0, 1] (looked at on a CPU alone).

    Examples:
        >>> import torch
        >>> affinity = torch.tensor([0.5, 0.5, 0.5, 0.9]).view(1, 4, 1, 1)
        >>> affinity_loss(affinity, torch.tensor([0, 1, 2, 255]).view(1, 4, 1, 1))  # the last pair is unknown
        tensor(0.6931)

    Source:
        Ahn and Kwak, "Learning Pixel-level Semantic Affinity with Image-level Supervision for Weakly
        Supervised Semantic Segmentation" (AffinityNet), CVPR 2018; the formula is that of `train_aff` of the
        official PMM implementation at 134ad33.
    """
    check_shapes(affinity=(affinity, "B O h w"), pair_labels=(pair_labels, "B O h w"))
    check_float(affinity=affinity)
    check_integer(pair_labels=pair_labels)
    if affinity.device.type == "cpu":  # accelerators would have to be waited for
        check_unit_range(affinity=affinity)
    a = affinity.to(working_dtype(affinity))
    alike, different = -torch.log(a + 1e-5), -torch.log(1 + 1e-5 - a)

    def mean(loss: Tensor, kind: int) -> Tensor:
        pairs = pair_labels == kind
        return loss.where(pairs, 0).sum() / (pairs.sum(dtype=loss.dtype) + 1e-5)

    return mean(alike, 0) / 4 + mean(alike, 1) / 4 + mean(different, 2) / 2
