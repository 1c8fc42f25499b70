"""Context Broadcasting: every position gets the mean of all (arXiv 2210.08457), which attention then needn't supply.

``CB(x)_i = (x_i + mean_j x_j) / 2`` at the end of an MLP, before what it adds to; without parameters. Prefix tokens are
positions too. The paper's form is for ViTs; on the maps of hierarchies the mean is over a stage's map, which is ours.
"""

from torch import Tensor, nn


def broadcast_context(model: nn.Module) -> nn.Module:
    """Let the MLPs of a model, its modules named ``mlp``, end with Context Broadcasting.

    The names of its parameters, and so its checkpoints, stay as they are. For every model of foveate this is the option
    ``context_broadcasting=True``; call it on timm's ViTs. Rollout and relevance take MLPs as position by position.

    Args:
        model: Its MLPs have a first layer ``fc1``; where that is a convolution, maps are ``[B, C, H, W]``, else
            channels come last.

    Returns:
        The same model.

    Raises:
        ValueError: If it has no such MLP.

    Example:
        >>> import timm
        >>> model = broadcast_context(timm.create_model("vit_tiny_patch16_224"))
    """
    has_mlps = False
    for name, module in model.named_modules():
        first = getattr(module, "fc1", None)
        if name.rpartition(".")[2] == "mlp" and isinstance(first, nn.Linear | nn.Conv2d):
            module.register_forward_hook(_over_rows if isinstance(first, nn.Linear) else _over_channels)
            has_mlps = True
    if not has_mlps:
        raise ValueError(f"context_broadcasting: {type(model).__name__} has no MLPs")
    return model


def _over_rows(module: nn.Module, args: tuple, out: Tensor) -> Tensor:
    return (out + out.mean(list(range(1, out.ndim - 1)), keepdim=True)) / 2


def _over_channels(module: nn.Module, args: tuple, out: Tensor) -> Tensor:
    return (out + out.mean((2, 3), keepdim=True)) / 2
