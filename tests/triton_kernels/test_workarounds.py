"""Which kernels must not use asynchronous tensor core instructions, and the check of machine code for ptxas's fault."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from bench import sass
from xformer_kernels.backends.triton import launch, workarounds

ONE_STEP, STEPS = {"D": 48, "BLOCK_K": 64}, {"I": 48, "I2": 96, "BLOCK_K": 64}


def test_architectures():
    found = [launch.architecture(*capability) for capability in ((8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 1))]
    assert found == ["sm_89", "sm_90", "sm_100", "sm_100", "sm_100", "sm_120"]


@pytest.mark.parametrize("has_fences", [True, False])
def test_kernels_that_use_mma_sync(has_fences, monkeypatch):
    monkeypatch.setattr(workarounds, "HAS_FENCES", has_fences)
    halves, floats = ((torch.empty(1, dtype=dtype), 3) for dtype in (torch.bfloat16, torch.float32))
    of = workarounds.uses_mma_sync
    for constants in ({"D": 48}, ONE_STEP, STEPS):
        assert not of("sm_80", halves, constants) and not of("gfx942", halves, constants)
        assert of("sm_100", floats, constants) == of("sm_100", halves, constants) == (not has_fences)
        assert of("sm_90", halves, constants) == (constants is STEPS or not has_fences)
        assert of("sm_90", floats, constants) == (constants is STEPS)


@pytest.mark.parametrize("before", [None, "0"])
def test_environment_is_restored(before, monkeypatch):
    monkeypatch.delenv("DISABLE_MMA_V3", raising=False)
    if before is not None:
        monkeypatch.setenv("DISABLE_MMA_V3", before)
    with pytest.raises(RuntimeError), workarounds.compiling("sm_90", (), STEPS):
        assert os.environ["DISABLE_MMA_V3"] == "1"
        raise RuntimeError
    assert os.environ.get("DISABLE_MMA_V3") == before
    with workarounds.compiling("sm_80", (), STEPS):
        assert os.environ.get("DISABLE_MMA_V3") == before


LOOP = """
Function : kernel
.L_x_1:
/*0000*/ LDS.128 R88, [R104] ;
/*0010*/ HGMMA.64x128x16.F32.BF16 R24, R92, gdesc[UR12], R24, gsb0 ;
/*0020*/ WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
/*0030*/ {before}
/*0040*/ HGMMA.64x128x16.F32.BF16 R24, R88, gdesc[UR4], R24, gsb0 ;
/*0050*/ WARPGROUP.DEPBAR.LE gsb0, {left} ;
/*0060*/ {after}
/*0070*/ @P5 BRA `(.L_x_1) ;
/*0080*/ WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
/*0090*/ IMAD R89, R107, 0x80, R122 ;
"""


@pytest.mark.parametrize(
    ("before", "left", "after", "written"),
    [
        # R88 to R91, which the second product reads, are loaded at the top of the loop, one wait too early
        ("NOP ;", "0x1", "NOP ;", ["LDS.128"]),
        ("NOP ;", "0x0", "NOP ;", []),
        # R92 to R95 are of the first product, for which the wait in the middle does not wait, but the next one does
        ("IMAD R95, R108, 0x80, R115 ;", "0x0", "NOP ;", ["IMAD"]),
        ("NOP ;", "0x0", "IMAD R95, R108, 0x80, R115 ;", []),
        ("ISETP.GE.AND P1, PT, R95, R2, PT ;", "0x0", "NOP ;", []),
        ("IADD3 R94, P5, R18, R134.reuse, RZ ;", "0x0", "NOP ;", ["IADD3"]),
    ],
)
def test_overwritten_registers_are_found(before, left, after, written):
    code = sass.read(LOOP.format(before=before, left=left, after=after))["kernel"]
    assert [name for name in written if any(f"name='{name}'" in found for found in code.overwritten())] == written
    assert len(code.overwritten()) == len(written)
