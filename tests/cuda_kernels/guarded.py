"""Tensors that begin or end at memory that nobody may touch: who reads or writes beyond them is found out at once."""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

_PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def empty(count: int, dtype: torch.dtype, end: bool) -> Tensor:
    """`count` numbers that nobody wrote (NaN), between two protected pages and next to one of them."""
    item = torch.empty((), dtype=dtype).element_size()
    room = -(-count * item // _PAGE) * _PAGE
    memory = mmap.mmap(-1, room + 2 * _PAGE)
    memory.write(b"\xff" * len(memory))
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (address, address + _PAGE + room):
        if _libc.mprotect(page, _PAGE, 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    offset = _PAGE + room - count * item if end else _PAGE
    return torch.frombuffer(memory, dtype=dtype, offset=offset, count=count)


def like(x: Tensor, end: bool) -> Tensor:
    """The same numbers in the same strides, with the first or the last of them next to a protected page."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    memory = empty(span, x.dtype, end)
    if x.dtype == torch.bool:
        memory.fill_(True)
    view = memory.as_strided(x.shape, x.stride())
    once = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in x.stride())
    view[once].copy_(x[once])
    return view
