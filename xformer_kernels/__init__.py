"""Fused cross feature attention (XFA): attention over features instead of tokens.

    xfa(q, k, v, temperature)        the operator, see its docstring for the formulas
    gram, channel_mix                the two passes it is made of
    XFA                              the drop-in layer, with the state dict of timm's XCA
    integrations.replace_attention   the same for whole models
    explain(q, k, v, temperature)    which backend serves a call, and why others do not

``python -m xformer_kernels.info`` prints what was built and what runs here.
"""

from xformer_kernels import integrations
from xformer_kernels.functional import channel_mix, explain, gram, xfa
from xformer_kernels.nn import XFA

__version__ = "0.1.0"
__all__ = ["XFA", "channel_mix", "explain", "gram", "integrations", "xfa"]
