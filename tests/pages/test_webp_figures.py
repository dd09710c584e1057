"""The figures' WebP has the pixels of the PNG, as a file and inside HTML."""

import base64
import io

import numpy as np
import pytest
from PIL import Image
from webp_figures import EMBEDDED, as_webp, embedded_as_webp


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_a_picture_loses_nothing(mode):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, len(mode)), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    picture = as_webp(file)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(picture))), pixels)
    html = '<img alt="a" src="data:image/{};base64,{}" style="x">'
    png, webp = (base64.b64encode(data).decode() for data in (file.getvalue(), picture))
    assert EMBEDDED.sub(embedded_as_webp, html.format("png", png)) == html.format("webp", webp)
