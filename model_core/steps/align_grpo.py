"""align_grpo: reinforcement learning of the last stage's model from rewards (R1 4.2, R4).

Takes the model, the autoencoder, the encoder, the data whose prompts are drawn, and the reward models; leaves the average weights in
`mmdit/`, `alignment.json` (every update, every change of weights and mix, what was compared), `prompts.jsonl`, a line a group and
update, and pictures of the same prompts and seeds before and after. An update is rolled out, scored and learned from in one piece:
one that a kill has cut short is drawn again, bit for bit, from the newest checkpoint.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from model_core.context import StepContext
from model_core.data.contact_sheet import contact_sheet
from model_core.data.prompts import PolicyPrompt, prompts_of_update, read_prompts
from model_core.data.synthetic import scene_annotated
from model_core.documents import UserError
from model_core.evaluation.before_after import Drawn, FixedPrompt, compare, draw_fixed, fixed_prompts
from model_core.evaluation.drawing import Painter
from model_core.evaluation.judge import Judge
from model_core.models.condition import load_encoder
from model_core.models.mmdit import MMDiT, load_mmdit, save_mmdit
from model_core.models.reward import load_scorer
from model_core.models.vae import load_vae
from model_core.recipe import DIMENSIONS
from model_core.rewards.opening import local_scorers, open_scorer
from model_core.rewards.overlap import OverlappedScoring
from model_core.rewards.tally import agreement, make_tally
from model_core.rewards.verdict import Score, Scorer
from model_core.training.alarms import AlarmBell, picture_statistics
from model_core.training.distributed import compute_device, frozen_dtype, keep_deterministic
from model_core.training.ema import update_ema
from model_core.training.guard import TrainingDiverged
from model_core.training.policy import Learner, OldPolicy
from model_core.training.policy_merging import kind_of, merging_backward
from model_core.training.policy_state import PolicyState
from model_core.training.rollouts import Artist, Chunk, draw_chunks
from model_core.training.stopping import Stopped, noting_sigterm

NUM_SHOWN = 12  # pairs of the grid before and after
