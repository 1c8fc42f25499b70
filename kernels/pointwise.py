"""A linear layer at every position of a map, or at every token."""

import torch
import torch.nn.functional as F
from torch import Tensor

BACKENDS = ("linear", "convolution")


def choose_backend(x: Tensor) -> str:
    """Return the backend that `pointwise` takes by itself.

    In float32 on a CPU the product is the same as a 1x1 convolution, for which oneDNN generates code for the processor
    at hand; the matrix product of torch's BLAS can be half as fast. Under a compiler there is nothing to choose.
    """
    if torch.compiler.is_compiling():
        return "linear"
    convolution = (
        x.ndim in (3, 4)
        and x.shape[1:-1].numel() > 1  # lone positions are no image to oneDNN
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and torch.get_num_threads() > 1  # torch itself leaves oneDNN on a single thread
    )
    return "convolution" if convolution else "linear"


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None = None, backend: str | None = None) -> Tensor:
    """Apply a linear layer to the channels of each position.

    Args:
        x: Map ``[B, H, W, in]``, or tokens ``[B, N, in]``.
        weight: ``[out, in]``.
        bias: ``[out]``.
        backend: ``"linear"``, the reference, or ``"convolution"``; chosen by `choose_backend` by default.

    Returns:
        ``[B, H, W, out]``, or ``[B, N, out]``.

    Raises:
        ValueError: If the backend is unknown.

    Example:
        >>> pointwise(torch.randn(1, 5, 7, 16), torch.randn(32, 16)).shape
        torch.Size([1, 5, 7, 32])
    """
    if backend is None:
        backend = choose_backend(x)
    if backend == "linear":
        return F.linear(x, weight, bias)
    if backend == "convolution":
        image = x if x.ndim == 4 else x.unsqueeze(2)
        # The permuted map is a channels_last one: nothing is copied on the way in or out.
        out = F.conv2d(image.permute(0, 3, 1, 2), weight[:, :, None, None], bias).permute(0, 2, 3, 1)
        return out if x.ndim == 4 else out.squeeze(2)
    raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}; got {backend!r}")
