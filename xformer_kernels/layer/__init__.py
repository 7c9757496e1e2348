"""The layer around :func:`xformer_kernels.xfa`, in two passes over x.

functional.py what users call; cost.py which form it takes; ops.py the Gram form as differentiable ops; passes.py the two
passes over tokens; algebra.py what lies between them; parallel.py tokens split over ranks.
"""

from xformer_kernels.layer.functional import LayerExplanation, explain_layer, xfa_block, xfa_layer

__all__ = ["LayerExplanation", "explain_layer", "xfa_block", "xfa_layer"]
