"""Where a caption names the subject: "a young woman on a bench" -> "<person> on a bench"."""

import re

from nested_attention.prompts import placeholders

NOUNS = {
    "person": (
        "man", "woman", "boy", "girl", "person", "guy", "lady", "gentleman", "child", "kid", "baby", "toddler", "teenager",
        "someone", "somebody",
    ),
    "cat": ("cat", "kitten", "kitty"),
    "pet": ("pet", "cat", "kitten", "kitty", "dog", "puppy", "doggy", "rabbit", "bunny", "hamster"),
}  # fmt: skip
ARTICLES = "a|an|the|this|that|my|our|your|his|her|their"
# how a subject looks belongs to the reference, so it goes with the noun; what it does ("smiling") stays in the caption
LOOKS = (
    "young|old|older|elderly|middle-aged|adult|teenage|little|small|big|large|tall|cute|beautiful|pretty|handsome|bearded|blond|blonde|"
    "black|white|grey|gray|brown|red|orange|ginger|yellow|green|blue|tabby|striped|fluffy"
)


def with_placeholder(text: str, kind: str) -> str | None:
    """`text` with `<kind>` for the first phrase that names one; as it is if it has `<kind>`; None if nothing names one."""
    placeholder = f"<{kind}>"
    if placeholder in placeholders(text):
        return text
    nouns = "|".join(map(re.escape, NOUNS.get(kind, (kind,))))
    phrase = re.compile(rf"(?<![\w-])(?:(?:{ARTICLES})\s+)?(?:(?:{LOOKS}),?\s+)*(?:{nouns})(?![\w-])", re.IGNORECASE)
    replaced, count = phrase.subn(placeholder, text, count=1)
    return replaced if count else None
