"""Reading the split files (`train/filenames.pickle`) without running anything that is in them.

A pickle is a program: the ordinary loader may import and call whatever the file names. Here nothing can be
imported, so the only things that can come out are those that need no import: lists, tuples, strings, numbers.
"""

from __future__ import annotations

import pickle
from pathlib import Path


class _Refusing(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(f"it wants to import {module}.{name}, which was refused")

    def persistent_load(self, pid):
        raise pickle.UnpicklingError("it refers to something outside the file, which was refused")


def load_names(path: str | Path) -> list[str]:
    """The list (or tuple) of strings in a pickle file of any protocol, those written by Python 2 included.

    Raises ValueError that says what is wrong if the file holds anything else; nothing of it is executed.
    """
    with open(path, "rb") as file:
        try:
            names = _Refusing(file, encoding="latin-1").load()
        except Exception as error:  # a damaged pickle raises whatever its bytes happen to trip over
            raise ValueError(f"is not a pickled list of names ({error})") from error
    if not isinstance(names, (list, tuple)):
        raise ValueError(f"holds a {type(names).__name__} where a list of names is expected")
    for position, name in enumerate(names):
        if not isinstance(name, str):
            raise ValueError(f"holds a {type(name).__name__} at position {position} where a name is expected")
    return list(names)
