"""Short forms of long names, which the gateway accepts for the names: `1f0c9a..` or `decode-0..:8100`.

And of the versions of a predictor, which are only shown.
"""

from collections import Counter
from collections.abc import Collection

_DOTS = ".."
# A shorter form is more likely a typing error.
_FEWEST = 4
_VERSION_DIGITS = 12


def short_version(version: str) -> str:
    """Return the first digits of a version of the predictor; empty for none."""
    return version[:_VERSION_DIGITS]


def matching(given: str, names: Collection[str]) -> list[str]:
    """Return the names that `given` stands for: itself, or all that begin and end like it around two dots."""
    if given in names:
        return [given]
    head, dots, tail = given.rpartition(_DOTS)
    shortest = len(head) + len(tail)
    if not dots or shortest < _FEWEST:
        return []
    return [name for name in names if len(name) >= shortest and name.startswith(head) and name.endswith(tail)]


def shortened(names: Collection[str], limit: int) -> dict[str, str]:
    """Return an unambiguous form of each name, of at most `limit` characters where possible."""
    shown = {name: name for name in names}
    left = {name for name in shown if len(name) > limit}
    size = limit
    while left:
        for tail in (0, size // 3, size // 2):
            left -= _cut(left, size - tail - len(_DOTS), tail, shown)
        size += 1
        left = {name for name in left if len(name) > size}
    return shown


def _cut(left: set[str], head: int, tail: int, shown: dict[str, str]) -> set[str]:
    """Shorten those of `left` whose beginning and end of these lengths are unique; return them."""
    counts = Counter(_ends(name, head, tail) for name in shown if len(name) >= head + tail)
    done = set()
    for name in left:
        if counts[_ends(name, head, tail)] == 1:
            first, last = _ends(name, head, tail)
            form = first.rstrip(".") + _DOTS + last.lstrip(".")
            # With dots in the name at the cut, the form may stand for several names.
            if (len(form) == head + tail + len(_DOTS) and _DOTS not in name) or matching(form, shown) == [name]:
                shown[name] = form
                done.add(name)
    return done


def _ends(name: str, head: int, tail: int) -> tuple[str, str]:
    return name[:head], name[len(name) - tail :]
