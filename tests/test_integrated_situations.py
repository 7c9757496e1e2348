"""What is done to layers of other packages, before and after they are replaced, as in test_replaced_models."""

from __future__ import annotations

import functools

import pytest

pytest.importorskip("timm", reason="timm, whose models the table of situations is made for, is not installed")
from replaced_cases import HEADS, IMAGE, SITUATIONS, TOKENS, C, Kind
from test_integrated_families import CASES, FacebookXCA
from test_replaced_models import check_numbers_and_calls
from torch import nn


def of(name: str, *arguments: object) -> functools.partial[nn.Module]:
    case = CASES[name]

    def make(dim: int, num_heads: int) -> nn.Module:
        return case.cls()(*arguments)

    return functools.partial(make)


NO_DROPS = {"attn_drop": "", "proj_drop": ""}
KINDS = {
    "facebook XCA": Kind(FacebookXCA, (TOKENS,)),
    "vit-pytorch": Kind(
        of("vit-pytorch", C, HEADS, C // HEADS),
        (TOKENS,),
        qkv="to_qkv",
        proj="to_out",
        attn_drop="dropout",
        proj_drop="",
    ),
    "DAT": Kind(of("DAT", C, HEADS, True), (TOKENS, 20, 24)),
    "FDAT": Kind(of("FDAT", C, HEADS, True), (TOKENS, 20, 24), **NO_DROPS),
    "DITN": Kind(of("DITN", C, True), (IMAGE,), proj="project_out", **NO_DROPS),
    "MONAI": Kind(of("MONAI 2D", 2, C, HEADS, True), (IMAGE,), proj="project_out", **NO_DROPS),
}


def applies(name: str, kind: Kind, situation: str) -> bool:
    if any(word in situation for word in ("norm", "drop_path", "layer scale")):
        return False
    if any(part in situation and not getattr(kind, part) for part in ("attn_drop", "proj_drop")):
        return False
    if name == "FDAT" and ("temperature" in situation or "frozen" in situation):  # it has another name
        return False
    return not (name == "DITN" and situation.startswith("temperature")) and not (
        name == "MONAI" and "weight" in situation
    )


ROWS = [
    pytest.param(kind, change, id=f"{name}-{situation}")
    for name, kind in KINDS.items()
    for situation, change in SITUATIONS.items()
    if applies(name, kind, situation)
]


@pytest.mark.parametrize("form", ["gram", "direct"])
@pytest.mark.parametrize(("kind", "change"), ROWS)
def test_numbers_and_calls_are_those_of_the_original(kind, change, form):
    check_numbers_and_calls(kind, change, form)
