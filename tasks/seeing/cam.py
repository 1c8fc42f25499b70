"""Class activation maps of any timm model, at the layer where its family has one: Grad-CAM, Grad-CAM++, LayerCAM.

The formulas are those of pytorch-grad-cam, and so is the finish: positive part, scaled to 0..1, resized bilinearly,
scaled again.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import TaskError

# So many calls' gradients are asked for at once when the layer is looked for, from the last one on.
_CHUNK = 32

Target = int | Sequence[int] | Tensor | None


def grad_cam(
    model: nn.Module, x: Tensor, target: Target = None, layer: str | nn.Module | None = None, raw: bool = False
) -> Tensor:
    """Weigh the channels of a map by their mean gradients (Grad-CAM, Selvaraju et al., ICCV 2017, eq. 1 and 2).

    The layer matters more than the method. By default it is the last map in which every position still has a say
    (`cam_layer` names it):

    * Where the map is averaged, that is the map as it is averaged: after the final norm, if that comes before the
      pooling (Swin and most of ours), else the last stage's output. The norm belongs to it: after it the gradient is
      the same at every position, so that the map is the classifier's own sum, CAM itself; before it each position's
      channels have a scale of their own, which the norm takes out and the map would show instead of the class.
    * Where a class token is read, the gradient of the final norm, of the last block and of its second norm is exactly
      0 at every patch, and the map blank: the patches' last word is what the last attention reads, the output of the
      last block's first norm. With attention pooling (SigLIP) it is what the pooling reads.

    Args:
        model: Any classifier on images, ours, timm's or another's; it is run in evaluation mode and left as it was.
        x: Images ``[B, C, H, W]``, normalised.
        target: Class whose raw logit is explained, one for all images or one for each; the likeliest if None.
        layer: Name of a module, or the module, whose output is a map NCHW, NHWC or ``[B, tokens, C]``, from which
            prefix tokens are dropped; `cam_layer`'s if None.
        raw: Whether to return the sum over channels as it is.

    Returns:
        ``[B, H, W]`` of 0 to 1, or with ``raw`` ``[B, h, w]`` on the layer's cells, negative where a cell speaks
        against the class. An image without positive evidence gets zeros, and a warning says so.

    Raises:
        TaskError: If the layer is unknown or gives no map, if no patch has a gradient there, or if the model has no
            such layer.
    """
    return _cam(model, x, target, layer, raw, lambda a, g: (g.mean((2, 3), keepdim=True) * a).sum(1))


def grad_cam_plus_plus(
    model: nn.Module, x: Tensor, target: Target = None, layer: str | nn.Module | None = None, raw: bool = False
) -> Tensor:
    """Weigh channels by their positive gradients, shared out among places (Grad-CAM++, WACV 2018, eq. 19).

    As in pytorch-grad-cam, the derivatives of a softmax's exponential are powers of the gradient. Everything else is as
    for `grad_cam`.
    """

    def weigh(a: Tensor, g: Tensor) -> Tensor:
        share = g**2 / (2 * g**2 + a.sum((2, 3), keepdim=True) * g**3 + 1e-6)
        return ((torch.where(g != 0, share, 0) * g.clamp(min=0)).sum((2, 3), keepdim=True) * a).sum(1)

    return _cam(model, x, target, layer, raw, weigh)


def layer_cam(
    model: nn.Module, x: Tensor, target: Target = None, layer: str | nn.Module | None = None, raw: bool = False
) -> Tensor:
    """Weigh every activation by its own positive gradient (LayerCAM, TIP 2021, eq. 6): fit for finer layers too.

    Everything else is as for `grad_cam`.
    """
    return _cam(model, x, target, layer, raw, lambda a, g: (g.clamp(min=0) * a).sum(1))


@torch.inference_mode(False)
@torch.enable_grad()
def cam_layer(model: nn.Module, x: Tensor, target: Target = None) -> str:
    """Return the name of the module whose output the maps of a model are drawn from by default; see `grad_cam`.

    It is found by what depends on what, not by the model's name: of all modules' outputs that are maps, the last one
    with a gradient at its patches; and where that lies within an attention, such as its keys, what the attention reads.

    Args:
        model: A classifier on images.
        x: Images ``[B, C, H, W]``; the first one is looked at.
        target: As for `grad_cam`.

    Raises:
        TaskError: If there is no such layer.
    """
    model = getattr(model, "_orig_mod", model)
    calls: list[_Call] = []
    names = {module: name for name, module in model.named_modules()}

    def keep(module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        given = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if module is not model and isinstance(output, Tensor):
            calls.append(_Call(names[module], module, given, output))

    x = x[:1]
    score = _score(model, x, target if not _many(target) else target[:1], dict.fromkeys(names, keep))

    # Backwards to the last map whose patches have a gradient.
    last = None
    for end in range(len(calls), 0, -_CHUNK):
        chunk = [i for i in range(max(0, end - _CHUNK), end) if _is_map(calls[i].output, model, x)]
        gradients = _gradients(score, [calls[i].output for i in chunk])
        last = next((i for i, g in zip(chunk[::-1], gradients[::-1], strict=True) if _reaches(g, model, x)), None)
        if last is not None:
            break
    if last is None:
        raise TaskError(
            f"{_name(model)}: no module's output is a map of patches that the answer depends on, as where an untrained "
            "classifier's weights are 0; load weights, or name a layer"
        )

    source = calls[last]
    if not _is_norm(source.module):
        # What the module read that used the map up: a pooling, or an attention around its keys and values.
        for call in calls[last + 1 :]:
            if call.given is None or not _is_map(call.given, model, x):
                continue
            if _reaches(_gradients(score, [call.given])[0], model, x):
                made = [other for other in calls if _same(other.output, call.given)]
                if not made:
                    raise TaskError(
                        f"{_name(model)}: what {call.name} reads is no module's output; name a layer: its map is drawn"
                    )
                source = made[0]
                break
    # Of modules that give the same tensor, as a block and its stage do, the outermost; never one that does nothing.
    same = [call for call in calls if _same(call.output, source.output)]
    same = [call for call in same if not isinstance(call.module, nn.Identity | nn.modules.dropout._DropoutNd)] or same
    return min(same, key=lambda call: call.name.count(".")).name


class _Call(NamedTuple):
    name: str
    module: nn.Module
    given: Tensor | None
    output: Tensor


@torch.inference_mode(False)
@torch.enable_grad()
def _cam(
    model: nn.Module,
    x: Tensor,
    target: Target,
    layer: str | nn.Module | None,
    raw: bool,
    combine: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    model = getattr(model, "_orig_mod", model)
    if layer is None:
        layer = cam_layer(model, x, target)
    name, module = _find(model, layer)
    outputs = []

    def keep(module: nn.Module, args: tuple, kwargs: dict, output: object) -> Tensor | None:
        if not isinstance(output, Tensor):
            raise TaskError(f"{_name(model)}: {name} gives {type(output).__name__}, not a map; name another layer")
        outputs.append(output)
        # What follows may write into it, as a ReLU in place does.
        return output.clone()

    score = _score(model, x, target, {module: keep})
    if not outputs:
        raise TaskError(f"{_name(model)}: {name} isn't called by a forward pass; name another layer")
    if not _is_map(outputs[-1], model, x):
        shape = "x".join(map(str, outputs[-1].shape))
        raise TaskError(f"{_name(model)}: {name} gives {shape}, which is no map of several cells; name another layer")
    gradient = _gradients(score, outputs[-1:])[0]
    if not _reaches(gradient, model, x):
        raise TaskError(
            f"{_name(model)}: no patch has a gradient at {name}, so that its map is blank; use {cam_layer(model, x)}"
        )
    activation, gradient = (_as_map(value.detach(), model, x).float() for value in (outputs[-1], gradient))
    cams = combine(activation, gradient)
    if raw:
        return cams
    blank = (cams <= 0).flatten(1).all(1).nonzero().flatten().tolist()
    if blank:
        warnings.warn(f"{name} holds no positive evidence for the class in image {blank}; the map is 0", stacklevel=3)
    sized = F.interpolate(_scaled(cams.clamp(min=0))[:, None], x.shape[-2:], mode="bilinear", align_corners=False)
    return _scaled(sized[:, 0])


def _scaled(maps: Tensor) -> Tensor:
    maps = maps - maps.amin((1, 2), keepdim=True)
    return maps / (1e-7 + maps.amax((1, 2), keepdim=True))


def _many(target: Target) -> bool:
    return isinstance(target, Sequence) or (isinstance(target, Tensor) and target.ndim > 0)


def _score(model: nn.Module, x: Tensor, target: Target, hooks: dict[nn.Module, Callable]) -> Tensor:
    """Return the sum of each image's own logit, with hooks on the forward pass alone."""
    if x.ndim != 4:
        raise TaskError(f"{_name(model)}: images are [B, C, H, W], got {list(x.shape)}")
    with contextlib.ExitStack() as stack:
        stack.enter_context(evaluating(model))
        # Hooks that come after compilation aren't called.
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for module, hook in hooks.items():
            stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        logits = model(x.detach().clone().requires_grad_(x.is_floating_point()))
    return target_logits(model, logits, target).sum()


