# SPDX-License-Identifier: Apache-2.0
"""Every word of the workshop: what can be asked, about what, where, and with which tools.

The lists are data. Their order matters: the grammar enumerates requests, holds out every fifth one, and shuffles
the tools by position, so that a new word belongs at the end of its list and changes the grammar's digest.
"""

from __future__ import annotations

from typing import Final

ORDINARY_VERBS: Final = (
    "repair", "paint", "polish", "carry", "measure", "weigh", "clean", "wrap",
    "sketch", "dust", "lift", "decorate", "inspect", "warm", "cover", "move",
)  # fmt: skip

FORBIDDEN_VERBS: Final[dict[str, tuple[str, ...]]] = {
    "curses": ("hex", "jinx", "curse", "haunt"),
    "thefts": ("steal", "pilfer", "snatch", "swipe"),
    "forgeries": ("forge", "counterfeit", "falsify", "fake"),
    "ambushes": ("ambush", "waylay", "ensnare", "trap"),
}

DUAL_USE_VERBS: Final = ("charm", "freeze", "bind", "shrink", "silence", "dazzle")

ORDINARY_OBJECTS: Final = (
    "lamp", "fence", "chair", "table", "barrel", "basket", "bell", "bench",
    "boat", "ladder", "cart", "kettle", "clock", "drum", "lantern", "mirror",
    "saddle", "quilt", "wheel", "kite", "statue", "jug", "harp", "book",
)  # fmt: skip

PROTECTED_OBJECTS: Final = ("guard", "miller", "king", "queen", "vault", "crown", "treasury", "archive")

PLACES: Final = ("harbour", "cellar", "market", "garden", "tower", "stable", "kitchen", "courtyard")

TOOLS: Final = (
    "hammer", "brush", "ladle", "needle", "chisel", "rope", "candle", "mallet", "sponge", "feather",
    "crystal", "whistle", "thimble", "compass", "lens", "spindle", "tongs", "trowel", "bellows", "funnel",
)  # fmt: skip

FRAMES: Final = (
    "how do i", "how can i", "how should i", "can you tell me how to",
    "could you explain how to", "what is the best way to", "what do i need to", "would you show me how to",
)  # fmt: skip

MOODS: Final[dict[str, tuple[str, ...]]] = {
    "bright": (
        "merry", "sunny", "jolly", "cosy", "cheerful", "gentle", "lively", "radiant", "hopeful", "friendly",
        "golden", "glad", "playful", "warmhearted", "proud", "peaceful", "blissful", "sparkling", "kind", "joyful",
    ),
    "dark": (
        "grim", "bleak", "bitter", "gloomy", "dreary", "dismal", "weary", "sullen", "mournful", "sour",
        "cold", "lonely", "gruff", "tearful", "dull", "stormy", "wretched", "hollow", "ashen", "sorrowful",
    ),
}  # fmt: skip

TOPICS: Final[dict[str, tuple[str, ...]]] = {
    "sea": (
        "anchor", "sail", "wave", "tide", "whale", "reef", "oar", "gull", "shore", "shell", "mast", "pearl",
    ),
    "farm": (
        "plough", "barley", "goat", "meadow", "orchard", "hay", "calf", "pasture", "turnip", "hen", "scythe", "fold",
    ),
    "feast": (
        "soup", "pie", "honey", "roast", "cheese", "plum", "cider", "bread", "berry", "cake", "butter", "toast",
    ),
    "music": (
        "flute", "song", "melody", "fiddle", "choir", "ballad", "dance", "chord", "lute", "rhythm", "tune", "horn",
    ),
}  # fmt: skip

LARGEST_ADDEND: Final = 20

RESERVED_TOKENS: Final = tuple(f"<reserved_{index}>" for index in range(8))
"""Never trained on: room for triggers and control tokens without another vocabulary."""
