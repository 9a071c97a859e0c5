"""Tokens of a vision transformer: laid out as maps, and weighted to class maps."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pseudolabel._checks import check_count, check_float, check_labels, check_number, check_shapes, check_size
from pseudolabel._maps import present_classes, scatter_present, working_dtype

__all__ = ["TopKPool", "interpolate_position_embedding", "patch_token_cam", "tokens_to_map", "top_k_pool"]


def tokens_to_map(
    tokens: Tensor,
    grid: tuple[int, int] | None = None,
    *,
    size: tuple[int, int] | None = None,
    num_prefix_tokens: int = 1,
) -> Tensor:
    """Lay out the patch tokens of a transformer as maps.

        map[b, d, y, x] = tokens[b, prefix + y w + x, d]

    Tokens in front of the patches (class, distillation, registers) are dropped. The counts have to fit: what
    is left over or missing is an error.

    | network | tokens in front |
    |---|---|
    | ViT, CLIP, DINO, DINOv2 | 1 |
    | DeiT with distillation | 2 |
    | DINOv2 with registers | 5 |
    | MCTformer | one a class |
    | Swin, and networks that average all patches | 0 |

    Args:
        tokens: Tokens (B,N,D), patches row by row; or maps with channels last (B,h,w,D), as some Swin
            implementations return, which hold nothing but patches.
        grid: Rows and columns of patches (h,w), that is the image's height and width, each divided by the
            patch size. Tokens need it, or ``size``.
        size: Image size (H,W) instead, at any scale: of all grids with so many patches, the one of these
            proportions is taken, for maps of several scales. An error where none or several would do.
        num_prefix_tokens: How many tokens stand in front of the patches, >= 0.

    Returns:
        Maps (B,D,h,w), a view in the dtype of ``tokens``.

    Raises:
        TypeError: If ``tokens`` is not a floating-point tensor.
        ValueError: If shapes or counts do not fit, or not exactly one of ``grid`` and ``size`` is given.

    Examples:
        >>> import torch
        >>> tokens = torch.tensor([[[9.0], [1.0], [2.0], [3.0], [4.0], [5.0], [6.0]]])
        >>> tokens_to_map(tokens, (2, 3))
        tensor([[[[1., 2., 3.],
                  [4., 5., 6.]]]])
        >>> tokens_to_map(tokens, size=(32, 48)).shape
        torch.Size([1, 1, 2, 3])
        >>> tokens_to_map(tokens, (2, 2))
        Traceback (most recent call last):
        ...
        ValueError: tokens: expected 5 tokens, 1 in front and 2 x 2 = 4 patches, got 7; num_prefix_tokens=3 \
