"""What all segmenters have in common: which images they take, and how these become a batch."""

from collections.abc import Sequence

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from ....zoo.backbone import crop_maps
from ... import TaskError
from ..neck import MultiLevelNeck
from ..normalize import check_images, check_order, dtype_of, normalize
from .inference import pad_to


class BaseSegmenter(nn.Module):
    """A model that normalises its images for `predict` and `loss`; ``forward`` takes normalised ones.

    Args:
        backbone: Maps images to a list of maps.
        neck: Makes the head's maps of the backbone's, see `segmenter_neck`; None if these are the same.
        mean: Mean of the channels, of images of 0 to 1; kept beside the parameters, not in the state dict.
        std: Their standard deviation.
        channel_order: ``"rgb"``, or ``"bgr"``: the model sees the channels the other way round, and ``mean`` and
            ``std`` are in its order.
    """

    def __init__(
        self,
        backbone: nn.Module,
        neck: nn.Module | None = None,
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
        channel_order: str = "rgb",
    ):
        super().__init__()
        check_order(channel_order)
        self.channel_order = channel_order
        self.backbone, self.neck = backbone, neck
        if len(mean) != len(std):
            raise TaskError(f"mean has {len(mean)} channels and std {len(std)}; they must have as many as the images")
        self.mean, self.std = tuple(mean), tuple(std)

    def features(self, x: Tensor) -> list[Tensor]:
        """Map normalised images ``[B, C, H, W]`` to the maps that the head takes."""
        maps = self.backbone(x)
        if self.neck is None:
            return maps
        maps = self.neck(maps)
        # As published, MultiLevelNeck leaves it to the resizing of the logits to undo the padding to whole patches.
        exact = isinstance(self.neck, MultiLevelNeck)
        return maps if exact else crop_maps(maps, self.neck.reductions, x.shape[-2:])

    def prepare(self, images: Tensor, normalized: bool = False, look: bool = True) -> Tensor:
        """Return images ``[B, C, H, W]`` as ``forward`` takes them: normalised, in the dtype of the parameters.

        Args:
            images: uint8, or floating point of 0 to 1.
            normalized: Whether they are normalised already.
            look: Whether to see that values are of 0 to 1, for which the host waits for a GPU.

        Raises:
            TaskError: If they are none of these.
        """
        if images.dim() != 4:
            raise TaskError(
                f"images have shape {tuple(images.shape)}; they must be [B, {len(self.mean)}, height, width], or a "
                f"list of [{len(self.mean)}, height, width]"
            )
        check_images(images, len(self.mean), normalized, look)
        return (images if normalized else normalize(images, self.mean, self.std, self.channel_order)).to(dtype_of(self))

    def prepare_one(self, image: Tensor, normalized: bool = False, look: bool = True) -> Tensor:
        """Return an image ``[C, H, W]`` of a list as a batch of its own; see `prepare`."""
        if image.dim() != 3:
            raise TaskError(
                f"an image of the list has shape {tuple(image.shape)}; it must be [{len(self.mean)}, height, width]"
            )
        return self.prepare(image[None], normalized, look)

    def prepare_batch(self, images: Tensor | Sequence[Tensor], normalized: bool = False) -> tuple[Tensor, list]:
        """Return images to train on as one batch, padded by zeros, and the ``(height, width)`` of each.

        The values of images on a GPU are not looked at, so that the host needn't wait.
        """
        if isinstance(images, Tensor):
            batch = self.prepare(images, normalized, images.device.type == "cpu")
            return batch, [tuple(batch.shape[-2:])] * len(batch)
        if not len(images):
            raise TaskError("the list of images is empty")
        done = [self.prepare_one(image, normalized, image.device.type == "cpu")[0] for image in images]
        sizes = [tuple(image.shape[-2:]) for image in done]
        canvas = tuple(max(sides) for sides in zip(*sizes, strict=True))
        return torch.stack([pad_to(image, canvas) for image in done]), sizes
