"""Latent shards and batches: exact bytes, keyed draws that no restart or batch size changes."""

import dataclasses

import numpy as np
import pytest
import torch

from model_core.data.latents import LatentShard, read_latents, shard_name, write_latents
from model_core.data.loader import Draws, LatentRows, Loader, tokens
from model_core.data.plan import make_plan
from model_core.recipe import UserError

DRAWS = Draws((0.0, 1.0), 0.1, {"general": 0.5, "text": 0.5, "knowledge": 0.0, "structured": 0.0})


def shard(num: int, *, references: int = 0, kind: str = "image", shape=(2, 3), salt: int = 0) -> LatentShard:
    generator = np.random.default_rng(salt)
    return LatentShard(
        sample_ids=[bytes([salt, index]) + bytes(14) for index in range(num)],
        kinds=[kind] * num,
        held_out=[index % 4 == 3 for index in range(num)],
        latents=generator.standard_normal((num, 4, *shape), dtype=np.float32),
        references=generator.standard_normal((num, references, 4, *shape), dtype=np.float32),
        prompts={
            "instruction": ["change it" if kind == "edit" else ""] * num,
            **{name: [f"{name} {i}" for i in range(num)] for name in DRAWS.caption_weights},
        },
    )


def loader(shards, *, batch_size=6, kinds=("image", "edit"), draws=DRAWS) -> Loader:
    rows = LatentRows(shards, kinds)
    plan = make_plan(seed=3, stage="S2", sizes=rows.sizes, shares={"image": 0.5, "edit": 0.5}, batch_size=batch_size)
    return Loader(rows, plan, draws)


def test_a_shard_reads_back_as_it_was_written_and_equal_shards_are_equal_bytes(tmp_path):
    written = shard(5, references=2, kind="edit")
    for name in ("a", "b"):
        write_latents(tmp_path / name / shard_name(written.shape, 2), written, vae_digest="v")
    first, second = (tmp_path / name / "latents/2x3-r2.parquet" for name in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()
    read = read_latents(first, vae_digest="v")
    assert np.array_equal(read.latents, written.latents)
    assert np.array_equal(read.references, written.references)
    assert (read.sample_ids, read.kinds, read.held_out, read.prompts) == (
        written.sample_ids,
        written.kinds,
        written.held_out,
        written.prompts,
    )


def test_a_shard_without_references_reads_back(tmp_path):
    write_latents(tmp_path / "x.parquet", shard(3), vae_digest="v")
    assert read_latents(tmp_path / "x.parquet").references.shape == (3, 0, 4, 2, 3)


def test_a_shard_made_with_another_vae_is_refused(tmp_path):
    write_latents(tmp_path / "x.parquet", shard(3), vae_digest="one")
    with pytest.raises(UserError, match="made with VAE one"):
        read_latents(tmp_path / "x.parquet", vae_digest="another")


def test_tokens_are_the_places_of_a_latent_row_by_row():
    latents = np.arange(2 * 4 * 2 * 3, dtype=np.float32).reshape(2, 4, 2, 3)
    assert torch.equal(tokens(latents)[1, 4], torch.from_numpy(latents[1, :, 1, 1]))


@pytest.mark.filterwarnings("error")
def test_tokens_of_a_read_only_latent_are_a_copy():
    latents = np.zeros((1, 4, 2, 3), dtype=np.float32)
    latents.flags.writeable = False
    tokens(latents).fill_(1.0)
    assert not latents.any()


def test_a_batch_holds_its_samples_split_by_shape_and_never_a_held_out_one():
    shards = [shard(8), shard(8, shape=(3, 2), salt=1), shard(8, references=1, kind="edit", salt=2)]
    for number in range(6):
        batch = loader(shards).batch(number)
        assert sum(len(micro) for micro in batch) == 6
        for micro in batch:
            found = next(s for s in shards if s.shape == micro.shape and s.references.shape[1] == len(micro.references))
            allowed = torch.stack([tokens(found.latents[[row]])[0] for row in range(8) if not found.held_out[row]])
            assert all(any(torch.equal(latent, other) for other in allowed) for latent in micro.latents)


def test_draws_do_not_depend_on_the_batch_size_or_on_what_came_before():
    shards = [shard(8), shard(8, references=1, kind="edit", salt=2)]

    def draws(batch_size: int, numbers) -> list:
        found = []
        for number in numbers:
            for micro in loader(shards, batch_size=batch_size).batch(number):
                found += [
                    (t.item(), prompt, noise.sum().item()) for t, prompt, noise in zip(micro.t, micro.prompts, micro.noise, strict=True)
                ]
        return sorted(found)

    assert draws(4, range(6)) == draws(12, range(2))
    assert draws(4, [5]) == draws(4, [5])


def test_prompts_are_dropped_captioned_and_instructed_in_their_shares():
    shards = [shard(40), shard(40, references=1, kind="edit", salt=2)]
    prompts = [prompt for number in range(100) for micro in loader(shards, batch_size=20).batch(number) for prompt in micro.prompts]
    share = {word: sum(prompt.startswith(word) for prompt in prompts) / len(prompts) for word in ("general", "text", "knowledge", "change")}
    assert share["knowledge"] == 0
    assert share["change"] == pytest.approx(0.45, abs=0.03)
    assert share["general"] == pytest.approx(0.225, abs=0.03)
    assert sum(prompt == "" for prompt in prompts) / len(prompts) == pytest.approx(0.1, abs=0.03)


def test_prompts_do_not_depend_on_the_order_in_which_the_recipe_lists_its_caption_types():
    backwards = dataclasses.replace(DRAWS, caption_weights=dict(reversed(DRAWS.caption_weights.items())))
    drawn = [[micro.prompts for number in range(20) for micro in loader([shard(40)], draws=it).batch(number)] for it in (DRAWS, backwards)]
    assert drawn[0] == drawn[1]


def test_times_follow_the_logit_normal_distribution():
    times = torch.cat([micro.t for number in range(100) for micro in loader([shard(40)], batch_size=20, kinds=("image",)).batch(number)])
    assert times.quantile(0.5).item() == pytest.approx(0.5, abs=0.03)
    assert times.quantile(0.25).item() == pytest.approx(0.3375, abs=0.03)
