"""KNN matting: pixels of like colour are tied together, wherever in the image they lie."""

from collections.abc import Sequence
from typing import Any, Literal, overload

import numpy as np
import torch
from torch import Tensor

from pseudolabel._checks import check_float, check_number, check_sequence, check_shapes, check_unit_range
from pseudolabel._maps import working_dtype
from pseudolabel.matting._pixels import Pixels
from pseudolabel.matting._system import Laplacian, MattingReport, check_request, matte

__all__ = ["knn_matting"]


@overload
def knn_matting(
    image: Tensor,
    trimap: Tensor,
    *,
    neighbours: Sequence[int] = ...,
    distance_weights: Sequence[float] = ...,
    rtol: float = ...,
    max_iter: int = ...,
    prior: Tensor | None = ...,
    prior_weight: float | Tensor = ...,
    x0: Tensor | None = ...,
    return_report: Literal[False] = ...,
) -> Tensor: ...


@overload
def knn_matting(
    image: Tensor,
    trimap: Tensor,
    *,
    neighbours: Sequence[int] = ...,
    distance_weights: Sequence[float] = ...,
    rtol: float = ...,
    max_iter: int = ...,
    prior: Tensor | None = ...,
    prior_weight: float | Tensor = ...,
    x0: Tensor | None = ...,
    return_report: Literal[True],
) -> tuple[Tensor, MattingReport]: ...


def knn_matting(
    image: Tensor,
    trimap: Tensor,
    *,
    neighbours: Sequence[int] = (20, 10),
    distance_weights: Sequence[float] = (2.0, 0.1),
    rtol: float = 1e-4,
    max_iter: int = 500,
    prior: Tensor | None = None,
    prior_weight: float | Tensor = 1e-3,
    x0: Tensor | None = None,
    return_report: bool = False,
) -> Tensor | tuple[Tensor, MattingReport]:
    """Find the mattes of the unknown pixels, each near to the mean of its nearest neighbours in colour.

    Pixels get features `[r, g, b, w x, w y]`, with the position in shares of the sides. For each ``w`` of
    ``distance_weights`` every pixel lists its nearest pixels, itself among them, as many as ``neighbours``
    says. With `W_ij`, how often i lists j plus how often j lists i, and the row sums D, the mattes X of the
    unknown pixels U solve

        L = D - W,   (L_UU + Lambda) X_U = -L_UK M_K + Lambda Q_U

    for seeds M on the known pixels K and a prior Q: see `closed_form_matting`, also for what is known, how
    classes are solved together, and seeds that are missing. A small ``w`` ties pixels across the whole image,
    so that foreground that is cut off from all seeds is found by its colour, and background of such a colour
    with it. Mattes stay in [0, 1], each being a mean of others.

    The lists are found by k-d trees on the CPU, which takes most of the time. Gradients flow to the seeds in
    ``trimap``, to ``prior`` and to ``prior_weight``; none flows to ``image``, whose lists have no derivative.

    Args:
        image: Images (B,3,H,W) in [0, 1].
        trimap: Trimaps (B,C,H,W): 1 foreground, 0 background, 0.5 unknown.
        neighbours: Length of each list, >= 2.
        distance_weights: Weight of the position for each list, >= 0: 0 compares colours alone.
        rtol: Residual to reach, relative to the right side, > 0.
        max_iter: Steps to take at most, >= 1.
        prior: Expected mattes (B,C,H,W) in [0, 1]. Where they sum to more than 1 they are scaled to sum 1.
        prior_weight: Confidence of the prior, >= 0: a number, or a map (B,H,W). For comparison, D is about
            twice the sum of ``neighbours``.
        x0: Mattes (B,C,H,W) to start from.
        return_report: Return a `MattingReport` as well.

    Returns:
        Mattes (B,C,H,W) in the dtype of ``trimap``, in [0, 1] and with a sum of at most 1; with
        ``return_report`` the mattes and the report.

    Raises:
        TypeError: If ``image``, ``trimap``, ``prior`` or ``x0`` is not a floating-point tensor.
        ValueError: If shapes do not fit, values leave [0, 1], or a setting is out of range.

    Examples:
        >>> import torch
        >>> image = torch.tensor([0.1, 0.9, 0.1, 0.9, 0.1, 0.9]).expand(1, 3, 1, 6)
        >>> trimap = torch.tensor([[[[0.0, 1.0, 0.5, 0.5, 0.5, 0.5]]]])
        >>> knn_matting(image, trimap, neighbours=[3], distance_weights=[0.1]).round(decimals=3)
        tensor([[[[0., 1., 0., 1., 0., 1.]]]])

    Source:
        Chen, Li and Tang, "KNN Matting", CVPR 2012 (TPAMI 2013). Colours in RGB, lists that count and do not
        weigh, and the lengths and weights of the two lists are those of pymatting's `knn_laplacian`. Known
        pixels as hard constraints, classes solved together and the prior are ours.
    """
    check_shapes(image=(image, "B 3 H W"), trimap=(trimap, "B C H W"))
    check_float(image=image)
    check_unit_range(image=image)
    _check_lists(neighbours, distance_weights)
    check_request(trimap, rtol=rtol, max_iter=max_iter, prior=prior, prior_weight=prior_weight, x0=x0)
    dtype = torch.promote_types(working_dtype(image), working_dtype(trimap))

    def laplacian(number: int, unknown: Pixels, confidence: Tensor | None, _: int | None) -> Laplacian:
        i, j = _edges(image[number].detach().double().cpu().numpy(), neighbours, distance_weights)
        return _laplacian(i, j, unknown, confidence, dtype)

    alpha, report = matte(
        laplacian,
        trimap.to(dtype),
        rtol=rtol,
        max_iter=max_iter,
        prior=prior,
        prior_weight=prior_weight,
        x0=x0,
    )
    alpha = alpha.to(trimap.dtype)
    return (alpha, report) if return_report else alpha