def target_logits(model: nn.Module, logits: Tensor, target: Target) -> Tensor:
    """Return the logit ``[B]`` of each image's target; of the likeliest class if there is none.

    Raises:
        TaskError: If the answer isn't one row of logits for each image, or has no such class.
    """
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        what = f"{list(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise TaskError(
            f"{_name(model)}: gives {what}, not logits [B, classes]; only a classifier has a class to explain"
        )
    if logits.shape[1] == 0:
        raise TaskError(f"{_name(model)}: has no classes; create it with num_classes")
    return logits.gather(1, target_indices(model, logits, target)[:, None])[:, 0]


def target_indices(model: nn.Module, logits: Tensor, target: Target) -> Tensor:
    """Return the class ``[B]`` that is meant for each row of logits ``[B, classes]``.

    Raises:
        TaskError: If there is no such class, or not one for each image.
    """
    if target is None:
        return logits.argmax(1)
    indices = torch.as_tensor(target, device=logits.device)
    if indices.ndim > 1 or indices.dtype not in (torch.int32, torch.int64) or indices.numel() not in (1, len(logits)):
        raise TaskError(f"target is {target}, but must be one class, or one for each of the {len(logits)} images")
    if indices.min() < 0 or indices.max() >= logits.shape[1]:
        raise TaskError(f"target is {target}, but {_name(model)} has classes 0 to {logits.shape[1] - 1}")
    return indices.long().expand(len(logits)) if indices.ndim == 0 or len(indices) == 1 else indices.long()


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and every module back as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _gradients(score: Tensor, tensors: list[Tensor]) -> list[Tensor | None]:
    inputs = [tensor for tensor in tensors if tensor.requires_grad]
    gradients = iter(torch.autograd.grad(score, inputs, retain_graph=True, allow_unused=True) if inputs else ())
    return [next(gradients) if tensor.requires_grad else None for tensor in tensors]


