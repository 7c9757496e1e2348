"""Fused inference modules for the CPU, swapped in by :func:`xformer.fuse_for_inference`.

A fused module subclasses the layer that it replaces and shares its parameters, buffers and state dict. In eval mode,
in float32 and without gradients, its forward calls the kernels of :mod:`xformer_kernels.inference` or oneDNN's
convolution. Every other call runs the layer's own forward. The choice is made once, when the outermost fused module is
called; fused modules inside it do not check again. Hooks registered, and modules replaced, inside a fused module
afterwards are ignored.
"""
