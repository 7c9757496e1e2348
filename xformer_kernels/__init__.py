"""Fused cross feature attention (XFA): attention over features instead of tokens.

    xfa(q, k, v, temperature)        the operator, see its docstring for the formulas
    gram, channel_mix                the two passes it is made of
    linear_attention                 linear attention with feature maps of q and k, normalised or not
    split_qkv                        splits a packed projection into q, k and v; its gradient is then written once
    xfa_layer, xfa_block             xfa with projections, and with layer norm and residual: two passes over x
    XFA, XFABlock                    the same as modules; XFA has the state dict of timm's XCA
    integrations.replace_attention   replaces the attention layers of whole models
    inference                        linear layers and depthwise convolutions with adjacent operations fused, on the CPU
    flops                            FLOP counts of the ops, for torch's flop counter and for fvcore
    decompositions                   the ops in PyTorch operators, for exported programs that run without this package
    explain, explain_layer           which backend serves a call, in which form, and why others do not

``python -m xformer_kernels.info`` prints what was built and which backends run on this machine.
"""

from xformer_kernels import flops, inference, integrations
from xformer_kernels.decompositions import decompositions
from xformer_kernels.functional import channel_mix, explain, gram, xfa
from xformer_kernels.layer import explain_layer, xfa_block, xfa_layer
from xformer_kernels.linear_attention import linear_attention
from xformer_kernels.nn import XFA, XFABlock
from xformer_kernels.packed import split_qkv

__version__ = "0.2.0"
__all__ = [
    "XFA",
    "XFABlock",
    "channel_mix",
    "decompositions",
    "explain",
    "explain_layer",
    "flops",
    "gram",
    "inference",
    "integrations",
    "linear_attention",
    "split_qkv",
    "xfa",
    "xfa_block",
    "xfa_layer",
]