def _find(model: nn.Module, layer: str | nn.Module) -> tuple[str, nn.Module]:
    modules = dict(model.named_modules())
    if isinstance(layer, nn.Module):
        for name, module in modules.items():
            if module is layer:
                return name or _name(model), module
        raise TaskError(f"{_name(model)}: the layer is no module of the model")
    if layer not in modules or not layer:
        from .. import nearest

        raise TaskError(f"{_name(model)} has no module {layer!r}{nearest(layer, filter(None, modules))}")
    return layer, modules[layer]


def _name(model: nn.Module) -> str:
    cfg = getattr(model, "pretrained_cfg", None) or {}
    return cfg.get("architecture") or type(model).__name__


def _is_norm(module: nn.Module) -> bool:
    return "Norm" in type(module).__name__


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride())


def _fits(height: int, width: int, x: Tensor) -> bool:
    """Return whether a grid may be that of images: several cells, and as square as rounding lets them be."""
    if height * width < 2 or height > x.shape[2] or width > x.shape[3]:
        return False
    if x.shape[2] == x.shape[3]:
        return height == width
    # Both sides are lengths over one stride, rounded up or down; an unpadded convolution costs a cell.
    lengths = ((height, x.shape[2]), (width, x.shape[3]))
    least = max(length / (cells + 1.5) for cells, length in lengths)
    return least <= min(length / max(cells - 1, 0.5) for cells, length in lengths)


def _grid(tensor: Tensor, model: nn.Module, x: Tensor) -> tuple[str, int, int, int] | None:
    """Return how a tensor is a map of images: its layout, prefix tokens, height and width; None if it isn't one."""
    if tensor.ndim == 4 and tensor.is_floating_point() and len(tensor) == len(x):
        layouts = [
            (layout, 0, height, width)
            for layout, (height, width) in (("NCHW", tensor.shape[2:]), ("NHWC", tensor.shape[1:3]))
            if _fits(height, width, x)
        ]
        if len(layouts) > 1 and str(getattr(model, "output_fmt", "NCHW")).endswith("NHWC"):
            layouts.reverse()
        return layouts[0] if layouts else None
    if tensor.ndim == 3 and tensor.is_floating_point() and len(tensor) == len(x):
        prefix = getattr(model, "num_prefix_tokens", None)
        # A block may add the prefix tokens only at the end, or drop them.
        for count in dict.fromkeys((*(() if prefix is None else (prefix,)), 0, 1, 2)):
            if (sides := _sides(tensor.shape[1] - count, x)) is not None:
                return "NLC", count, *sides
    return None


def _sides(tokens: int, x: Tensor) -> tuple[int, int] | None:
    """Return the height and width of so many tokens, those nearest to the images' shape."""
    pairs = [(h, tokens // h) for h in range(1, tokens + 1) if tokens % h == 0 and _fits(h, tokens // h, x)]
    ratio = x.shape[2] / x.shape[3]
    return min(pairs, key=lambda pair: abs(pair[0] / pair[1] - ratio), default=None)


def _is_map(tensor: Tensor, model: nn.Module, x: Tensor) -> bool:
    return _grid(tensor, model, x) is not None


def _as_map(tensor: Tensor, model: nn.Module, x: Tensor) -> Tensor:
    """Return a map in any layout as ``[B, C, h, w]``."""
    layout, prefix, height, width = _grid(tensor, model, x)
    if layout == "NCHW":
        return tensor
    if layout == "NHWC":
        return tensor.permute(0, 3, 1, 2)
    return tensor[:, prefix:].transpose(1, 2).unflatten(2, (height, width))


def _reaches(gradient: Tensor | None, model: nn.Module, x: Tensor) -> bool:
    """Return whether any patch has a gradient that isn't the rounding of what cancels."""
    if gradient is None:
        return False
    return bool(_as_map(gradient, model, x).abs().max() > 1e-5 * gradient.abs().max())
