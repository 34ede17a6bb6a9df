"""First names, by group, and which split each of them belongs to (``data/names.csv``).

``gender``: common given names of the United States that readers take for one gender. Names that are also everyday
English words (Grace, Hope, Mark, Will, Rose) are left out. The names of the list ``one-token`` are one token with their
leading blank in SmolLM2's vocabulary of 49k entries; women's run short of these, so further lists hold names of two and
three tokens. Units are formed within a list, so that both candidates of a decision have the same number of tokens
there. What training does about a preference for women or men in general carries over to other names only as far as the
training names stand for them, so there are about as many of them as for the test; the list ``more`` serves training
and validation alone. The split ``people`` has 441 couples of two and three tokens that were added when everything else
stood, to be measured once.

``gender x race``: all names of Bertrand and Mullainathan, "Are Emily and Greg More Employable than Lakisha and
Jamal?", AER 94 (2004); names of Greenwald, McGhee and Schwartz (1998) as listed by Caliskan, Bryson and Narayanan,
Science 356 (2017), of Levitt and Fryer, QJE 119 (2004), and of Gaddis, Sociological Science 4 (2017); and, to reach
52 a group, a few more of the same kind that are our choice. Names of one group differ in length and frequency from
those of another, as they do in those studies. A perceived race is what a name signals to readers, not a fact about the
people who bear it.

The order within a list is a fixed shuffle, and names at the same place form one unit, so the evaluation splits are the
same for every seed.
"""

from __future__ import annotations

from itertools import permutations

from dso.decisions.sets.shipped import read_table

NAME_SPLITS = ("train", "validation", "test", "people")


def _read() -> dict[str, dict[str, dict[str, dict[str, list[str]]]]]:
    """attribute -> list -> group -> split -> names, all in the order of the file."""
    lists: dict[str, dict[str, dict[str, dict[str, list[str]]]]] = {}
    for row in read_table("names.csv"):
        groups = lists.setdefault(row["attribute"], {}).setdefault(row["list"], {})
        groups.setdefault(row["group"], {split: [] for split in NAME_SPLITS})[row["split"]].append(row["name"])
    return lists


_LISTS = _read()
ATTRIBUTES = tuple(_LISTS)


def groups_of(attribute: str) -> tuple[str, ...]:
    """The groups of an attribute, in the order that candidates are listed in."""
    return tuple(next(iter(_LISTS[attribute].values())))


def names_of(attribute: str, split: str) -> tuple[tuple[tuple[str, ...], ...], ...]:
    """The names of one split: a tuple of lists, each a tuple over groups of tuples of names.

    The names at one place of a list make up one unit, one name from each group; names of different lists are not
    combined.
    """
    return tuple(tuple(tuple(by_split[split]) for by_split in groups.values()) for groups in _LISTS[attribute].values())


def clash(names: tuple[str, ...]) -> bool:
    """Whether one name begins with another, so that its tokens may too (Dan, Danielle)."""
    return any(b.startswith(a) for a, b in permutations(names, 2))
