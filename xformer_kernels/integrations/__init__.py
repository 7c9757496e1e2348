"""Our kernels in models that exist: ``replace_attention(model)`` and ``restore_attention(model)``."""

from xformer_kernels.integrations.replace import is_replaced, replace_attention, restore_attention

__all__ = ["is_replaced", "replace_attention", "restore_attention"]
