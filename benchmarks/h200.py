"""Training steps of the published 7.1 B transformer on one GPU: step time, tokens a second, MFU, wait for data, peak memory.

    python -m benchmarks.h200 [--profile FOLDER] [--recompute none|selective|full] [--only NAME] [--tiny]

Prints one JSON line a measurement, each from a process of its own, so that one that runs out of memory takes no other along: it is
told in a line, and tried again with more computed again. Weights are random, text states too, in captions of log-normal length;
latents come through the real loader from shards in a temporary folder. `--tiny` runs the same code on small sizes, on a CPU too.
Needs torch, transformers, pydantic, pyarrow and safetensors.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from benchmarks.machine import machine
from model_core.data.folders import LocalFolder
from model_core.data.index import read_index
from model_core.data.latents import PROMPTS, TRAIN, Bucket, LatentRow, LatentWriter, Origin, latent_group, latent_rows
from model_core.data.loader import Draws, Loader
from model_core.data.plan import make_plan
from model_core.data.row_groups import RowGroups
from model_core.models.condition import ConditionEncoder, TextStates
from model_core.models.mmdit import MMDiT
from model_core.recipe import CompressionRatio, MMDiTModel
from model_core.training.activation_checkpointing import checkpoint_activations
from model_core.training.distributed import compute_device
from model_core.training.float8 import check_float8, use_float8
from model_core.training.memory import FIXED_WORKSPACE_BYTES, FP32, FRAGMENTED_SHARE, activation_peak
from model_core.training.meter import peak_flops_of_this_gpu
from model_core.training.optim import Optimizer
from model_core.training.parallel import Layout, compile_blocks
from model_core.training.parameters import mmdit_parameters
from model_core.training.passes import Passes
from model_core.training.throughput import Checkpointing, flops_utilisation, training_flops

POLICIES: tuple[Checkpointing, ...] = ("none", "selective", "full")
WARM_UP_STEPS, STEPS = 3, 12
MINUTES = 9.0  # for all measurements
LEAST_SECONDS = 45.0  # with less left, none is begun
WORKERS = 4
OUT_OF_MEMORY = "out of memory"
STATE_BYTES = 4 * FP32  # a parameter: weight, gradient, two moments; an EMA would be another 4, and too much for 7.1 B on one H200


@dataclass(frozen=True)
class Sizes:
    """The model, and captions of log-normal length with this mean."""

    model: MMDiTModel
    latent_channels: int
    text_dim: int
    caption_tokens: float


@dataclass(frozen=True)
class Case:
    """One measurement: `batch_size` samples an optimizer step, in passes of at most `token_budget` tokens; 1: each sample alone."""

    name: str
    resolution_px: int
    precision: str
    batch_size: int
    token_budget: int


FULL = Sizes(MMDiTModel(), latent_channels=64, text_dim=4096, caption_tokens=231.0)
# Budgets leave room for selective recompute beside the state. A step is 0.7 to 0.9 PFLOP, about two seconds.
CASES = (
    Case("bf16-1024px", 1024, "bf16", batch_size=4, token_budget=1),
    Case("bf16-512px-packed", 512, "bf16", batch_size=16, token_budget=5500),
    Case("bf16-256px-packed", 256, "bf16", batch_size=40, token_budget=5500),
    Case("float8-1024px", 1024, "float8", batch_size=4, token_budget=1),
    Case("float8-512px-packed", 512, "float8", batch_size=16, token_budget=5500),
)
TINY = Sizes(MMDiTModel(num_layers=2, num_heads=2, head_dim=16, rope_axes=(4, 6, 6)), latent_channels=8, text_dim=32, caption_tokens=9.0)
TINY_CASES = (
    Case("tiny-bf16-64px", 64, "bf16", batch_size=2, token_budget=1),
    Case("tiny-bf16-32px-packed", 32, "bf16", batch_size=8, token_budget=60),
    Case("tiny-float8-32px-packed", 32, "float8", batch_size=8, token_budget=60),
)


class RandomStates:
    """Stands in for the condition encoder: a prompt is the number of its tokens, and their states are random."""

    def __init__(self, text_dim: int, *, longest: int, device: torch.device) -> None:
        self._states = torch.randn(longest, text_dim, device=device)

    def encode_packed(self, prompts: Sequence[str]) -> TextStates:
        """(T, text_dim) of all prompts."""
        lengths = [int(prompt) for prompt in prompts]
        return TextStates(torch.cat([self._states[:length] for length in lengths]), [[length] for length in lengths])


def caption_lengths(num: int, mean: float) -> np.ndarray:
    """(num,) token counts, log-normal with this mean and a sigma of 0.6 of the logarithm, from 8 to 1024."""
    drawn = np.random.default_rng(0).lognormal(math.log(mean) - 0.6**2 / 2, 0.6, num)
    return np.clip(drawn.round(), 8, 1024).astype(int)


def write_latents(folder: Path, case: Case, sizes: Sizes, *, num: int) -> None:
    """A data set of `num` square latents whose captions are the numbers of their tokens."""
    side = case.resolution_px // CompressionRatio
    writer = LatentWriter(folder, origin=Origin("v" * 64, "e" * 64), channels=sizes.latent_channels)
    for number, length in enumerate(caption_lengths(num, sizes.caption_tokens).tolist()):
        writer.add(
            Bucket(TRAIN, "image", side, side, 0),
            LatentRow(
                sample_id=number.to_bytes(16, "big"),
                latent=torch.randn(sizes.latent_channels, side, side),
                references=[],
                prompts=dict.fromkeys(PROMPTS, str(length)),
                prompt_tokens=dict.fromkeys(PROMPTS, length),
            ),
        )
    writer.close()


def open_loader(folder: Path, case: Case, sizes: Sizes) -> Loader:
    """The trainer's loader over that data set."""
    index = read_index(LocalFolder(folder))
    groups = RowGroups(LocalFolder(folder), index, latent_group, capacity=16, say=print)
    plan = make_plan(
        digest=index.digest,
        seed=0,
        stage="S1",
        rows=latent_rows(index, kinds=["image"]),
        shares={"image": 1.0},
        batch_size=case.batch_size,
        window=4,
    )
    return Loader(groups, plan, Draws((0.0, 1.0), 0.0, {"general": 1.0}), sizes.model, case.token_budget, workers=WORKERS)


