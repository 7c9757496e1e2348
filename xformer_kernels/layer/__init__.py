"""The layer around :func:`xformer_kernels.xfa`, in two passes over x.

functional.py has the public functions. cost.py chooses the form, from the figures that calibration.py keeps. ops.py has
the Gram form as differentiable ops, made of the passes over tokens in passes.py, the algebra in algebra.py, and the
maps of the heads in maps.py.
"""

from xformer_kernels.layer.functional import LayerExplanation, explain_layer, xfa_block, xfa_layer

__all__ = ["LayerExplanation", "explain_layer", "xfa_block", "xfa_layer"]
