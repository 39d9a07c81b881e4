"""Counting FLOPs with PyTorch's counter, extended by CPU flash attention, for which it has no formula."""

from typing import Any

import torch
from torch.utils.flop_counter import (
    FlopCounterMode,
    flop_registry,
    register_flop_formula,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

CPU_FLASH_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
CPU_FLASH_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

if CPU_FLASH_ATTENTION not in flop_registry:

    @register_flop_formula(CPU_FLASH_ATTENTION)
    def flash_attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(query, key, value)

    @register_flop_formula(CPU_FLASH_ATTENTION_BACKWARD)
    def flash_attention_backward_flops(
        gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any
    ) -> int:
        return sdpa_backward_flop_count(gradient, query, key, value)


def flop_counter() -> FlopCounterMode:
    """Return a context whose `get_total_flops()` counts what happens inside it."""
    return FlopCounterMode(display=False)


def op_flops(operation: Any, args: Any, kwargs: Any, result: Any) -> int:
    """Return the FLOPs of one operation; PyTorch counts 0 for elementwise operations and copies."""
    formula = flop_registry.get(operation._overloadpacket)
    return formula(*args, **kwargs, out_val=result) if formula else 0
