"""Device code of the Triton kernels."""
