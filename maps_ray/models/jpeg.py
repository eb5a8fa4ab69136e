"""JPEG as the published pipelines decode it.

TensorFlow's default is libjpeg-turbo's fast inverse transform (Arai, Agui and Nakajima) with smooth upsampling of
chroma. Pillow only offers the accurate one, which is up to 15 grey levels away.
"""

from __future__ import annotations

import io

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

QUALITY = 95

Bytes = NDArray[np.uint8]


def decode_jpeg(data: bytes) -> Bytes:
    """RGB (H, W, 3), bit by bit as `tf.io.decode_image`.

    Raises:
        ValueError: no JPEG, or a broken one.
    """
    decoded: Bytes = simplejpeg.decode_jpeg(data, colorspace="RGB", fastdct=True, fastupsample=False)
    return decoded


def through_jpeg(image: Bytes) -> Bytes:
    """Encodes and decodes (H, W, 3) RGB as `tf.io.decode_image(tf.image.encode_jpeg(image))` does."""
    # TensorFlow encodes with the accurate transform, as Pillow does and simplejpeg does not: only its decoder is fast.
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=QUALITY, subsampling="4:2:0")
    return decode_jpeg(buffer.getvalue())