@dataclass(frozen=True)
class How:
    """How cases are measured. `backend` is torch.compile's; `profile`: a folder for tables of kernels."""

    recompute: Checkpointing = "none"
    warm_up: int = WARM_UP_STEPS
    steps: int = STEPS
    backend: str = "inductor"
    profile: Path | None = None


def measure(case: Case, sizes: Sizes, how: How) -> dict[str, Any]:
    """Trains `how.steps` steps after a warm-up; returns what the JSON line holds."""
    warm_up, steps = how.warm_up, how.steps
    device = compute_device()
    torch.manual_seed(0)
    with torch.device(device):  # 7.1 B initial weights are drawn in no time there
        model = MMDiT(sizes.model, latent_channels=sizes.latent_channels, text_dim=sizes.text_dim)
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
    with tempfile.TemporaryDirectory(prefix="darkroom-h200-") as folder:
        extra = 2 if how.profile else 0
        write_latents(Path(folder), case, sizes, num=case.batch_size * (warm_up + steps + extra))
        loader = open_loader(Path(folder), case, sizes)
        if case.precision == "float8":
            if device.type == "cuda":
                check_float8(model, device)
            use_float8(model)
        checkpoint_activations(model, how.recompute)
        compile_blocks(model, backend=how.backend)
        optimizer = Optimizer(model, lr=1e-4, warmup_steps=10, betas=(0.9, 0.95), weight_decay=0.001, grad_clip=1.0)
        encoder = cast(ConditionEncoder, RandomStates(sizes.text_dim, longest=1024, device=device))
        passes = Passes(encoder, Layout(), bfloat16=True)
        batches = loader.stream(0, warm_up + steps + extra)

        def step(number: int) -> tuple[float, int, float, float]:
            """Seconds, tokens, FLOPs and loss of one step, from asking for its batch until the GPU is done."""
            began = time.perf_counter()
            done = passes.backward(model, next(batches))
            optimizer.clip()
            optimizer.step(number)
            loss = done.loss.item()
            if device.type == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - began, done.num_tokens, done.flops, loss

        warm = [step(number) for number in range(warm_up)]
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        waited = loader.waited_seconds
        taken = [step(number) for number in range(warm_up, warm_up + steps)]
        waited = loader.waited_seconds - waited
        if how.profile is not None:
            write_profile(how.profile / f"{case.name}.txt", lambda: [step(warm_up + steps + number) for number in range(extra)], device)
        batches.close()
    seconds, total = sorted(each[0] for each in taken), sum(each[0] for each in taken)
    flops = sum(each[2] for each in taken)
    peak = peak_flops_of_this_gpu()
    result = asdict(case) | {
        "device": device.type,
        "parameters": num_parameters,
        "state": "weights, gradients and AdamW's moments in fp32, no EMA",
        "state_bytes": STATE_BYTES * num_parameters,
        "recompute": how.recompute,
        "steps": steps,
        "warm_up_seconds": round(sum(each[0] for each in warm), 2),
        "step_seconds": round(statistics.median(seconds), 4),
        "p95_over_median": round(seconds[math.ceil(0.95 * steps) - 1] / statistics.median(seconds), 3),
        "tokens_per_second": round(sum(each[1] for each in taken) / total, 1),
        "samples_per_second": round(case.batch_size * steps / total, 3),
        "teraflops": round(flops / total / 1e12, 4),
        "data_wait_share": round(waited / total, 5),
        "loss": [round(warm[0][3], 4), round(taken[-1][3], 4)],
    }
    if peak is not None:
        repeated = training_flops(1, checkpointing=how.recompute) / training_flops(1)
        mfu = flops_utilisation(flops, seconds=total, peak_flops=peak)
        # Of the dense bf16 peak, FP8's too. In compiled blocks selective recompute repeats products as full does, so its HFU is a bound.
        result |= {"mfu": round(mfu, 4), "hfu": round(mfu * repeated, 4)}
    if device.type == "cuda":
        result["peak_bytes"] = torch.cuda.max_memory_allocated()
    return result


