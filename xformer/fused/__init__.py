"""The backbone's layers as calls of kernels, for inference on the CPU: what :func:`xformer.fuse_for_inference` puts in.

A fused module has the class of a layer as its base, and that layer's parameters, buffers and state dict. In float32
without gradients, in eval mode, its forward is a few calls of :mod:`xformer_kernels.inference`'s kernels, or of
oneDNN's convolution; in every other call it is the layer's own forward. Which one is decided once, where the call
enters the module: kernels inside it do not ask again. Hooks and other modules that are put into a fused module later
are not seen.
"""
