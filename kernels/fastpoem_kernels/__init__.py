"""The two places where a language model's training step is bound by memory, each made one pass over it; and a product for one kind of CPU.

`cross_entropy`: loss, gradient and accuracy of `[N, V]` logits from one read and one write of them.
`clipped_adamw_`: gradient norm, clipping and AdamW over one flat buffer, without asking the device anything.
`product`: `torch.mm`, but for bfloat16 on a CPU with AMX.

The first two run as Triton kernels on CUDA tensors, as blocked PyTorch (the loss as C where gcc is) on CPU tensors, and as Triton
kernels under the interpreter on CPU tensors with `TRITON_INTERPRET=1`. The package stands alone: it needs PyTorch, and Triton
where there is a GPU.
"""

from fastpoem_kernels.adamw import clipped_adamw_, gradient_norm
from fastpoem_kernels.loss import CrossEntropy, cross_entropy
from fastpoem_kernels.products import product

__all__ = ["CrossEntropy", "clipped_adamw_", "cross_entropy", "gradient_norm", "product"]
