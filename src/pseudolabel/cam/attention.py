"""Attention of a vision transformer: caught while the network runs, and read as maps of the class tokens."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from pseudolabel._attention import attention_layers
from pseudolabel._checks import check_choice, check_count
from pseudolabel._maps import working_dtype
from pseudolabel.cam._network import hook_here
from pseudolabel.cam.tokens import find_grid

__all__ = ["capture_attention", "class_attention_map"]

Reduction = Literal["mean", "max"]


@contextmanager
def capture_attention(
    model: nn.Module,
    layers: Iterable[int] | None = None,
    *,
    average_heads: bool = False,
    detach: bool = True,
) -> Iterator[list[Tensor]]:
    """Catch the attention probabilities of a transformer while it runs: `with ... as attention: model(x)`.

    The list holds, of the last run of the model, one tensor (B,heads,N,N) a layer, rows summing to 1: how
    much each token (row) takes from each other (column). The network, its outputs and its settings stay as
    they are, and nothing of it is read by name: what is watched are the calls of

    - `F.scaled_dot_product_attention`, the fused attention of timm and transformers. It keeps its
      probabilities to itself, so they are computed beside it: `softmax(Q K^T scale + mask)`;
    - a softmax over the last axis of (B,heads,N,N), the attention that is written out (`"eager"`);
    - `F.multi_head_attention_forward`, of `nn.MultiheadAttention` (torchvision, open_clip), which is asked
      for its weights. While the network trains these include its dropout; the others do not.

    What counts is what this thread runs: others may run the network meanwhile, with lists of their own.
    Attention between different tokens (cross attention, pooling heads) is left out. Swin attends in windows,
    each an element of B here. Not seen: attention inside of compiled networks, and by other kernels (flash
    or flex attention of transformers, xformers). A run without any attention caught is an error.

    Memory: heads N^2 numbers an image and a layer; 12 heads and 28 x 28 patches in float32 are 30 MB. Layers
    that are not wanted are let go while the network runs. Everything is let go with the list.

    Args:
        model: The network, or the part of it to watch, such as the vision tower of CLIP.
        layers: Which layers to keep, counted in the order in which they run, from the end where negative:
            `range(-8, 0)` for the last eight. The list has them in this order. None: all.
        average_heads: Keep the mean over heads, (B,1,N,N).
        detach: Keep no graph. False leaves the gradient to the network's weights and input.

    Yields:
        The list of layers, filled when a run of the model ends, and empty after one that failed.

    Raises:
        ValueError: From the run of the model, if no attention is caught, or a layer does not exist.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
        >>> with torch.no_grad(), capture_attention(block) as attention:
        ...     out = block(torch.rand(1, 5, 8))
        >>> [layer.shape for layer in attention]
        [torch.Size([1, 2, 5, 5])]
    """
    watch = _AttentionWatch(layers, average_heads, detach)
    begin = hook_here(model.register_forward_pre_hook, watch.begin)
    end = hook_here(model.register_forward_hook, watch.end)
    with begin, end, watch:
        yield watch.found


class _AttentionWatch(TorchFunctionMode):
    """Keep the attention of the calls between `begin` and `end`, those of wanted layers only."""

    SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax)

    def __init__(self, layers: Iterable[int] | None, average_heads: bool, detach: bool) -> None:
        super().__init__()
        self.layers = None if layers is None else list(layers)
        for layer in self.layers or []:
            if isinstance(layer, bool) or not isinstance(layer, int):
                raise ValueError(f"layers: expected integers, got {layer!r}")
        self.last = max((-layer for layer in self.layers or [] if layer < 0), default=0)
        self.average_heads = average_heads
        self.detach = detach
        self.found: list[Tensor] = []
        self._running = False
        self._count = 0
        self._kept: dict[int, Tensor] = {}

    def begin(self, *_: Any) -> None:
        self.found.clear()
        self._kept.clear()
        self._running, self._count = True, 0

    def end(self, model: nn.Module, *_: Any) -> None:
        self._running = False
        kept, self._kept = self._kept, {}
        if not self._count:
            raise ValueError(
                "model: expected attention between equal tokens, by scaled_dot_product_attention, a softmax "
                f"over (B, heads, N, N) or nn.MultiheadAttention, got none from {type(model).__name__}; in "
                'transformers, load the network with attn_implementation="sdpa" or "eager"'
            )
        chosen = range(self._count) if self.layers is None else self.layers
        if any(not -self._count <= layer < self._count for layer in chosen):
            raise ValueError(
                f"layers: expected indices in {-self._count}..{self._count - 1} of the {self._count} layers "
                f"of the model, got {list(chosen)}"
            )
        self.found[:] = [kept[layer % self._count] for layer in chosen]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self._running:
            return func(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            return self._ask_for_weights(args, kwargs)
        result = func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            self._see(lambda: _probabilities(*args, **kwargs), *_token_counts(*args, **kwargs))
        elif func in self.SOFTMAX and result.dim() == 4 and _axis(*args, **kwargs) in (-1, 3):
            self._see(lambda: result, *result.shape[2:])
        return result

    def _see(self, probabilities: Callable[[], Tensor], queries: int, keys: int) -> None:
        if queries != keys or queries == 1:
            return
        layer, self._count = self._count, self._count + 1
        if self.layers is None or layer in self.layers or self.last:
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.detach):
                attention = probabilities()
                if self.average_heads:
                    mean = attention.mean(1, keepdim=True, dtype=working_dtype(attention))
                    attention = mean.to(attention.dtype)
            self._kept[layer] = attention.detach() if self.detach else attention
        gone = self._count - 1 - self.last  # too early by now to be one of the last
        if self.layers is not None and gone not in self.layers:
            self._kept.pop(gone, None)

    def _ask_for_weights(self, args: Any, kwargs: Any) -> tuple[Tensor, Tensor | None]:
        call = inspect.signature(F.multi_head_attention_forward).bind(*args, **kwargs)
        call.apply_defaults()
        wanted, averaged = call.arguments["need_weights"], call.arguments["average_attn_weights"]
        call.arguments.update(need_weights=True, average_attn_weights=False)
        output, weights = F.multi_head_attention_forward(*call.args, **call.kwargs)
        if weights is None:  # never, being asked for
            return output, None
        if weights.dim() == 4:
            self._see(lambda: weights, *weights.shape[2:])
        if not wanted:
            return output, None
        return output, weights.mean(-3) if averaged else weights


def _token_counts(query: Tensor, key: Tensor, *_: Any, **__: Any) -> tuple[int, int]:
    """Queries and keys of (B,heads,N,d); (0, 1), which is left out, for other ranks."""
    return (query.shape[2], key.shape[2]) if query.dim() == 4 else (0, 1)


def _probabilities(  # noqa: PLR0917  (the arguments are those of the attention)
    query: Tensor,
    key: Tensor,
    value: Tensor,  # noqa: ARG001
    attn_mask: Tensor | None = None,
    dropout_p: float = 0,  # noqa: ARG001
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What `F.scaled_dot_product_attention` weights its values with, before dropout."""
    if enable_gqa:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = (query * scale) @ key.transpose(-2, -1)
    if is_causal:
        attn_mask = torch.ones_like(scores[0, 0], dtype=torch.bool).tril()
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, -torch.inf)
        else:
            scores = scores + attn_mask
    # By a name that another watch around this one does not count.
    probabilities: Tensor = torch.special.softmax(scores, -1, dtype=working_dtype(scores))
    return probabilities.to(query.dtype)


