"""Training attention in our own CPU kernel (`model/kernels/training.h`).

Shape legend: B rows, T queries, K keys, d and e widths of a head.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fast_dllm.model.kernels import load_kernels


class _Strided(ctypes.Structure):
    _fields_ = (
        ("values", ctypes.c_void_p),
        ("row", ctypes.c_int64),
        ("head", ctypes.c_int64),
        ("place", ctypes.c_int64),
    )


class _Piece(ctypes.Structure):
    _fields_ = (
        ("queries", ctypes.c_int32),
        ("count", ctypes.c_int32),
        ("columns", ctypes.c_void_p),
        ("mask", ctypes.c_void_p),
    )


_TENSORS = ("query", "key", "value", "out", "sums", "d_out", "d_query", "d_key", "d_value")


class _Attention(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("rows", "heads", "kv_heads", "keys", "width", "value_width", "count")),
        ("scale", ctypes.c_float),
        ("pieces", ctypes.POINTER(_Piece)),
        *((name, _Strided) for name in _TENSORS),
    )


def takes(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the kernel is for such inputs; it has to be there, too (`model.kernels.why_no_kernels`)."""
    return all(x.device.type == "cpu" and x.dtype == torch.float32 and x.stride(-1) == 1 for x in (query, key, value))


def attend(
    query: Tensor, key: Tensor, value: Tensor, columns: Sequence[Tensor], masks: Sequence[Tensor], scale: float | None
) -> tuple[Tensor, Tensor]:
    """See `pieces.attend_in_pieces`."""
    rows, heads, length, _ = query.shape
    out, sums = query.new_empty(rows, length, heads, value.shape[-1]), query.new_empty(rows, length, heads)
    _run("fast_dllm_attend", columns, masks, scale, query=query, key=key, value=value, **_by_head(out=out, sums=sums))
    return out, sums


@torch.library.custom_op("fast_dllm::attend_backward", mutates_args=())
def attend_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    sums: Tensor,
    columns: list[Tensor],
    masks: list[Tensor],
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the inputs, as one operator: who traces a backward cannot look into the kernel.

    Args:
        gradient: [B, T, heads, e], of `out`.
        query: [B, heads, T, d], and so on as of `attend`.
        key: [B, kv_heads, K, d].
        value: [B, kv_heads, K, e].
        out: [B, T, heads, e], what `attend` gave.
        sums: [B, T, heads], and that.
        columns: of each piece.
        masks: of each piece.
        scale: of the scores.

    Returns:
        Of query, key and value, in their shapes.
    """
    inputs = {"query": query, "key": key, "value": value}
    found = [torch.empty_like(x) for x in inputs.values()]
    of_inputs = dict(zip(("d_query", "d_key", "d_value"), found, strict=True))
    of_outputs = _by_head(out=out, sums=sums, d_out=gradient.contiguous())
    _run("fast_dllm_attend_backward", columns, masks, scale, **inputs, **of_inputs, **of_outputs)
    return found[0], found[1], found[2]


@attend_backward.register_fake
def _(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _by_head(**tensors: Tensor) -> dict[str, Tensor]:
    return {name: tensor.transpose(1, 2) for name, tensor in tensors.items()}


def _run(name: str, columns: Sequence[Tensor], masks: Sequence[Tensor], scale: float | None, **tensors: Tensor) -> None:
    """Call the kernel with tensors [B, heads, places, ...] by their names in its structure."""
    (rows, heads, _, width), (_, kv_heads, keys, _) = tensors["query"].shape, tensors["key"].shape
    columns = [seen.contiguous() for seen in columns]
    masks = [mask.expand(rows, -1, -1, -1).contiguous() for mask in masks]
    pieces = (_Piece * len(masks))(
        *(
            _Piece(mask.shape[2], len(seen), seen.data_ptr(), mask.data_ptr())
            for seen, mask in zip(columns, masks, strict=True)
        )
    )
    task = _Attention(
        *(rows, heads, kv_heads, keys, width, tensors["value"].shape[-1], len(masks)),
        width**-0.5 if scale is None else scale,
        pieces,
    )
    for field, tensor in tensors.items():
        setattr(task, field, _Strided(tensor.data_ptr(), *tensor.stride()[:3]))
    getattr(load_kernels(), name)(ctypes.byref(task), torch.get_num_threads())
