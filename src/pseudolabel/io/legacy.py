"""CAM files of the field's repositories: pickled dicts, in the dialects of IRN, CLIP-ES and SEAM."""

import os

import torch
from torch import Tensor

from pseudolabel.io._files import MAX_BYTES
from pseudolabel.io._quote import quote
from pseudolabel.io._unpickle import read_pickled_dict, to_tensors
from pseudolabel.io.cam_archive import StoredCAM

__all__ = ["read_legacy_cam"]

# Maps of the dialects with `keys`, finest first.
_MAPS = ("high_res", "attn_highres", "cam")


def read_legacy_cam(
    path: str | os.PathLike[str],
    *,
    allow_pickle: bool = False,
    background: bool = False,
    max_bytes: int = MAX_BYTES,
) -> StoredCAM:
    """Read the pickled CAMs of one image.

    | dialect | content of the dict |
    |---|---|
    | IRN, AdvCAM, RIB, ReCAM | `keys` (K,), `high_res` (K,H,W), and `cam` (K,h,w), taken if it stands alone |
    | CLIP-ES | `keys` (K,), `attn_highres` (K,H,W) |
    | SEAM, PMM, MCTformer | class -> (H,W) |

    Keys are 0-based foreground classes. Only SEAM's dicts of scores after a CRF count from the background: 0
    is the background, c+1 class c. Nothing in the file tells the two apart, so `background` has to.

    To be rid of pickle: `write_cam(path, stored.dense(num_classes), stored.labels(num_classes))`.

    Args:
        path: The `.npy` file, or a bare pickle.
        allow_pickle: Must be True: the format is a pickle, which can run code when it is loaded. Even then it
            is read by an unpickler that admits arrays, tensors and plain containers alone.
        background: The dict counts from the background, whose map is left out.
        max_bytes: Refuse larger files, and maps that take more.

    Returns:
        Keys, maps (float16 stays, other float dtypes become float32) and size.

    Raises:
        UnsafePickleError: If the file asks for anything else than the above; nothing is run.
        ValueError: If `allow_pickle` is False, or the file is corrupt or of another dialect.
        OSError: If there is no such file, or it may not be read.
    """
    advice = "write_cam saves what was read as an archive without pickle."
    content = read_pickled_dict(path, allow_pickle=allow_pickle, advice=advice, max_bytes=max_bytes)
    try:
        keys, maps = _keys_and_maps(content, max_bytes)
        if not maps.is_floating_point():
            raise ValueError(f"expected maps of a floating dtype, got {maps.dtype}")
        if maps.ndim != 3:
            raise ValueError(f"expected maps (K,H,W), got shape {tuple(maps.shape)}")
        if background:
            keys, maps = keys[keys != 0] - 1, maps[keys != 0]
        maps = maps if maps.dtype == torch.float16 else maps.to(torch.float32)
        return StoredCAM(keys, maps.contiguous(), (maps.shape[1], maps.shape[2]))
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from error


def _keys_and_maps(content: dict[object, object], max_bytes: int) -> tuple[Tensor, Tensor]:
    """Keys (K,) int64 and maps (K,H,W) out of either kind of dict."""
    if "keys" in content:
        names = [name for name in _MAPS if name in content]
        if not names:
            raise ValueError(f"expected maps as one of {_MAPS}, got {quote(sorted(map(str, content)))}")
        keys, maps = to_tensors([content["keys"], content[names[0]]], max_bytes=max_bytes)
        if keys.is_floating_point() or keys.dtype == torch.bool or keys.ndim != 1:
            raise ValueError(
                f"keys: expected whole numbers (K,), got shape {tuple(keys.shape)} of {keys.dtype}"
            )
        return keys.to(torch.int64), maps
    if not content:
        raise ValueError("the dict is empty: it holds no class and no size")
    if not all(isinstance(key, int) and not isinstance(key, bool) for key in content):
        raise ValueError(f"expected class indices or 'keys', got {quote(sorted(map(str, content)))}")
    maps = torch.stack(to_tensors(content.values(), max_bytes=max_bytes))
    return torch.tensor(list(content), device="cpu"), maps
