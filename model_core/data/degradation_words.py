"""Words of `model_core.data.degradation`: what fine captions say, and the vaguer words that short requests have in their place (ours)."""

from __future__ import annotations

# Each vague word stands for one value alone, and is no value itself: what it stands for can be inferred.
BLURS: dict[str, dict[str, tuple[str, ...]]] = {
    "color": {
        "red": ("crimson", "scarlet", "ruby"),
        "green": ("emerald", "jade", "olive"),
        "blue": ("navy", "azure", "cobalt"),
        "yellow": ("lemon", "canary", "mustard"),
        "purple": ("violet", "plum", "lilac"),
        "orange": ("tangerine", "apricot", "pumpkin"),
    },
    "shape": {
        "circle": ("disc", "dot", "ball"),
        "square": ("box", "block", "tile"),
        "triangle": ("wedge", "pyramid", "delta"),
        "star": ("pentagram", "asterisk"),
    },
    "position": {
        "left": ("west side", "port side"),
        "right": ("east side", "starboard side"),
        "top": ("north side", "upper edge"),
        "bottom": ("south side", "lower edge"),
    },
    "background": {
        "white": ("snowy", "milky", "chalky"),
        "gray": ("ashen", "cloudy", "slate"),
        "black": ("inky", "pitch-dark", "jet"),
        "pink": ("rosy", "blush", "salmon"),
    },
}

# Keywords by which a clause of a general caption is known to be about an aspect.
KEYWORDS: dict[str, str] = {
    "style": (
        r"style|watercolou?r|oil painting|line art|pixel art|anime|cartoon|cinematic|photorealistic|impressionist|minimalist|retro|sketch"
    ),
    "lighting": r"light|lights|lighting|lit|sunlight|moonlight|backlit|shadows?|glow|glowing|sunset|golden hour|neon",
    "texture": r"textures?|textured|grainy|glossy|matte|rough|smooth|fabric|wooden grain|brushstrokes?|fur detail|weathered|rusty",
    "layout": (
        r"left|right|top|bottom|cent(?:er|re)|centered|corner|foreground|symmetrical|composition|close-up|wide shot|in front of|above|below"
    ),
    "background": r"background|backdrop|backgrounds|in the distance|scenery behind",
}
PREPOSITIONS = r"with|in|under|on|against|at|lit by|bathed in|from|by"

VAGUE: dict[str, tuple[str, ...]] = {
    "style": ("in some nice style", "artsy"),
    "lighting": ("with nice light", "well lit"),
    "texture": ("with some texture", "detailed"),
    "layout": ("placed somewhere", "nicely arranged"),
    "background": ("on some background", "with something behind"),
}

# What goes before, and after, a request as people say it.
COLLOQUIAL: tuple[tuple[str, str], ...] = (("draw me", ""), ("", "please"), ("i want", ""), ("can you make", ""), ("gimme", "ok"))

PEOPLE = r"portrait|face|selfie|person|man|woman|men|women|girl|boy|child|people"
