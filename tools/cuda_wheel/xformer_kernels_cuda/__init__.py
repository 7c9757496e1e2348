"""The CUDA kernels of xformer-kernels, ``_cuda``, which :mod:`xformer_kernels.backends.cuda` calls."""
