"""Calls that repeat an earlier one: their arguments are not checked again.

In plain eager mode the checks of a call, and the choice of what serves it, depend only on its options, on the shapes,
dtypes, devices and layouts of its tensors, and on the environment. These are its signature. What was chosen is kept for
each signature, so that Python does not take longer than the kernels on small tensors.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from xformer_kernels import dispatch, ops

Signature = tuple[Any, ...]

_MOST = 4096
"""Maximum number of signatures; images of many sizes have many."""
_known: dict[Signature, Any] = {}


def signature(tensors: Sequence[Any], *options: Any) -> Signature | None:
    """The signature of a call; None unless it is in plain eager mode.

    `tensors`: after autocast. `options`: compared with their types, since True, 1 and 1.0 are equal.
    """
    if not ops.plain(*tensors):
        return None
    described = tuple([None if t is None else (t.shape, t.dtype, t.device, t.layout) for t in tensors])
    return described, options, tuple(map(type, options)), os.environ.get(dispatch.ENVIRONMENT)


def known(signature: Signature | None) -> Any:
    """What :func:`remember` kept for this signature; None if there is nothing."""
    if signature is None:  # also while compiling, where the table would become part of the graph's guards
        return None
    try:
        return _known.get(signature)
    except TypeError:  # an option that is not hashable; the checks refuse it
        return None


def remember(signature: Signature | None, chosen: Any) -> None:
    """Keeps what was chosen for a call with this signature, after its checks."""
    if signature is not None:
        if len(_known) >= _MOST:
            _known.clear()
        _known[signature] = chosen


def forget() -> None:
    """Discards all signatures, for instance after a backend was added or removed."""
    _known.clear()
