"""Names that users give to classes and clients: how they are cleaned, ordered and told apart."""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

# Python reads no more digits than some thousands; a longer run of them is taken in pieces.
_DIGITS = r"[0-9]{1,1000}"
_WHOLE = re.compile(f"[+-]?{_DIGITS}")
_SHOWN = 10  # names in a message


def clean(name: str) -> str:
    """The name in Unicode's composed normal form (NFC), without white space at its ends.

    Raises:
      ValueError: nothing is left, or the name is not valid Unicode.
    """
    try:
        name.encode()
    except UnicodeEncodeError:  # a file's name in another encoding, or half of a surrogate pair
        raise ValueError("is not valid Unicode") from None
    cleaned = _normal(name)
    if not cleaned:
        raise ValueError("is empty")
    return cleaned


def look(name: str) -> str:
    """The same for names that a reader cannot tell apart: they differ in white space, in normal
    form or in characters that are not shown. Letters of another case are told apart."""
    shown = (c for c in unicodedata.normalize("NFC", name) if unicodedata.category(c) != "Cf")
    return " ".join("".join(shown).split())


def natural_key(name: str) -> tuple:
    """Sorts names as a reader counts: 2 before 10, and client2 before client10."""
    if _WHOLE.fullmatch(name):
        return 0, int(name), name
    parts: list[Any] = re.split(f"({_DIGITS})", name)
    parts[1::2] = map(int, parts[1::2])
    return 1, parts, name


def ordered(names: Iterable[str]) -> list[str]:
    """Each name once, in the order of `natural_key`."""
    return sorted(set(names), key=natural_key)


def label_of(label: Any, class_names: Sequence[str]) -> int:
    """The number of the class that a label means.

    A class's name means that class, also where it is written as a number. Another number is a
    place in the order of the classes, from 0, if no class is named by a number.

    Raises:
      ValueError: it means none; the message tells what is allowed.
    """
    name = str(label) if type(label) is int else label
    if isinstance(name, str):
        meant = [i for i, known in enumerate(class_names) if _normal(known) == _normal(name)]
        if len(meant) == 1:
            return meant[0]
        if meant:
            raise ValueError(f"is the name of {len(meant)} classes")
    numbered = any(_WHOLE.fullmatch(_normal(known)) for known in class_names)
    if type(label) is int and 0 <= label < len(class_names) and not numbered:
        return label
    shown = ", ".join(class_names[:_SHOWN]) + (", ..." if len(class_names) > _SHOWN else "")
    or_number = "" if numbered else f" or 0..{len(class_names) - 1}"
    raise ValueError(f"must be a class name{or_number}; the classes are {shown}")


def _normal(name: str) -> str:
    return unicodedata.normalize("NFC", name).strip()
