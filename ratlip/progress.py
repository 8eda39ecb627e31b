"""Progress bars that read well in a terminal, in JupyterLab and in a stored notebook."""

from __future__ import annotations

import sys

from tqdm import tqdm


def bar(iterable=None, *, enabled: bool = True, **options) -> tqdm:
    """A tqdm bar: to stderr in a terminal, to stdout in a notebook (where stderr looks like an error).

    Plain text on purpose: a widget bar is stored as an empty box, plain text as the finished line.
    """
    notebook = "ipykernel" in sys.modules
    options = {"dynamic_ncols": not notebook, "mininterval": 1.0, "leave": True, **options}
    if notebook:
        options["position"] = 0  # a bar within a bar would move the cursor, which a stored output cannot
    return tqdm(iterable, disable=not enabled, file=sys.stdout if notebook else sys.stderr, **options)
