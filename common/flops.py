"""PyTorch's count of FLOPs, with the fused attention of CPUs, for which it has no formula."""

import torch
from torch.utils.flop_counter import (
    FlopCounterMode,
    flop_registry,
    register_flop_formula,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FUSED_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

if FUSED not in flop_registry:

    @register_flop_formula(FUSED)
    def fused_flops(query, key, value, *_, **__):
        return sdpa_flop_count(query, key, value)

    @register_flop_formula(FUSED_BACKWARD)
    def fused_backward_flops(gradient, query, key, value, *_, **__):
        return sdpa_backward_flop_count(gradient, query, key, value)


def flop_counter():
    """A context; its get_total_flops() are those of what happens inside."""
    return FlopCounterMode(display=False)


def flops_of(operation, args, kwargs, result):
    """Those of one operation; 0 of those that PyTorch does not count, point by point ones and copies."""
    formula = flop_registry.get(operation._overloadpacket)
    return formula(*args, **kwargs, out_val=result) if formula else 0
