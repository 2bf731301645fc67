"""Text from files made fit for a terminal, which obeys control characters in it."""

import unicodedata

# Control characters, those that format (they turn the direction of writing, or are unseen), halves of
# characters, and ends of lines and paragraphs.
_HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
_JOINERS = "\u200c\u200d"  # parts of words, and of emoji


def printable(text: str, *, keep: str = "") -> str:
    """The text with each character that a terminal obeys or hides written as `\\x1b`, `\\u202e`, `\\n`.

    Those in `keep` stay as they are.
    """
    if text.isprintable():
        return text
    return "".join(one if one in keep else _escaped(one) for one in text)


def _escaped(character: str) -> str:
    if character in _JOINERS or unicodedata.category(character) not in _HIDDEN:
        return character
    return character.encode("unicode_escape").decode("ascii")
