"""From encoded bytes to square uint8 images, with an error that says which image could not be read."""

import io

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..runtime import UserError

UNREADABLE = (OSError, ValueError, Image.DecompressionBombError)  # what Pillow raises for a broken or absurd image


def square(image: Image.Image, size: int) -> np.ndarray:
    """RGB uint8 [size, size, 3]: the short side resized to `size`, the center cut out."""
    if image.mode.startswith(("I", "F")):  # Pillow would clip 16 bits to white
        raise ValueError(f"mode {image.mode}, not 8 bits a channel")
    image = image.convert("RGB")
    if min(image.size) != size:
        scale = size / min(image.size)
        image = image.resize([max(size, round(s * scale)) for s in image.size], Image.Resampling.BILINEAR)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


def decode(data: bytes, size: int, where: str) -> np.ndarray:
    """`square` of an encoded image; UserError with `where` if it cannot be read."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return square(image, size)
    except UNREADABLE as error:
        raise unreadable(error, f"{len(data or b'')} bytes at {where}") from None


def unreadable(error: Exception, what: str) -> UserError:
    """The one line for an image that cannot be decoded; `what` names it."""
    reason = "no known format" if isinstance(error, UnidentifiedImageError) else error
    return UserError(f"expected a readable image, got {what} ({reason}); remove or replace it")
