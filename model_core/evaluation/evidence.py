"""What an evaluation leaves: scores, and behind each of them the prompts, edits and pictures that it is the mean of."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from model_core.data.edits import Edit
from model_core.evaluation.attributes import Prompt


@dataclass
class Evidence:
    """Collected in memory, the pictures at once on disk; the first `num_shown` entries of each kind are for the report."""

    folder: Path
    num_shown: int
    scores: dict[str, float] = field(default_factory=dict)
    prompts: list[dict[str, Any]] = field(default_factory=list)
    edits: list[dict[str, Any]] = field(default_factory=list)
    reconstructions: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def add_prompt(
        self,
        group: str,
        prompt: Prompt,
        picture: Image.Image,
        *,
        reading: Mapping[str, Any] | None = None,
        original: Image.Image | None = None,
    ) -> dict[str, bool]:
        """Keeps a drawn prompt, what was read in it and, for a caption, the photograph it is of; returns what is right."""
        seen = dict(reading or {})
        right = {name: seen[name] == value for name, value in prompt.asked.items()}
        index = sum(entry["group"] == group for entry in self.prompts)
        pictures = {"image": picture} | ({"original": original} if original else {})
        entry = {"group": group, "text": prompt.text, "seed": prompt.seed, "asked": prompt.asked, "reading": seen, "right": right}
        self.prompts.append(entry | self._save(f"samples/{group}-{index:03d}", pictures) | {"shown": index < self.num_shown})
        return right

    def add_edit(self, edit: Edit, result: Image.Image, found: Mapping[str, Any]) -> None:
        """Keeps an edit's sources, result and target beside what was `found` of it."""
        index = len(self.edits)
        pictures = {"result": result, "target": edit.target} | {f"source{slot}": image for slot, image in enumerate(edit.references)}
        names = self._save(f"edits/{index:03d}", pictures)
        sources = [names.pop(f"source{slot}") for slot in range(len(edit.references))]
        entry = {"operation": edit.notes["operation"], "instruction": edit.instruction, "change": edit.notes["change"], "sources": sources}
        self.edits.append(entry | names | dict(found) | {"shown": index < self.num_shown})

    def add_reconstruction(self, original: Image.Image, decoded: Image.Image, found: Mapping[str, float]) -> None:
        """Keeps the scores of a picture that went through the autoencoder; the pictures themselves of those that are shown."""
        index = len(self.reconstructions)
        shown = index < self.num_shown
        names = self._save(f"reconstructions/{index:03d}", {"original": original, "decoded": decoded}) if shown else {}
        self.reconstructions.append(dict(found) | names | {"shown": shown})

    def write(self) -> dict[str, float]:
        """Writes `scores.json` and the documents behind it; returns the scores as written."""
        scores = {name: round(value, 5) for name, value in self.scores.items()}
        documents = {"scores": scores} | {name: getattr(self, name) for name in ("prompts", "edits", "reconstructions", "warnings")}
        for name, document in documents.items():
            (self.folder / f"{name}.json").write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return scores

    def _save(self, stem: str, pictures: Mapping[str, Image.Image]) -> dict[str, str]:
        """Writes `STEM-NAME.png` for each picture; returns the paths by name."""
        (self.folder / stem).parent.mkdir(parents=True, exist_ok=True)
        for name, picture in pictures.items():
            picture.save(self.folder / f"{stem}-{name}.png")
        return {name: f"{stem}-{name}.png" for name in pictures}


def mean(values: Iterable[float]) -> float:
    """The arithmetic mean as a plain number."""
    return float(np.mean(list(values)))
