"""Gradients of the linear layers, added to the fp32 buffer by the product that forms them.

Megatron-Core does so with a kernel of Apex. Without it, it forms the gradient of a micro-batch in
the weight's dtype and adds it in a second pass: twice the memory traffic, and in bf16 one more
rounding. torch's own product can add to fp32, so Megatron's switch is turned on with torch's
product in the place of Apex's.
"""

import functools

import torch
from megatron.core.tensor_parallel import layers
from megatron.core.transformer import TransformerConfig


def accumulate_in_products(config: TransformerConfig, *, device: torch.device) -> None:
    """Make the linear layers built with `config` add their gradients at once, where it can be had.

    Apex is used where Megatron found it. On a CPU the second pass costs next to nothing.
    """
    has_apex = getattr(layers, "_grad_accum_fusion_available", False)
    if device.type == "cuda" and (has_apex or adds_to_fp32(device)):
        turn_on(config)


def turn_on(config: TransformerConfig) -> None:
    """Use Megatron's switch, with torch's product where there is no Apex."""
    if not layers._grad_accum_fusion_available:
        layers.fused_weight_gradient_mlp_cuda = _InPlaceOfApex
        layers._grad_accum_fusion_available = True
    config.gradient_accumulation_fusion = True


class _InPlaceOfApex:
    """The function of Apex's module that Megatron-Core calls for fp32 buffers."""

    @staticmethod
    def wgrad_gemm_accum_fp32(
        inputs: torch.Tensor, grad_outputs: torch.Tensor, main_grad: torch.Tensor
    ) -> None:
        """Add the gradient of `inputs` [T, I] times the weight to `main_grad`, fp32 [O, I].

        `grad_outputs` [T, O] is the gradient of the product.
        """
        add_product(main_grad, grad_outputs.t(), inputs)


def add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add `left` @ `right` to the fp32 `total`, without a rounding between if it can be had."""
    if right.dtype == torch.float32:
        total.addmm_(left, right)
    elif right.is_cuda and adds_to_fp32(right.device):
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total.add_(left @ right)


@functools.cache
def adds_to_fp32(device: torch.device) -> bool:
    """Whether half precision times half precision can be added to fp32 at once (torch 2.8).

    Tried on a few numbers, since what torch offers depends on the device and its libraries.
    """
    left, right = (torch.ones(16, 16, device=device, dtype=torch.bfloat16) for _ in range(2))
    total = torch.ones(16, 16, device=device)
    try:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError, NotImplementedError):
        return False
    return bool((total == 17.0).all())
