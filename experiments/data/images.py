"""Random changes of training images that keep their class."""

import dataclasses

import numpy as np
from jaxtyping import UInt8


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Augment:
    """Shifts an image at random and, with `has_flip`, mirrors it half of the time."""

    max_shift: int = 2  # Pixels, in both directions. Zeros fill the gap.
    has_flip: bool = False  # Left and right. For clothes, not for digits.

    def __post_init__(self):
        if self.max_shift < 0:
            raise ValueError(f"max_shift must not be negative, got {self.max_shift}.")

    def __call__(
        self, image: UInt8[np.ndarray, "H W C"], rng: np.random.Generator
    ) -> UInt8[np.ndarray, "H W C"]:
        """A changed copy of the image."""
        height, width, _ = image.shape
        if self.max_shift >= min(height, width):
            raise ValueError(
                f"max_shift must be less than the image's sides, got {self.max_shift} "
                f"and an image of {height} x {width}: nothing would be left of it."
            )
        down, right = rng.integers(-self.max_shift, self.max_shift, 2, endpoint=True)
        is_mirrored = self.has_flip and rng.integers(2)
        result = np.zeros_like(image)
        result[_kept(down, height), _kept(right, width)] = image[
            _kept(-down, height), _kept(-right, width)
        ]
        return result[:, ::-1] if is_mirrored else result


def _kept(shift, size):
    """The places that pixels of the image reach when it moves by `shift`."""
    return slice(max(shift, 0), size + min(shift, 0))