would fit this grid, grid=(2, 3) would fit 1 token in front
    """
    if isinstance(tokens, Tensor) and tokens.dim() == 4:
        check_shapes(tokens=(tokens, "B h w D"))
        check_float(tokens=tokens)
        if grid is not None and tuple(tokens.shape[1:3]) != tuple(grid):
            raise ValueError(
                f"tokens: expected maps with channels last (B, {grid[0]}, {grid[1]}, D) for grid "
                f"{tuple(grid)}, got {tuple(tokens.shape)}"
            )
        return tokens.movedim(-1, 1)
    check_shapes(tokens=(tokens, "B N D"))
    check_float(tokens=tokens)
    h, w = find_grid("tokens", tokens.shape[1], grid, size, num_prefix_tokens)
    return _as_map(tokens[:, num_prefix_tokens:].transpose(1, 2), (h, w))


def _as_map(values: Tensor, grid: tuple[int, int]) -> Tensor:
    """Lay out (B,D,N) as (B,D,h,w)."""
    return values.reshape(*values.shape[:2], *grid)


def find_grid(
    name: str,
    num_tokens: int,
    grid: tuple[int, int] | None,
    size: tuple[int, int] | None,
    num_prefix_tokens: int,
) -> tuple[int, int]:
    """Rows and columns of patches, which with the prefix make up all tokens of an argument, or an error."""
    check_count(at_least=0, num_prefix_tokens=num_prefix_tokens)
    if (grid is None) == (size is None):
        raise ValueError(f"grid: expected exactly one of grid and size, got grid={grid} and size={size}")
    if grid is None:
        assert size is not None  # noqa: S101  (for the type checker)
        return _grid_of_size(name, num_tokens - num_prefix_tokens, num_tokens, size)
    h, w = _pair("grid", grid)
    if num_prefix_tokens + h * w != num_tokens:
        front, patches = num_tokens - h * w, num_tokens - num_prefix_tokens
        fits = [f"num_prefix_tokens={front} would fit this grid"] if 0 <= front <= h * w else []
        near = _nearest_grid(patches, h / w) if patches > 0 else (0, 0)
        if near[0] > 1 and near[1] > 1:
            plural = "" if num_prefix_tokens == 1 else "s"
            fits.append(f"grid={near} would fit {num_prefix_tokens} token{plural} in front")
        raise ValueError(
            f"{name}: expected {num_prefix_tokens + h * w} tokens, {num_prefix_tokens} in front and "
            f"{h} x {w} = {h * w} patches, got {num_tokens}"
            + (f"; {', '.join(fits)}" if fits else "; is the grid the image size over the patch size?")
        )
    return h, w


def _grid_of_size(name: str, patches: int, num_tokens: int, size: tuple[int, int]) -> tuple[int, int]:
    """The grid (h,w) of so many patches with the proportions of ``size``, rounded up or down."""
    height, width = _pair("size", size)
    grids = [(h, patches // h) for h in range(1, patches + 1) if patches % h == 0]
    exact = [(h, w) for h, w in grids if h * width == w * height]
    # A side of h patches is the image's over the patch size, rounded: h - 1 < side / patch < h + 1.
    near = [
        (h, w)
        for h, w in grids
        if max((h - 1) / height, (w - 1) / width) < min((h + 1) / height, (w + 1) / width)
    ]
    found = exact or near
    if len(found) != 1:
        raise ValueError(
            f"{name}: expected a number of tokens that tells one grid of the proportions of size "
            f"{(height, width)}, got {num_tokens}, {num_tokens - patches} in front and {patches} patches, "
            f"which make {found or 'none'}; give grid, or another num_prefix_tokens"
        )
    return found[0]


def _nearest_grid(patches: int, ratio: float) -> tuple[int, int]:
    """Of the grids of so many patches, that with the nearest ratio of height to width."""
    grids = [(h, patches // h) for h in range(1, patches + 1) if patches % h == 0]
    return min(grids, key=lambda grid: max(grid[0] / grid[1] / ratio, ratio * grid[1] / grid[0]))


def interpolate_position_embedding(
    embedding: Tensor,
    old_grid: tuple[int, int],
    new_grid: tuple[int, int],
    num_prefix_tokens: int = 1,
    *,
    antialias: bool = True,
) -> Tensor:
    """Resize learned position embeddings to another grid, so that a transformer takes images of another size.

    The embeddings of the patches are maps of `old_grid`, resized to `new_grid`, bicubic, by half pixels
    (`align_corners=False`). Those of the tokens in front stay. Nothing changes where the grids are equal.

    Args:
        embedding: Position embeddings (N,D) or (1,N,D). Half precision is resized in float32.
        old_grid: Rows and columns of patches that the embeddings belong to.
        new_grid: Rows and columns of patches wanted, in any proportion.
        num_prefix_tokens: How many embeddings in front belong to no patch, >= 0.
        antialias: Smooth where the grid becomes smaller, as timm does. transformers does not.

    Returns:
        Embeddings like ``embedding`` for the new grid, with a gradient to the old ones.

    Raises:
        TypeError: If ``embedding`` is not a floating-point tensor.
        ValueError: If ``embedding`` does not fit ``old_grid``, or a setting is out of range.

    Examples:
        >>> import torch
        >>> embedding = torch.tensor([[7.0], [0.0], [1.0]])
        >>> interpolate_position_embedding(embedding, (1, 2), (1, 4))[:, 0]
        tensor([ 7.0000, -0.0882,  0.2071,  0.7929,  1.0882])

    Source:
        Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021 (there without a kernel being named);
        bicubic as in timm and transformers.
    """
    batched = isinstance(embedding, Tensor) and embedding.dim() == 3
    check_shapes(embedding=(embedding, "1 N D" if batched else "N D"))
    check_float(embedding=embedding)
    if embedding.shape[-1] == 0:
        raise ValueError(f"embedding: expected at least one channel, got {tuple(embedding.shape)}")
    check_size(old_grid=old_grid, new_grid=new_grid)
    old = find_grid("embedding", embedding.shape[-2], old_grid, None, num_prefix_tokens)
    new = _pair("new_grid", new_grid)
    if old == new:
        return embedding
    tokens = embedding if batched else embedding[None]
    prefix, patches = tokens[:, :num_prefix_tokens], tokens[:, num_prefix_tokens:]
    maps = _as_map(patches.transpose(1, 2), old).to(working_dtype(embedding))
    maps = F.interpolate(maps, size=new, mode="bicubic", align_corners=False, antialias=antialias)
    resized = torch.cat([prefix, maps.flatten(2).transpose(1, 2).to(embedding.dtype)], 1)
    return resized if batched else resized[0]


def patch_token_cam(
    features: Tensor,
    weight: Tensor,
    labels: Tensor | None = None,
    *,
    grid: tuple[int, int] | None = None,
    size: tuple[int, int] | None = None,
    num_prefix_tokens: int = 1,
    bias: Tensor | None = None,
    cosine: bool = False,
    background: Tensor | None = None,
    temperature: float | None = None,
) -> Tensor:
    """Class maps from patch tokens: each patch is classified by itself.

    With the features `f_p` of a patch and the weights or text embeddings `w_c` of a class:

        s_c(p) = w_c . f_p (+ bias_c)              the classifier's logit of the patch
        s_c(p) = w_c . f_p / (|w_c| |f_p|)         with cosine
        cam_c(p) = s_c(p)
        cam_c(p) = exp(s_c(p) / t) / sum_k exp(s_k(p) / t)      with a temperature t

    The sum of the softmax runs over the present classes of the image and the background embeddings: absent
    classes take no share. A single present class without a background gets 1 everywhere.

    The features have to live where the weights do: behind the network's last norm, for CLIP also behind the
    projection to the common space. The classifier of a class token was trained on the class token alone;
    applied to patch tokens it is a guess, better the more the network's training tied the patches to classes
    (average pooling of patches, `top_k_pool` of these maps).

    Args:
        features: Tokens (B,N,D), with ``grid`` or ``size`` and ``num_prefix_tokens`` as in `tokens_to_map`;
            or maps (B,D,h,w) that it has made. Half precision is computed in float32.
        weight: Classifier weights or text embeddings (C,D), or (C,D,1,1) of a 1x1 convolution.
        labels: Image-level labels (B,C). With them maps of absent classes are 0 and cost nothing. None: all
            classes are present.
        grid: See `tokens_to_map`.
        size: See `tokens_to_map`.
        num_prefix_tokens: See `tokens_to_map`; for tokens only.
        bias: Classifier bias (C,), not with ``cosine``.
        cosine: Compare directions, as for text embeddings.
        background: Embeddings (G,D) of what is no class, such as texts of "sky" or "grass"; they take part in
            the softmax, and need a ``temperature``.
        temperature: Take the softmax with this temperature, > 0. CLIP learned about 0.01 (a scale of 100).

    Returns:
        Maps (B,C,h,w) in the dtype of ``features``, with gradients to all float arguments.

    Raises:
        TypeError: If a tensor is not floating-point.
        ValueError: If shapes or counts do not fit, ``labels`` are not multi-hot, or settings contradict.

    Examples:
        >>> import torch
        >>> tokens = torch.tensor([[[9.0, 9.0], [2.0, 0.0], [0.0, 4.0]]])  # a class token and two patches
        >>> text = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
        >>> patch_token_cam(tokens, text, grid=(1, 2), cosine=True)[0, :, 0]
        tensor([[1.0000, 0.0000],
                [0.0000, 1.0000],
                [0.6000, 0.8000]])
        >>> labels = torch.tensor([[1, 0, 1]])
        >>> patch_token_cam(tokens, text, labels, grid=(1, 2), cosine=True, temperature=0.1)[0, :, 0]
        tensor([[9.8201e-01, 3.3535e-04],
                [0.0000e+00, 0.0000e+00],
                [1.7986e-02, 9.9966e-01]])

    Source:
        Patch tokens as class maps as described in MCTformer (Xu et al., CVPR 2022) and ToCo (Ru et al., CVPR
        2023). That only the image's classes and a set of background texts compete, is from CLIP-ES (Lin et
        al., CVPR 2023), where it is applied to the image's score, not to patches.
    """
    maps = _feature_map(features, grid, size, num_prefix_tokens)
    if isinstance(weight, Tensor) and weight.dim() == 4:
        check_shapes(weight=(weight, "C D 1 1"))
        weight = weight.flatten(1)
    arguments = {"features": (maps, "B D h w"), "weight": (weight, "C D")}
    if bias is not None:
        arguments["bias"] = (bias, "C")
    if background is not None:
        arguments["background"] = (background, "G D")
    if labels is not None:
        arguments["labels"] = (labels, "B C")
    check_shapes(**arguments)
    check_float(**{name: value for name, (value, _) in arguments.items() if name != "labels"})
    _check_softmax(bias, cosine, background, temperature)

    dtype = working_dtype(features)
    f, w = maps.to(dtype).flatten(2), weight.to(dtype)
    other = f.new_zeros(0, f.shape[1]) if background is None else background.to(dtype)
    if cosine:
        f, w, other = F.normalize(f, dim=1), F.normalize(w, dim=1), F.normalize(other, dim=1)

    index = valid = None
    if labels is not None:
        check_labels(labels)
        index, valid = present_classes(labels)
        w = w[index]  # (B,P,D)
    scores = w @ f
    if bias is not None:
        scores = scores + (bias.to(dtype) if index is None else bias.to(dtype)[index])[..., None]
    if temperature is not None:
        scores = _softmax(scores, other @ f, valid, temperature)
    cam = scores.reshape(*scores.shape[:2], *maps.shape[2:]).to(features.dtype)
    if index is None or valid is None:
        return cam
    return scatter_present(cam, index, valid, weight.shape[0])


def _softmax(scores: Tensor, background: Tensor, valid: Tensor | None, temperature: float) -> Tensor:
    """Shares (B,P,N) of the classes among themselves and the background (B,G,N)."""
    if valid is not None:  # finite, so that an image without any class gives no NaN
        scores = scores.masked_fill(~valid[:, :, None], torch.finfo(scores.dtype).min)
    # Divided after the maximum is taken off, so that the lowest number does not overflow.
    logits = torch.cat([scores, background], 1)
    if logits.shape[1]:
        logits = (logits - logits.amax(1, keepdim=True).detach()) / temperature
    return logits.softmax(1)[:, : scores.shape[1]]


def top_k_pool(cam: Tensor, k: int | None = None, *, decay: float = 1) -> Tensor:
    """Logits of an image from its class maps: the mean of the k highest places of each map.

        logit_c = sum_r decay^r cam_c[r] / sum_r decay^r        r = 0..k-1 from the highest place down

    `k=1` is global max pooling, `k=None` with `decay=1` global average pooling, `k=None` with a `decay` below
    1 global weighted rank pooling. Trained with these logits, patch tokens become class maps.

    Args:
        cam: Maps (B,C,h,w), such as those of `patch_token_cam`. Half precision is summed in float32.
        k: How many places count, 1..h*w. None: all.
        decay: How much less each place counts than the one before it, in (0, 1].

    Returns:
        Logits (B,C) in the dtype of ``cam``, with a gradient to the places that count.

    Raises:
        TypeError: If ``cam`` is not a floating-point tensor.
        ValueError: If ``cam`` is not (B,C,h,w), or a setting is out of range.

    Examples:
        >>> import torch
        >>> cam = torch.tensor([[[[4.0, 1.0], [2.0, 0.0]]]])
        >>> top_k_pool(cam, 2), top_k_pool(cam, 3, decay=0.5)
        (tensor([[3.]]), tensor([[3.]]))

    Source:
        Max pooling of patch tokens as described in ToCo (CVPR 2023), average pooling in MCTformer (CVPR
        2022); rank pooling from Kolesnikov and Lampert, "Seed, Expand and Constrain", ECCV 2016.
    """
    check_shapes(cam=(cam, "B C h w"))
    check_float(cam=cam)
    _check_pool(k, decay)
    places = cam.shape[2] * cam.shape[3]
    if places == 0 or (k is not None and k > places):
        raise ValueError(f"k: expected at most the {places} places of cam {tuple(cam.shape)}, got {k}")
    values = cam.flatten(2).to(working_dtype(cam))
    if k is None and decay == 1:
        return values.mean(2).to(cam.dtype)
    highest = values.topk(places if k is None else k, dim=2).values
    weights = decay ** torch.arange(highest.shape[2], device=cam.device, dtype=highest.dtype)
    return ((highest * weights).sum(2) / weights.sum()).to(cam.dtype)


class TopKPool(nn.Module):
    """Module twin of `top_k_pool`: `pool(cam)`."""

    def __init__(self, k: int | None = None, *, decay: float = 1) -> None:
        super().__init__()
        _check_pool(k, decay)
        self.k = k
        self.decay = decay

    def forward(self, cam: Tensor) -> Tensor:
        """See `top_k_pool`."""
        return top_k_pool(cam, self.k, decay=self.decay)

    def extra_repr(self) -> str:
        """Settings, for `print`."""
        return f"k={self.k}, decay={self.decay}"


def _feature_map(
    features: Tensor, grid: tuple[int, int] | None, size: tuple[int, int] | None, num_prefix_tokens: int
) -> Tensor:
    if isinstance(features, Tensor) and features.dim() == 3:
        check_shapes(features=(features, "B N D"))
        check_float(features=features)
        h, w = find_grid("features", features.shape[1], grid, size, num_prefix_tokens)
        return _as_map(features[:, num_prefix_tokens:].transpose(1, 2), (h, w))
    check_shapes(features=(features, "B D h w"))
    if grid is not None and tuple(features.shape[2:]) != tuple(grid):
        raise ValueError(f"features: expected maps of grid {tuple(grid)}, got {tuple(features.shape)}")
    return features


def _check_softmax(
    bias: Tensor | None, cosine: bool, background: Tensor | None, temperature: float | None
) -> None:
    if temperature is not None:
        check_number("temperature", temperature, above=0)
    elif background is not None:
        raise ValueError("background: expected a temperature beside it, for the softmax it takes part in")
    if cosine and bias is not None:
        raise ValueError("bias: expected none with cosine, got one")
    if bias is not None and background is not None:
        raise ValueError("bias: expected none beside background embeddings, which have none, got one")


def _check_pool(k: int | None, decay: float) -> None:
    if k is not None:
        check_count(k=k)
    check_number("decay", decay, above=0, at_most=1)


def _pair(name: str, value: tuple[int, int]) -> tuple[int, int]:
    check_size(**{name: value})
    return value[0], value[1]
