"""Our kernels in models that exist: ``replace_attention(model)`` and ``restore_attention(model)``."""

from xformer_kernels.integrations.replace import replace_attention, restore_attention

__all__ = ["replace_attention", "restore_attention"]