def _axis(_input: Tensor, dim: int | None = None, *_: Any, **__: Any) -> int | None:
    """The axis of a call of softmax."""
    return dim


def class_attention_map(
    attention: Tensor | Sequence[Tensor],
    grid: tuple[int, int] | None = None,
    *,
    size: tuple[int, int] | None = None,
    num_prefix_tokens: int = 1,
    num_class_tokens: int = 1,
    layers: Iterable[int] | None = None,
    layer_reduction: Reduction = "mean",
    head_reduction: Reduction = "mean",
) -> Tensor:
    """Maps of what the class tokens look at: their rows of the attention, over the patches.

        map_q(p) = mean over layers l, of mean over heads h, of a_lh(q, p)

    A single class token sees what stands out, of whatever class. A network with a token for each class
    (MCTformer) gives a map for each class; that method multiplies it with the class map of the patches
    (`patch_token_cam`).

    Args:
        attention: Attention probabilities, one (B,heads,N,N) a layer in a list as of `capture_attention` or
            of a network's `attentions`; or one tensor (B,L,heads,N,N), or (B,heads,N,N) of one layer. Half
            precision is averaged in float32.
        grid: See `tokens_to_map`.
        size: See `tokens_to_map`.
        num_prefix_tokens: Tokens in front of the patches, class tokens among them.
        num_class_tokens: How many tokens, from the first on, are class tokens.
        layers: Which layers to take, from the end where negative. None: all given.
        layer_reduction: `"mean"` or `"max"` over layers.
        head_reduction: `"mean"` or `"max"` over heads.

    Returns:
        Maps (B,Q,h,w), one a class token, in [0, 1], in the dtype of ``attention``.

    Raises:
        TypeError: If ``attention`` is not floating-point.
        ValueError: If shapes or counts do not fit, values leave [0, 1], or a setting is out of range.

    Examples:
        >>> import torch
        >>> attention = torch.tensor([[[[0.2, 0.6, 0.2], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]]])
        >>> class_attention_map(attention, (1, 2))
        tensor([[[[0.6000, 0.2000]]]])

    Source:
        Class-to-patch attention as described in MCTformer (Xu et al., CVPR 2022), which takes the last
        layers; for a single class token as in DINO (Caron et al., ICCV 2021).
    """
    check_choice("layer_reduction", layer_reduction, Reduction)
    check_choice("head_reduction", head_reduction, Reduction)
    check_count(num_class_tokens=num_class_tokens)
    stack = attention_layers(attention, layers)
    h, w = find_grid("attention", stack[0].shape[-1], grid, size, num_prefix_tokens)
    if num_class_tokens > num_prefix_tokens:
        raise ValueError(
            f"num_class_tokens: expected at most the {num_prefix_tokens} tokens in front, got "
            f"{num_class_tokens}"
        )
    rows = torch.stack(
        [_reduce(layer[:, :, :num_class_tokens, num_prefix_tokens:], 1, head_reduction) for layer in stack]
    )
    maps = _reduce(rows, 0, layer_reduction)
    return maps.reshape(*maps.shape[:2], h, w).to(stack[0].dtype)


def _reduce(values: Tensor, axis: int, reduction: Reduction) -> Tensor:
    values = values.to(working_dtype(values))
    return values.mean(axis) if reduction == "mean" else values.amax(axis)
