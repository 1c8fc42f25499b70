"""Layers of timm's that pad to multiples, in other words for graphs of any size.

A side that is padded by its remainder stands in the result twice; after four such layers torch reasons for minutes
about sixteen of them. Padded by a constant, it stands there once.
"""

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.models.swin_transformer import PatchMerging
from torch import Tensor, nn


def restate_sizes(model: nn.Module) -> None:
    """Let the layers of a model that pad do so by constants; what it computes stays the same."""
    for module in model.modules():
        if type(module) is PatchMerging:
            module.forward = lambda x, module=module: _merge(module, x)
        elif type(module) is PatchEmbed and module.dynamic_img_pad and module.img_size is None:
            module.dynamic_img_pad = False
            # The convolution leaves out what makes no whole patch.
            height, width = module.patch_size
            more = (0, width - 1, 0, height - 1)
            module.proj.register_forward_pre_hook(lambda conv, inputs, more=more: F.pad(inputs[0], more))


def _merge(module: PatchMerging, x: Tensor) -> Tensor:
    # Every other row, and those after them; the last may be of zeros.
    x = torch.stack([x[:, ::2], F.pad(x, (0, 0, 0, 0, 0, 1))[:, 1::2]], dim=3)
    x = torch.stack([x[:, :, ::2], F.pad(x, (0, 0, 0, 0, 0, 1))[:, :, 1::2]], dim=3)
    return module.reduction(module.norm(x.flatten(3)))
