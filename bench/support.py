"""What each backend computes, as the table of the README: ``python -m bench.support`` rewrites it.

The cells are computed from what :func:`xformer_kernels.explain` shows: the reasons of each backend against dtypes and
numbers of features, and the variants that it fuses. Reasons about this machine (no GPU) are left out, so the table is
the same everywhere.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from functools import partial

import torch

from bench.cells import END, ROOT
from xformer_kernels import backends
from xformer_kernels.spec import ACTIVATIONS, FEATURE_MAPS, MAPS, NORMS, Spec
from xformer_kernels.validate import DTYPES

BEGIN = "<!-- support: python -m bench.support -->"
DEVICES = {"cpp": ("cpu", "CPU"), "triton": ("cuda", "NVIDIA and AMD GPUs"), "cuda": ("cuda", "NVIDIA GPUs")}
LARGEST = 1024
"""More features than any backend takes."""


def render() -> str:
    """Rows are variants, columns are backends."""
    loaded = {name: _loaded(name) for name in DEVICES}
    rows: dict[str, Callable[[backends.Backend], str]] = {
        "dtypes": _dtypes,
        "`gram`, `channel_mix`": lambda b: _composed(b, _up_to(b, _all)),
        **{f'`xfa`, `norm="{norm}"`': partial(_xfa, norm) for norm in NORMS},
        "`xfa` with `map_fn` or dropout": lambda b: _composed(b, f"composed, {_up_to(b, _all)}"),
        "`linear_attention`": _linear_attention,
        'layers, `form="direct"`': lambda b: f"torch's projections and `xfa`, {_up_to(b, _all)}",
        'layers, `form="gram"`': _gram_form,
    }
    lines = [
        BEGIN,
        f"| | {' | '.join(f'{DEVICES[name][1]}: `{name}`' for name in loaded)} |",
        f"|---|{'---|' * len(loaded)}",
        *(f"| {row} | {' | '.join(cell(backend) for backend in loaded.values())} |" for row, cell in rows.items()),
    ]
    return "\n".join([*lines, END])


def _loaded(name: str) -> backends.Backend:
    backend, cause = backends.load(name)
    if backend is None:
        raise ImportError(f"backend {name} cannot be asked what it computes: {cause}")
    return backend


def _against(backend: backends.Backend, dtype: torch.dtype, features: int) -> set[str]:
    """The backend's reasons against this dtype and number of features, without those that are about the machine."""
    device = DEVICES[backend.name][0]
    return {*backend.reasons(device, (dtype,), (features,))} - {*backend.reasons(device, (), ())}


def _dtypes(backend: backends.Backend) -> str:
    return ", ".join(_name(dtype) for dtype in DTYPES if not _against(backend, dtype, 32))


def _up_to(backend: backends.Backend, also: Callable[[torch.dtype, int], bool], letter: str = "D") -> str:
    """The most features of each dtype that the backend takes and for which `also` holds."""
    most: dict[int, list[str]] = {}
    for dtype in DTYPES:
        taken = [D for D in range(8, LARGEST, 8) if not _against(backend, dtype, D) and also(dtype, D)]
        if taken:
            most.setdefault(max(taken), []).append(_name(dtype))
    if len(most) == 1:
        return f"{letter} ≤ {next(iter(most))}"
    return "; ".join(f"{letter} ≤ {D} for {', '.join(names)}" for D, names in sorted(most.items(), reverse=True))


def _xfa(norm: str, backend: backends.Backend) -> str:
    """Both maps and activations."""
    fused = {backend.fuses(Spec(map, norm, activation)) for map in MAPS for activation in ACTIVATIONS}
    cell = f"{_how(fused)}, {_up_to(backend, _all)}"
    return cell if True in fused else _composed(backend, cell)


def _linear_attention(backend: backends.Backend) -> str:
    pairs = [(q, k) for q in FEATURE_MAPS for k in FEATURE_MAPS if q != "softmax_tokens"]

    def fused(dtype: torch.dtype, D: int) -> bool:
        return all(backend.fuses_linear_attention(pair, dtype, (D, D)) for pair in pairs)

    limit = _up_to(backend, fused)
    return f"fused, {limit}" if limit else _composed(backend, "composed")


def _gram_form(backend: backends.Backend) -> str:
    """Its two passes over x, of C channels."""
    passes = (backend.function(name) is not None for name in ("layer_gram", "layer_mix"))
    return _composed(backend, f"{_how(passes)}, {_up_to(backend, _all, 'C')}")


def _composed(backend: backends.Backend, cell: str) -> str:
    """The cell of what is, or is composed of, gram and channel_mix."""
    return cell if backend.has_primitives else "no"


def _all(dtype: torch.dtype, features: int) -> bool:
    return True


def _how(fused: Iterable[bool]) -> str:
    known = {*fused}
    return "fused" if known == {True} else "composed" if known == {False} else "in part fused"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def main() -> int:
    path = ROOT / "README.md"
    before, rest = path.read_text().split(BEGIN, 1)
    path.write_text(before + render() + rest.split(END, 1)[1])
    return 0


if __name__ == "__main__":
    argparse.ArgumentParser(prog="python -m bench.support", description=__doc__).parse_args()
    sys.exit(main())
