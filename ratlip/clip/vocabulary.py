"""The small CLIP's own words: one data set's captions need hundreds of them, not CLIP's 49,408 pieces."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ratlip.errors import WeightsError
from ratlip.files import read_json, write_json

PAD, START, UNKNOWN, FIRST_WORD = 0, 1, 2, 3


def split_words(text: str) -> list[str]:
    """Lower-case words of a caption, no punctuation: "A red-brown bird." -> ["a", "red", "brown", "bird"]."""
    return re.findall(r"[^\W_]+", text.lower())


class Vocabulary:
    """A word tokenizer: list of N strings -> LongTensor (N, `context_length`).

    A row is start, words, end, padding. The end token has the largest number: open_clip's text tower reads the sentence
    there. Words never seen become "unknown"; a longer caption loses its last words, never its end token.
    """

    def __init__(self, words: Sequence[str], context_length: int):
        if context_length < 3:
            raise ValueError(f"context_length={context_length}: start, end and one word need at least 3")
        self.words, self.context_length = tuple(words), context_length
        self.number = {word: FIRST_WORD + i for i, word in enumerate(self.words)}
        self.end = FIRST_WORD + len(self.words)

    @classmethod
    def build(cls, captions: Iterable[str], context_length: int, min_count: int = 2) -> Vocabulary:
        """The words that occur `min_count` times or more, the most frequent first (equals in alphabetic order)."""
        counts = Counter(word for caption in captions for word in split_words(caption))
        kept = [word for word, count in counts.items() if count >= min_count]
        return cls(sorted(kept, key=lambda word: (-counts[word], word)), context_length)

    def __len__(self) -> int:
        """How many different token numbers there are, the special ones included."""
        return self.end + 1

    def __call__(self, texts: Sequence[str] | str) -> Tensor:
        texts = [texts] if isinstance(texts, str) else texts
        tokens = torch.full((len(texts), self.context_length), PAD, dtype=torch.long)
        for row, text in zip(tokens, texts, strict=True):
            numbers = [self.number.get(word, UNKNOWN) for word in split_words(text)][: self.context_length - 2]
            row[: len(numbers) + 2] = torch.tensor([START, *numbers, self.end])
        return tokens

    def unknown(self, text: str) -> list[str]:
        """The words of `text` that the vocabulary lacks, each once, in order."""
        return [word for word in dict.fromkeys(split_words(text)) if word not in self.number]

    def share_cut(self, texts: Sequence[str]) -> float:
        """Share of `texts` (0 to 1) that are longer than the context and lose words."""
        return sum(len(split_words(text)) > self.context_length - 2 for text in texts) / max(1, len(texts))

    def save(self, path: Path) -> None:
        """Write the vocabulary as JSON, whole or not at all."""
        write_json(path, {"context_length": self.context_length, "words": list(self.words)})

    @classmethod
    def load(cls, path: Path) -> Vocabulary:
        """Read what `save` wrote. Raises WeightsError where the file is missing or no vocabulary."""
        try:
            content = read_json(path)
            return cls(content["words"], content["context_length"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise WeightsError(
                f"{path} is no vocabulary of a small CLIP ({error}): remove its folder and train the small CLIP again"
            ) from error
