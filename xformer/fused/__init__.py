"""Fused inference modules for the CPU, which :func:`xformer.fuse_for_inference` swaps in.

A fused module subclasses the layer that it replaces and shares its parameters, buffers and state dict. In eval mode,
in float32 and without gradients, its forward calls the kernels of :mod:`xformer_kernels.inference` or oneDNN's
convolution. Every other call takes the layer's own forward. The choice is made once, when the outermost fused module is
called; fused modules inside it do not check again. Hooks that are registered, and modules that are replaced, inside a
fused module afterwards are ignored.
"""
