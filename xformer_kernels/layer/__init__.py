"""The layer around :func:`xformer_kernels.xfa`, in two passes over x.

functional.py is what users call, cost.py decides which form it takes, by figures that calibration.py keeps; ops.py is
the Gram form as differentiable ops: the passes over tokens of passes.py, and between them the algebra of algebra.py.
"""

from xformer_kernels.layer.functional import LayerExplanation, explain_layer, xfa_block, xfa_layer

__all__ = ["LayerExplanation", "explain_layer", "xfa_block", "xfa_layer"]
