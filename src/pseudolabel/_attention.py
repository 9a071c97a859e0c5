"""What is shared by all that reads attention: the layers of a stack, one after the other."""

from collections.abc import Iterable, Sequence

from torch import Tensor

from pseudolabel._checks import check_float, check_sequence, check_shapes, check_unit_range

__all__ = ["attention_layers"]


def attention_layers(attention: Tensor | Sequence[Tensor], layers: Iterable[int] | None) -> list[Tensor]:
    """Chosen layers (B,heads,N,N) of a list of them, of (B,L,heads,N,N), or of a single one; checked."""
    if isinstance(attention, Tensor):
        if attention.dim() == 5:
            check_shapes(attention=(attention, "B L heads N N"))
            stack = list(attention.unbind(1))
        else:
            check_shapes(attention=(attention, "B heads N N"))
            stack = [attention]
    else:
        check_sequence(attention=attention)
        stack = list(attention)
    if not stack:
        raise ValueError("attention: expected at least one layer, got none")
    chosen = list(range(len(stack)) if layers is None else layers)
    if not chosen or not all(
        isinstance(layer, int) and not isinstance(layer, bool) and -len(stack) <= layer < len(stack)
        for layer in chosen
    ):
        raise ValueError(
            f"layers: expected indices in {-len(stack)}..{len(stack) - 1} of the {len(stack)} layers of "
            f"attention, got {chosen}"
        )
    found = [stack[layer] for layer in chosen]
    for layer in found:
        check_shapes(attention=(layer, "B heads N N"))
        check_float(attention=layer)
        if layer.shape[1] == 0:
            raise ValueError(f"attention: expected at least one head, got {tuple(layer.shape)}")
        if layer.shape[0] != found[0].shape[0] or layer.shape[-1] != found[0].shape[-1]:
            raise ValueError(
                "attention: expected layers of one batch size and one number of tokens, got shapes "
                f"{tuple(found[0].shape)} and {tuple(layer.shape)}"
            )
        check_unit_range(attention=layer)  # scores before the softmax would pass for probabilities
    return found
