"""Augmentation of fine-tuning besides crop and flip: RandAugment, random erasing, mixup and
cutmix, all of them timm's.

timm draws from the global generators of Python, NumPy and torch, so each is seeded before each use:
RandAugment by a sample's position, the rest by the micro-batch.
"""

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64, Real
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from maepretrain.data.module import ShardData
from maepretrain.data.transforms import Augment

# Share of the image's side by which RandAugment translates at most (timm's create_transform).
TRANSLATE = 0.45


def seed_global(seed: int) -> None:
    """Seed Python's and NumPy's global generators, from which timm draws."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002


def _at_least_one_bit(level_fn: Callable[..., tuple[int]], *args: Any) -> tuple[int]:
    """timm (1.0.31) posterises to 0 bits at full magnitude, which Pillow (13) refuses."""
    (bits,) = level_fn(*args)
    return (max(1, bits),)


@dataclass(frozen=True)
class RandAugmented(Augment):
    """Crop and flip, then RandAugment (Cubuk et al. 2019); uint8 images of 1 or 3 channels.

    Args:
        policy: as timm writes it, `rand-m9-mstd0.5-inc1`.
        mean: per channel, of pixels in 0..1: the colour of what moves in from outside.

    Raises:
        ValueError: a policy that timm does not know.
    """

    policy: str = "rand-m9-mstd0.5-inc1"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.mean) not in (1, 3):
            raise ValueError(f"RandAugment takes 1 or 3 channels, not {len(self.mean)}")
        try:
            _ = self._transform
        except (AssertionError, ValueError) as error:
            raise ValueError(f"RandAugment policy {self.policy!r}: {error}".rstrip(": ")) from error

    @cached_property
    def _transform(self) -> Any:
        colour = tuple(min(255, round(255 * value)) for value in self.mean)
        settings = {
            "translate_const": int(TRANSLATE * min(self.height, self.width)),
            "img_mean": colour if len(colour) == 3 else colour[0],
            "interpolation": Image.Resampling.BICUBIC,
        }
        transform: Any = rand_augment_transform(self.policy, settings)
        for operation in transform.ops:
            if operation.name.startswith("Posterize"):
                operation.level_fn = partial(_at_least_one_bit, operation.level_fn)
        return transform

    def __call__(
        self, image: Real[Tensor, "c h w"], u: Float[Tensor, "u"]
    ) -> Real[Tensor, "c h2 w2"]:
        """The augmented image; the numbers of the crop, which follow from the position alone, seed
        RandAugment too.

        Raises:
            ValueError: float pixels, which PIL's operations do not know.
        """
        cropped = super().__call__(image, u)
        if cropped.dtype != torch.uint8:
            raise ValueError(f"RandAugment takes uint8 images, not {cropped.dtype}")
        seed_global(zlib.crc32(u.numpy().tobytes()))
        pixels = cropped.permute(1, 2, 0).numpy()
        changed = self._transform(Image.fromarray(pixels if len(cropped) == 3 else pixels[..., 0]))
        array = np.array(changed).reshape(pixels.shape)
        return torch.from_numpy(array).permute(2, 0, 1).contiguous()


class Augmentation:
    """RandAugment of each image; random erasing and mixing of each micro-batch.

    Args:
        randaugment: timm's policy (`rand-m9-mstd0.5-inc1`); null for none.
        erasing: probability that a rectangle of an image becomes noise (Zhong et al. 2017).
        mixup: alpha of mixup's Beta distribution (Zhang et al. 2017); 0 for none.
        cutmix: alpha of cutmix's Beta distribution (Yun et al. 2019); 0 for none. With both, each
            micro-batch gets one of them with equal probability.

    Raises:
        ValueError: a negative alpha, a probability outside 0 to 1.
    """

    def __init__(
        self,
        randaugment: str | None = None,
        erasing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
    ) -> None:
        if not 0 <= erasing <= 1:
            raise ValueError(f"erasing {erasing} must be a probability, 0 to 1")
        if min(mixup, cutmix) < 0:
            raise ValueError(f"mixup {mixup} and cutmix {cutmix} must not be negative")
        self.randaugment, self.erasing, self.mixup, self.cutmix = (
            *(randaugment, erasing),
            *(mixup, cutmix),
        )

    @property
    def mixes(self) -> bool:
        """True where labels become soft."""
        return max(self.mixup, self.cutmix) > 0

    def apply(self, data: ShardData) -> None:
        """Put RandAugment behind the crop of the training images.

        Raises:
            ValueError: 1-D signals, channels that PIL's operations do not know.
        """
        if self.randaugment is None:
            return
        if not isinstance(data.augment, Augment):
            raise ValueError("augment.randaugment takes images, not 1-D signals")
        crop = {field.name: getattr(data.augment, field.name) for field in fields(data.augment)}
        data.augment = RandAugmented(**crop, policy=self.randaugment, mean=data.mean)

    def change(
        self,
        images: Float[Tensor, "b c *size"],
        labels: Int64[Tensor, "b"],
        classes: int,
        smoothing: float,
        seed: int,
    ) -> tuple[Float[Tensor, "b c *size"], Float[Tensor, "b k"] | Int64[Tensor, "b"]]:
        """Erase and mix a normalised micro-batch in place, as the seed says (and torch's global
        generator, for the noise).

        Returns:
            The images, and soft targets where they were mixed, else the labels.

        Raises:
            ValueError: an odd number of images to mix: each is mixed with another one.
        """
        seed_global(seed)
        if self.erasing:
            images = RandomErasing(self.erasing, mode="pixel", device=str(images.device))(images)
        if not self.mixes:
            return images, labels
        if len(images) % 2:
            raise ValueError(f"mixup and cutmix need an even micro-batch, not {len(images)} images")
        mix = Mixup(self.mixup, self.cutmix, label_smoothing=smoothing, num_classes=classes)
        images, targets = mix(images, labels)
        return images, targets

    def describe(self) -> str:
        """Describe in one line."""
        settings = {
            "RandAugment": self.randaugment,
            "erasing": self.erasing,
            "mixup": self.mixup,
            "cutmix": self.cutmix,
        }
        return ", ".join(f"{name} {value}" for name, value in settings.items() if value) or "none"
