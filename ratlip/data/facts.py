"""What captions say and what images show, as small integers, and the one rule of truth between them.

A caption that names a part of an image's attributes is true of every image that agrees in that part, so "the own image"
and "another image" are no longer right and wrong. Values are numbered; `UNNAMED` stands where a caption says nothing.

An image of two objects can be read in two ways: either may be the one that a caption mentions first. So an image shows
R readings (1, or 2 where attributes are called "first ..." and "second ..."), and a caption is true of it where one
reading agrees in all that is named.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from ratlip.errors import DataError

if TYPE_CHECKING:
    from ratlip.data.prepared import Split

UNNAMED = -1
FIRST, SECOND, RELATION = "first ", "second ", "relation"
INVERSE = {"left of": "right of", "above": "below", "in front of": "behind"}  # as the other object would say it
INVERSE |= {b: a for a, b in INVERSE.items()}

Values = Mapping[str, Sequence[str]]


def coding(values: Values) -> dict[str, tuple[str, ...]]:
    """The numbering of a set's attributes {name: values}: a value's number is its index; inverse relations are last."""
    table = {name: tuple(each) for name, each in values.items()}
    if RELATION in table:
        table[RELATION] = tuple(dict.fromkeys([*table[RELATION], *(INVERSE[each] for each in table[RELATION])]))
    return table


def values_of(splits: Iterable[Split]) -> dict[str, tuple[str, ...]]:
    """Attributes and values that occur in these splits, in alphabetic order: a numbering that they share."""
    known, seen = [each for split in splits for each in split.attributes or []], defaultdict[str, set[str]](set)
    for name, value in chain.from_iterable(each.items() for each in known):
        seen[_own(name)].add(value)  # of both objects together: exchanged, a value keeps its number
    return coding({name: sorted(seen[_own(name)]) for name in known[0]})


def _own(name: str) -> str:
    return name.removeprefix(FIRST).removeprefix(SECOND)


def codes(attributes: Sequence[Mapping[str, str]], table: Values) -> np.ndarray:
    """Known attributes of N images -> int16 (N,K). DataError for a value that the numbering lacks."""
    number = {name: {value: i for i, value in enumerate(values)} for name, values in table.items()}
    try:
        return np.array([[number[name][each[name]] for name in table] for each in attributes], np.int16)
    except KeyError as error:
        raise DataError(f"the attribute or value {error} is not one of this set's; prepare the data anew") from error


def two_objects(names: Iterable[str]) -> bool:
    """Whether these attributes are of two objects."""
    return any(name.startswith(FIRST) for name in names)


def readings(shown: np.ndarray, table: Values) -> np.ndarray:
    """Codes (N,K) as seen -> (N,R,K): beside them, where there are two objects, those with the objects exchanged."""
    names = list(table)
    if not two_objects(names):
        return shown[:, None]
    other = [name.replace(*((FIRST, SECOND) if name.startswith(FIRST) else (SECOND, FIRST))) for name in names]
    exchanged = shown[:, [names.index(name) for name in other]]
    if RELATION in names:
        column, words = names.index(RELATION), list(table[RELATION])
        inverse = np.array([words.index(INVERSE[word]) for word in words] + [UNNAMED], np.int16)
        exchanged[:, column] = inverse[exchanged[:, column]]  # UNNAMED, -1, is the last
    return np.stack([shown, exchanged], axis=1)


def agrees(says: Any, shows: Any) -> Any:
    """Which readings agree in all that is named: says (...,K), shows (...,R,K), broadcast -> bool (...,R).

    NumPy arrays or tensors, whichever both are.
    """
    says = says[..., None, :]
    return ((says == UNNAMED) | (says == shows)).all(-1)


def true_of(says: Any, shows: Any) -> Any:
    """The rule: a caption is true of an image where one of its readings agrees. (...,K), (...,R,K) -> bool (...)."""
    return agrees(says, shows).any(-1)


def new(says: np.ndarray, shows: np.ndarray) -> np.ndarray:
    """Which captions are true of none of these images: says (N,K), shows (M,R,K) -> bool (N,)."""
    rows = max(1, 2**22 // shows[..., 0].size)
    parts = [~true_of(part[:, None], shows).any(axis=1) for part in np.array_split(says, -(-len(says) // rows))]
    return np.concatenate(parts)


def says(split: Split, table: Values) -> np.ndarray:
    """What each caption of `split.all_captions` says: int16 (captions,K); all attributes where captions name all."""
    own = np.repeat(codes(split.attributes or [], table), np.diff(split.caption_offsets), axis=0)
    if (named := getattr(split, "named", None)) is None:
        return own
    order = sorted(table)
    return np.where(named[:, [order.index(name) for name in table]], own, np.int16(UNNAMED))