def write_profile(path: Path, work: Any, device: torch.device) -> None:
    """A table of the operations that take the most time of their own, over what `work` does."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiler:
        work()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(profiler.key_averages().table(sort_by=f"self_{'device' if on_gpu else 'cpu'}_time_total", row_limit=40) + "\n")


def policies_that_fit(case: Case, sizes: Sizes, *, memory_bytes: int) -> tuple[Checkpointing, ...]:
    """What to try, in order: from the policy that computes the least again of those that fit, by `training.memory`, to `full`."""
    num = sum(mmdit_parameters(sizes.model, latent_channels=sizes.latent_channels, text_dim=sizes.text_dim).values())
    room = memory_bytes * (1 - FRAGMENTED_SHARE) - FIXED_WORKSPACE_BYTES - STATE_BYTES * num
    longest = max(case.token_budget, (case.resolution_px // CompressionRatio) ** 2 + round(2 * sizes.caption_tokens))
    fits = [activation_peak(sizes.model, policy) * longest <= room for policy in POLICIES]
    return POLICIES[fits.index(True) if any(fits) else -1 :]


def run_apart(case: Case, arguments: Sequence[str], *, seconds: float) -> dict[str, Any]:
    """The case's JSON line from a process of its own, or one that says why there is none."""
    command = [sys.executable, "-m", "benchmarks.h200", "--case", case.name, *arguments]
    # Segments that grow leave no gaps between activations of unequal streams.
    environment = os.environ | {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False, env=environment)
    except subprocess.TimeoutExpired:
        return {"name": case.name, "failed": f"not done after {seconds:.0f} s"}
    if done.returncode == 0:
        return cast(dict[str, Any], json.loads(done.stdout.strip().splitlines()[-1]))
    lines = done.stderr.strip().splitlines()
    telling = [line for line in lines if OUT_OF_MEMORY in line] or [line for line in lines if "Error" in line] or lines
    return {"name": case.name, "failed": telling[-1][:300] if telling else f"exit code {done.returncode}"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures every case, or the one that is named."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.h200", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="small sizes, which a CPU does in seconds; its figures say nothing of a GPU")
    parser.add_argument("--only", metavar="TEXT", default="", help="cases whose name holds this")
    parser.add_argument("--recompute", choices=POLICIES, help="of activations; without it what fits by the formulas, then more")
    parser.add_argument("--profile", type=Path, metavar="FOLDER", help="write a table of the top kernels of each case")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all of it")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    sizes, cases = (TINY, TINY_CASES) if options.tiny else (FULL, CASES)
    if options.case is not None:
        case = next(case for case in cases if case.name == options.case)
        chosen = How(options.recompute or "none", profile=options.profile)
        how = replace(chosen, warm_up=1, steps=3, backend="eager") if options.tiny else chosen
        print(json.dumps(measure(case, sizes, how)))
        return
    ends = time.monotonic() + 60 * options.minutes
    if not options.tiny and not torch.cuda.is_available():
        sys.exit("benchmarks.h200: found no GPU; --tiny runs the same code on a CPU")
    gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    told = {"gpu": gpu.name, "gpu_bytes": gpu.total_memory} if gpu else {"gpu": None}
    print(json.dumps({"machine": machine() | told}), flush=True)
    shared = ["--tiny"] * options.tiny + (["--profile", str(options.profile)] if options.profile else [])
    for case in (case for case in cases if options.only in case.name):
        fitting = policies_that_fit(case, sizes, memory_bytes=gpu.total_memory if gpu else 2**34)
        for policy in (options.recompute,) if options.recompute else fitting:
            left = ends - time.monotonic()
            if left < LEAST_SECONDS:
                print(json.dumps({"name": case.name, "failed": "left out: no time"}), flush=True)
                break
            result = run_apart(case, ["--recompute", policy, *shared], seconds=left)
            print(json.dumps({"recompute": policy} | result), flush=True)
            if OUT_OF_MEMORY not in result.get("failed", ""):
                break


if __name__ == "__main__":
    main()
