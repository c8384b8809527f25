"""Text to token ids and back: whole words for our own models, a tokenizer of transformers for published ones."""

from collections.abc import Sequence
from typing import Protocol

from ..runtime import UserError, near_miss

SPECIAL = ("<pad>", "<start>", "<end>")


class Tokenizer(Protocol):
    """What a captioner asks of a tokenizer. pad, start, end: ids of special tokens."""

    pad: int
    start: int
    eos: int
    size: int

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


class Words:
    """One token a word, separated by spaces; the vocabulary is a list of words behind three special tokens."""

    def __init__(self, words: Sequence[str]):
        self.words = (*SPECIAL, *words)
        self.ids = {word: i for i, word in enumerate(self.words)}
        self.pad, self.start, self.eos, self.size = 0, 1, 2, len(self.words)
        if len(self.ids) != self.size:
            raise UserError("expected each word once in a vocabulary, got a word twice; write the list again")

    def encode(self, text: str) -> list[int]:
        """Ids of the words; UserError for one that the model never saw."""
        words = text.lower().split()
        unknown = [word for word in words if word not in self.ids or word in SPECIAL]
        if unknown:
            raise UserError(f"unknown word {unknown[0]!r} in {text[:40]!r}; {near_miss(unknown[0], self.words[len(SPECIAL):])}")
        return [self.ids[word] for word in words]

    def decode(self, ids: Sequence[int]) -> str:
        """The words up to the end token."""
        ids = list(ids)
        ids = ids[: ids.index(self.eos)] if self.eos in ids else ids
        return " ".join(self.words[i] for i in ids if i >= len(SPECIAL))


class Published:
    """A tokenizer of transformers behind the same contract. start: what the decoder begins with."""

    def __init__(self, tokenizer, *, start: int, eos: int):
        self.tokenizer, self.start, self.eos = tokenizer, start, eos
        self.pad, self.size = eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id, len(tokenizer)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def decode(self, ids: Sequence[int]) -> str:
        ids = list(ids)
        ids = ids[: ids.index(self.eos)] if self.eos in ids else ids
        return self.tokenizer.decode(ids, skip_special_tokens=True)


class Bytes:
    """One token a byte, behind the shapes of a published model whose tokenizer is absent: for random weights alone."""

    def __init__(self, size: int):
        self.size, self.pad, self.start, self.eos = size, size - 1, size - 1, size - 1

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        """Ids that are no byte stay visible as numbers."""
        ids = list(ids)
        ids = ids[: ids.index(self.eos)] if self.eos in ids else ids
        return " ".join(chr(i) if 32 < i < 127 else f"<{i}>" for i in ids)
