"""From encoded bytes to square uint8 images, with an error that says which image could not be read."""

import io

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..runtime import UserError

UNREADABLE = (OSError, ValueError, Image.DecompressionBombError)  # what Pillow raises for a broken or absurd image


def square(image: Image.Image, size: int, zoom: float = 1.0, bicubic: bool = False) -> np.ndarray:
    """RGB uint8 [size, size, 3]: the short side resized to `size` times `zoom`, the center cut out."""
    if image.mode.startswith(("I", "F")):  # Pillow would clip 16 bits to white
        raise ValueError(f"mode {image.mode}, not 8 bits a channel")
    image = image.convert("RGB")
    short = round(size * zoom)
    if min(image.size) != short:
        scale = short / min(image.size)
        resampling = Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR
        image = image.resize([max(short, round(s * scale)) for s in image.size], resampling)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


def decode(
    data: bytes, size: int, where: str, zoom: float = 1.0, bicubic: bool = False, *, own: bool = False
) -> np.ndarray:
    """`square` of an encoded image, `upright` if it is the reader's own; UserError with `where` if it cannot be read."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return square(upright(image) if own else image, size, zoom, bicubic)
    except UNREADABLE as error:
        raise unreadable(error, f"{len(data or b'')} bytes at {where}") from None


def upright(image: Image.Image) -> Image.Image:
    """An image as it was meant to be seen: turned as its EXIF tag says, transparent pixels on white.

    For the reader's own images; published sets are read as their papers read them.
    """
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data and image.mode in ("LA", "La", "L", "P", "PA", "RGB", "RGBA", "RGBa"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image


def unreadable(error: Exception, what: str) -> UserError:
    """The one line for an image that cannot be decoded; `what` names it."""
    reason = "no known format" if isinstance(error, UnidentifiedImageError) else error
    return UserError(f"expected a readable image, got {what} ({reason}); remove or replace it")
