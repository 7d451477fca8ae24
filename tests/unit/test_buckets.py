"""Aspect buckets: near the pixel budget, in whole latents, and nearest in shape."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from model_core.data.buckets import bucket, bucket_shapes, fit


@pytest.mark.parametrize("resolution_px", [64, 256, 512, 1024, 2048])
def test_buckets_are_whole_latents_near_the_pixel_budget(resolution_px):
    shapes = bucket_shapes(resolution_px)
    assert (resolution_px, resolution_px) in shapes
    assert len(set(shapes)) == len(shapes)
    for height, width in shapes:
        assert height % 16 == width % 16 == 0
        slack = 0.3 if resolution_px < 256 else 0.1
        assert abs(height * width / resolution_px**2 - 1) <= slack


@pytest.mark.parametrize("resolution_px", [256, 512, 1024, 2048])
def test_buckets_are_whole_image_tokens_where_the_encoder_sees_them(resolution_px):
    shapes = bucket_shapes(resolution_px, multiple_px=32)
    assert (resolution_px, resolution_px) in shapes
    for height, width in shapes:
        assert height % 32 == width % 32 == 0
        assert abs(height * width / resolution_px**2 - 1) <= 0.2
        assert bucket(width, height, resolution_px, multiple_px=32) == (height, width)


@given(st.integers(1, 4000), st.integers(1, 4000), st.sampled_from([64, 256, 512]))
def test_a_picture_goes_to_the_bucket_of_the_nearest_ratio(width, height, resolution_px):
    chosen = bucket(width, height, resolution_px)
    off = {shape: abs(math.log(shape[0] / shape[1]) - math.log(height / width)) for shape in bucket_shapes(resolution_px)}
    assert off[chosen] == pytest.approx(min(off.values()))


def test_a_turned_picture_goes_to_the_turned_bucket():
    for resolution_px in (64, 256, 512):
        for width, height in ((4, 3), (16, 9), (3, 2)):
            assert bucket(width, height, resolution_px) == bucket(height, width, resolution_px)[::-1]


@given(st.integers(1, 200), st.integers(1, 200))
def test_fit_gives_the_bucket_s_size_whatever_comes(width, height):
    assert fit(Image.new("RGB", (width, height)), (64, 48)).size == (48, 64)


def test_fit_keeps_the_middle_and_the_proportions():
    pixels = np.zeros((100, 300, 3), dtype=np.uint8)
    pixels[:, 100:200] = 255
    fitted = np.asarray(fit(Image.fromarray(pixels), (64, 64)))
    assert fitted[:, 1:-1].min() > 250


def test_fit_leaves_a_picture_of_that_size_as_it_is():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 48, 3), dtype=np.uint8))
    assert fit(picture, (64, 48)).tobytes() == picture.tobytes()
