"""Use of the kernels in existing models: ``replace_attention(model)`` and ``restore_attention(model)``.

:func:`tiled_mdta` is Restormer's attention for images whose q, k and v do not fit into memory.
"""

from xformer_kernels.integrations.replace import is_replaced, replace_attention, restore_attention
from xformer_kernels.integrations.tiled import tiled_mdta

__all__ = ["is_replaced", "replace_attention", "restore_attention", "tiled_mdta"]