def _edges(
    image: np.ndarray, neighbours: Sequence[int], distance_weights: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """Indices i of listing and j of listed pixels, for all lists of all pixels of an image (3,H,W)."""
    from scipy.spatial import cKDTree  # noqa: PLC0415 - slow to import, and the other methods do without

    height, width = image.shape[1:]
    y = np.linspace(0, 1, height).repeat(width)
    x = np.tile(np.linspace(0, 1, width), height)
    pixels = np.arange(height * width)
    i, j = [], []
    for length, weight in zip(neighbours, distance_weights, strict=True):
        features = np.stack([*image.reshape(3, -1), weight * x, weight * y], 1)
        ranks = np.arange(1, 1 + min(length, len(pixels)))
        _, nearest = cKDTree(features, balanced_tree=False).query(features, k=ranks)
        i.append(pixels.repeat(len(ranks)))
        j.append(nearest.ravel())
    return np.concatenate(i), np.concatenate(j)


def _laplacian(
    i: np.ndarray, j: np.ndarray, unknown: Pixels, confidence: Tensor | None, dtype: torch.dtype
) -> Laplacian:
    """The operator of the graph with the edges from i to j, taken both ways."""
    from scipy.sparse import csr_array  # noqa: PLC0415 - as above

    index = np.flatnonzero(unknown.active.cpu().numpy())
    number = np.full(unknown.active.numel(), -1)
    number[index] = np.arange(len(index))
    row, column = number[np.concatenate([i, j])], np.concatenate([j, i])
    row, column = row[row >= 0], column[row >= 0]
    degree = np.bincount(row, minlength=len(index))
    values = np.concatenate([np.full(len(row), -1.0), degree])
    places = np.concatenate([row, number[index]]), np.concatenate([column, index])
    whole = csr_array((values, places), (len(index), len(number)))  # sums what it has twice
    inner = whole[:, index]
    if confidence is not None:
        inner.setdiag(inner.diagonal() + confidence.double().cpu().numpy())
    step = torch.from_numpy(1 / np.maximum(inner.diagonal(), 1)).to(unknown.index.device, dtype)
    rows, matrix = (_to_torch(one, unknown.index.device, dtype) for one in (whole, inner))
    return Laplacian(
        rows=lambda maps: rows @ maps.flatten(1).t(),
        matvec=lambda x: matrix @ x,
        preconditioner=lambda r: step * r if r.ndim == 1 else step[:, None] * r,
    )


def _to_torch(matrix: Any, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.sparse_csr_tensor(
        torch.from_numpy(matrix.indptr),
        torch.from_numpy(matrix.indices),
        torch.from_numpy(matrix.data),
        matrix.shape,
        device="cpu",
    ).to(device, dtype)


def _check_lists(neighbours: Sequence[int], distance_weights: Sequence[float]) -> None:
    check_sequence(neighbours=neighbours, distance_weights=distance_weights)
    if len(neighbours) != len(distance_weights) or len(neighbours) == 0:
        raise ValueError(
            f"distance_weights: expected one for each list of neighbours, {list(neighbours)}, "
            f"got {list(distance_weights)}"
        )
    for length in neighbours:
        if isinstance(length, bool) or not isinstance(length, int) or length < 2:
            raise ValueError(f"neighbours: expected integers >= 2, got {list(neighbours)}")
    for weight in distance_weights:
        check_number("distance_weights", weight, at_least=0)
