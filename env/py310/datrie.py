"""The part of the package `datrie` that Snakemake 7 uses, in plain Python.

Only for Python 3.10: Snakemake 8 and later need Python 3.11, Snakemake 7 needs `datrie`, and `datrie` has no
wheel for Python 3.10, so that it could not be installed without a compiler.
"""


class Trie(dict):
    """A dict of strings that finds its keys which are prefixes of a string, shortest first."""

    def __init__(self, alphabet=None):
        """`alphabet`: the characters of the keys; datrie wants to know, a dict need not."""
        super().__init__()

    def prefix_items(self, text):
        return [(text[:end], self[text[:end]]) for end in range(len(text) + 1) if text[:end] in self]

    def iter_prefix_values(self, text):
        return iter([value for _, value in self.prefix_items(text)])
