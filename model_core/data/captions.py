"""Four captions of a picture from what is known of it (R1 2.2): general, text, knowledge, structured.

| caption | what it says | empty when |
|---|---|---|
| general | all that is seen, in the words of the source | never |
| text | the visible text, word for word in quotes, and where it stands | no text is known |
| knowledge | the general one with its context: where the picture comes from, or what was done to it | never |
| structured | entities, attributes and relations as JSON | never |
For an edit they describe the target; its instruction stays in the raw row.
"""

from __future__ import annotations

import json
import re
import unicodedata
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from model_core.data.shards import RawRow
from model_core.data.synthetic import Scene, article, scene_in

SOURCE_MODEL = "annotations"
QUOTED = re.compile(r'["“]([^"“”]+)["”]')
SCRIPTS = (("HIRAGANA", "ja"), ("KATAKANA", "ja"), ("HANGUL", "ko"), ("CJK", "zh"), ("CYRILLIC", "ru"), ("ARABIC", "ar"), ("LATIN", "en"))


@dataclass(frozen=True, kw_only=True)
class Captions:
    """The four captions and the language of the general one."""

    general: str
    text: str
    knowledge: str
    structured: str
    language: str


def captions_of(row: RawRow, *, max_words: int) -> Captions:
    """The captions of a row; the general one is cut after `max_words` words."""
    notes = row.notes()
    general = " ".join(row.caption.split()[:max_words])
    scene, style = scene_in(notes), _style(notes)
    if scene is not None:
        text, facts = _scene_text(scene, style), _scene_facts(scene, style)
    elif row.kind == "text_image":
        text, facts = _quoted(notes["text"]), _text_facts(notes)
    else:
        quotes = QUOTED.findall(general)
        text, facts = _quoted(quotes), {"description": general, "text": quotes}
    return Captions(
        general=general, text=text, knowledge=_knowledge(row, notes, general), structured=_json(facts), language=language_of(general)
    )


def check_captions(captions: Captions) -> None:
    """Raises ValueError when captions break their schema: a general one, no control signs, structured a JSON object."""
    if not captions.general or not captions.knowledge:
        raise ValueError("the general or the knowledge caption is empty")
    for name in ("general", "text", "knowledge", "structured"):
        if any(unicodedata.category(sign) == "Cc" for sign in getattr(captions, name)):
            raise ValueError(f"the {name} caption has control signs: {getattr(captions, name)!r}")
    if not isinstance(json.loads(captions.structured), dict):
        raise ValueError(f"the structured caption is no JSON object: {captions.structured!r}")


def language_of(text: str) -> str:
    """A language by the script of most letters, Latin counting as English; kana make Japanese; `und` without letters."""
    counts: dict[str, int] = {}
    for sign in text:
        name = unicodedata.name(sign, "") if sign.isalpha() else ""
        for script, language in SCRIPTS:
            if name.startswith(script):
                counts[language] = counts.get(language, 0) + 1
    if counts.get("ja") and counts.get("zh"):
        counts["ja"] += counts.pop("zh")
    return max(sorted(counts), key=lambda language: counts[language], default="und")


def _style(notes: dict[str, Any]) -> str:
    change = notes.get("change", {})
    return str(change["to"]) if change.get("attribute") == "style" else ""


def _scene_text(scene: Scene, style: str) -> str:
    if not scene.text:
        return ""
    shape = f"a {scene.shape}" if style else f"{article(scene.color)} {scene.color} {scene.shape}"
    return f'the text "{scene.text}" beside {shape} on the {scene.position}'


def _scene_facts(scene: Scene, style: str) -> dict[str, Any]:
    """Entities with their attributes; a black and white or sepia picture shows no colours."""
    if style:
        return {"objects": [{"shape": scene.shape, "position": scene.position}], "text": scene.text, "style": style}
    entity = {"color": scene.color, "shape": scene.shape, "position": scene.position}
    return {"objects": [entity], "background": scene.background, "text": scene.text}


def _text_facts(notes: dict[str, Any]) -> dict[str, Any]:
    return {name: notes[name] for name in ("layout", "text", "text_color", "background", "band", "scene") if name in notes}


def _quoted(texts: list[str]) -> str:
    return "the text " + " and ".join(f'"{text}"' for text in texts) if texts else ""


def _knowledge(row: RawRow, notes: dict[str, Any], general: str) -> str:
    if row.kind == "edit":
        return f"{general}, after the edit: {row.instruction}"
    if row.kind == "text_image":
        return f"{general}, a drawn {notes.get('layout', notes['mode'])} that shows how text looks"
    if "shape" in notes:
        return f"{general}, drawn in flat colors"
    folder = PurePosixPath(row.provenance.partition("#")[0]).parent.name
    return f"{general}, from the collection {folder}" if folder else general


def _json(facts: dict[str, Any]) -> str:
    return json.dumps(facts, ensure_ascii=False)
