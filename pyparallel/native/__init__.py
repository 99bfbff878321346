"""Our compiled code as Python sees it: the C++ and the CUDA extension, and Triton's kernels."""

import torch

# What all our kernels take; some take more.
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
