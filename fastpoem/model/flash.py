"""Flash attention: whether a device has it for batches with a row a poem, and which variable-length form there is for packed ones.

flash-attn's function, which the user must compile (there is no wheel), goes before PyTorch's own. Both want 16-bit floats.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch import Tensor

from fastpoem.model.attention import Varlen


def why_not_flash(device: torch.device, dtype: torch.dtype) -> str | None:
    """What keeps scaled_dot_product_attention from its flash kernel here, None where nothing does."""
    if device.type != "cuda":
        return f"the flash kernel runs on CUDA devices, not on {device}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return (
            f"{torch.cuda.get_device_name(device)} is older than the flash kernel, which wants compute capability 8.0"
        )
    if dtype not in (torch.bfloat16, torch.float16):
        return f"the flash kernel computes in 16 bits, not in {str(dtype)[6:]}"
    return None if torch.backends.cuda.is_flash_attention_available() else "this PyTorch was built without it"


def insist_on_flash() -> None:
    """Let scaled_dot_product_attention raise, from here on in this process, rather than take another kernel."""
    torch.backends.cuda.enable_math_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)


def plain_attention() -> None:
    """Keep scaled_dot_product_attention, from here on in this process, to plain operators."""
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)


def find_varlen(device: torch.device, dtype: torch.dtype, head_width: int) -> tuple[Varlen | None, str]:
    """(variable-length attention for packed batches, what that is in words)."""
    reason = why_not_flash(device, dtype)
    if head_width % 8 or head_width > 256:  # scaled_dot_product_attention would pad them; this kernel does not
        reason = reason or f"the flash kernel takes no heads {head_width} wide"
    if reason is not None:
        return None, f"poem by poem, padded: {reason}"
    # By the function: another package of the name has none.
    function = _imported("flash_attn", "flash_attn_varlen_func")
    if function is not None:
        return _flash_attn(function), "flash-attn's variable-length kernel"
    return _aten, "PyTorch's variable-length flash kernel"


def _imported(module: str, name: str) -> Callable[..., Tensor] | None:
    try:
        return getattr(importlib.import_module(module), name, None)
    except (ImportError, OSError):  # OSError: compiled against another CUDA
        return None


def _flash_attn(function: Callable[..., Tensor]) -> Varlen:
    def attend(q: Tensor, k: Tensor, v: Tensor, borders: Tensor, longest: int, scale: float, dropout: float) -> Tensor:
        return function(
            q, k, v, borders, borders, longest, longest, dropout_p=dropout, softmax_scale=scale, causal=True
        )

    return attend


def _aten(q: Tensor, k: Tensor, v: Tensor, borders: Tensor, longest: int, scale: float, dropout: float) -> Tensor:
    """What torch.nn.attention.varlen.varlen_attn calls; called here because that has no dropout."""
    return torch.ops.aten._flash_attention_forward(
        q, k, v, borders, borders, longest, longest, dropout, True, False, scale=scale
    )[0]
