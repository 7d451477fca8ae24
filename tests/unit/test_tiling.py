"""Tiles against the picture as a whole: equal where they must be, and a bounded seam where attention sees one tile at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from model_core.models import tiling
from model_core.models.tiling import decode_pictures, decode_tiled, encode_pictures, encode_tiled
from model_core.models.vae import ResidualVAE
from model_core.recipe import VAEModel
from model_core.steps import encode_latents

TINY = {"stem_fold": 8, "encoder_widths": [8, 8], "decoder_widths": [8, 8], "encoder_blocks": 1, "decoder_blocks": 1, "latent_channels": 8}
# Convolutions reach 7 latent places and 4 of 8 px on the way in, 7 and 4 on the way out, and one more for the stride: 152 px.
REACH_PX = 152


def vae_of(**fields: object) -> ResidualVAE:
    """A model in which every layer says something."""
    torch.manual_seed(0)
    vae = ResidualVAE(VAEModel.model_validate(TINY | fields))
    for name, parameter in vae.named_parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        elif not name.endswith("gamma"):
            nn.init.normal_(parameter, std=0.1)
    return vae.eval()


def pictures(*shape: int) -> Tensor:
    smooth = torch.randn(shape[0], shape[1], -(-shape[2] // 8), -(-shape[3] // 8), generator=torch.Generator().manual_seed(1))
    return nn.functional.interpolate(smooth, size=shape[2:], mode="bilinear").tanh()


@torch.inference_mode()
def seams(vae: ResidualVAE, images: Tensor, *, tile_px: int, overlap_px: int) -> tuple[Tensor, Tensor]:
    """Errors of encoding and decoding in tiles, in deviations of what the whole gives."""
    latents = vae.encode(images)
    decoded = vae.decode(latents)
    tiled = encode_tiled(vae, images, tile_px=tile_px, overlap_px=overlap_px)
    tiled_decoded = decode_tiled(vae, latents, tile_px=tile_px, overlap_px=overlap_px)
    assert tiled.shape == latents.shape
    assert tiled_decoded.shape == decoded.shape
    return (tiled - latents).abs() / latents.std(), (tiled_decoded - decoded).abs() / decoded.std()


@pytest.mark.parametrize(("shape", "shortcut"), [((16, 1024), "global"), ((1024, 16), "local")])
def test_tiles_that_overlap_by_four_reaches_give_the_whole_without_attention(shape: tuple[int, int], shortcut: str) -> None:
    vae = vae_of(mid_attention=False, shortcut=shortcut)
    for error in seams(vae, pictures(1, 3, *shape), tile_px=832, overlap_px=4 * REACH_PX):
        assert error.max() <= 1e-5


def test_tiles_that_overlap_by_less_than_the_reach_differ_near_the_cut_alone() -> None:
    encoded, decoded = seams(vae_of(mid_attention=False), pictures(1, 3, 16, 1024), tile_px=544, overlap_px=64)
    assert encoded.max() > 1e-3
    assert decoded.max() > 1e-3
    cut = 512 // 16  # tiles end at 544 and begin at 480; what lies a reach from there is untouched
    assert encoded[..., : cut - 12].max() <= 1e-5
    assert encoded[..., cut + 12 :].max() <= 1e-5


def test_a_picture_no_larger_than_a_tile_is_the_whole_bit_for_bit() -> None:
    for error in seams(vae_of(), pictures(1, 3, 64, 96), tile_px=96, overlap_px=32):
        assert not error.any()


def test_constant_tiles_blend_to_the_constant() -> None:
    vae = vae_of()
    vae.encode = lambda images: images[:, :1, ::16, ::16]  # type: ignore[method-assign]
    ones = torch.ones(1, 3, 208, 160)
    torch.testing.assert_close(encode_tiled(vae, ones, tile_px=64, overlap_px=16), torch.ones(1, 1, 13, 10))
    torch.testing.assert_close(encode_tiled(vae, ones, tile_px=64, overlap_px=0), torch.ones(1, 1, 13, 10))


def test_the_seam_that_attention_leaves_is_bounded() -> None:
    """Measured with random weights, where attention says as much as the convolutions: 0.17 and 0.11 deviations, at most 0.95."""
    for error in seams(vae_of(), pictures(1, 3, 256, 256), tile_px=160, overlap_px=64):
        assert 1e-3 < error.square().mean().sqrt() <= 0.25
        assert error.max() <= 1.5


@pytest.mark.parametrize(("tile", "overlap"), [(100, 16), (96, 24), (96, 96), (96, -16)])
def test_tiles_off_the_grid_are_refused(tile: int, overlap: int) -> None:
    vae = vae_of()
    with pytest.raises(ValueError, match="multiples of 16 px"):
        encode_tiled(vae, pictures(1, 3, 128, 128), tile_px=tile, overlap_px=overlap)
    with pytest.raises(ValueError, match="multiples of 16 px"):
        decode_tiled(vae, torch.zeros(1, 8, 8, 8), tile_px=tile, overlap_px=overlap)


def test_pictures_pass_whole_below_the_large_side_and_in_tiles_from_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("LARGE_PX", 128), ("TILE_PX", 96), ("OVERLAP_PX", 32)):
        monkeypatch.setattr(tiling, name, value)
    vae = vae_of()
    for width, tiled in ((112, False), (128, True)):
        images = pictures(1, 3, 48, width)
        whole = vae.encode(images)
        assert torch.equal(encode_pictures(vae, images), whole) is not tiled
        assert torch.equal(decode_pictures(vae, whole), vae.decode(whole)) is not tiled
    assert torch.equal(encode_pictures(vae, images), encode_tiled(vae, images, tile_px=96, overlap_px=32))
    assert torch.equal(decode_pictures(vae, whole), decode_tiled(vae, whole, tile_px=96, overlap_px=32))


def test_a_model_of_rgba_sees_rgb_as_opaque_and_gives_rgb() -> None:
    vae, images = vae_of(pixel_channels=4), pictures(1, 3, 32, 32)
    latents = encode_pictures(vae, images)
    assert torch.equal(latents, vae.encode(torch.cat((images, torch.ones(1, 1, 32, 32)), dim=1)))
    assert torch.equal(decode_pictures(vae, latents), vae.decode(latents)[:, :3])


def test_latents_are_encoded_in_batches_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode_latents, "BATCH_PIXELS", 2 * 32 * 48)
    vae, encode = vae_of(), ResidualVAE.encode
    sizes = []
    vae.encode = lambda images: sizes.append(len(images)) or encode(vae, images)  # type: ignore[method-assign,func-returns-value]
    images = list(pictures(5, 3, 32, 48))
    latents = encode_latents._encode(vae, images)
    assert sizes == [2, 2, 1]
    whole = vae.standardise(encode(vae, torch.stack(images)))
    torch.testing.assert_close(torch.stack(latents), whole, atol=1e-5, rtol=1e-5)
