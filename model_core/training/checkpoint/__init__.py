"""Checkpoints of a training step: written beside the result in the background, committed last, verified before they are read.

docs/reference/checkpoints.md tells the layout, the protocol and what it promises.
"""

from model_core.training.checkpoint.store import CheckpointStore, Restored, Stateful

__all__ = ["CheckpointStore", "Restored", "Stateful"]
