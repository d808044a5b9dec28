"""What a token stands for: real bytes and text, whatever way its tokenizer writes it down."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# Pieces of tokens that stand for no text. U+FFFF is no character: no text holds it.
SPECIAL = "\uffff"
UNKNOWN = "\ufffd"  # what Unicode itself puts where a character could not be read


def _alphabet() -> dict[str, int]:
    """Byte-level BPE's letters (GPT-2, encoder.py): printable bytes as they are, others above."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(256 + place): byte for place, byte in enumerate(others)}


ALPHABET = _alphabet()


def text_of(raw: bytes) -> str:
    """Bytes as text; those that are no whole character become lone surrogates, one each."""
    return raw.decode("utf-8", "surrogateescape")


def bytes_of(text: str) -> bytes:
    """What ``text_of`` was given."""
    return text.encode("utf-8", "surrogateescape")


def folded(raw: bytes) -> bytes:
    """Lower case."""
    return bytes_of(text_of(raw).lower())


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Tokens that stand for no text."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    marked = (number for number, token in added.items() if token.special)
    return frozenset((*tokenizer.all_special_ids, *marked))


def unknown_id(tokenizer: Any) -> int:
    """
    The token for what the vocabulary lacks; -1: there is none.

    GPT-2 declares its end of text as that, too, but its bytes cover everything.
    """
    unk = tokenizer.unk_token_id
    nothing = unk is None or unk in (tokenizer.eos_token_id, tokenizer.bos_token_id)
    return -1 if nothing else int(unk)


@dataclass(frozen=True, eq=False)
class Reader:
    """
    Reads one tokenizer's tokens.

    kind: how they are written. "bytes": in byte-level BPE's letters. "words": WordPiece, where what
    lacks ``prefix`` starts a word. "plain": sentencepiece and whatever writes text as it is.
    literal: tokens that were added to it.  uncased: it knows no capital letters.
    """

    tokenizer: Any
    kind: Literal["bytes", "words", "plain"]
    prefix: str
    special: frozenset[int]
    literal: frozenset[int]
    unknown: int
    uncased: bool

    def raw(self, number: int, token: str | None) -> bytes:
        """The bytes of one token; none for a number without a token."""
        if not token:
            return b""
        if number in self.special or (self.kind != "plain" and number in self.literal):
            return bytes_of(token)
        if self.kind == "bytes" and all(letter in ALPHABET for letter in token):
            return bytes(ALPHABET[letter] for letter in token)
        if self.kind == "words":
            if token.startswith(self.prefix) and token != self.prefix:
                return bytes_of(token.removeprefix(self.prefix))
            return bytes_of(token if _stands_alone(token) else " " + token)
        if found := BYTE.fullmatch(token):
            return bytes([int(found[1], 16)])
        return bytes_of(token.replace("▁", " "))

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """The text of each token; SPECIAL and UNKNOWN for what has none."""
        ids = [int(number) for number in ids]
        known: dict[int, str] = {}
        wanted = sorted(set(ids))
        for number, token in zip(wanted, self.tokenizer.convert_ids_to_tokens(wanted), strict=True):
            if number == self.unknown:
                known[number] = UNKNOWN
            elif number in self.special:
                known[number] = SPECIAL
            else:
                known[number] = text_of(self.raw(number, token))
        return [known[number] for number in ids]


def _stands_alone(token: str) -> bool:
    """
    Whether WordPiece makes this a word by itself, so that nothing says if a space was before it.

    It splits at punctuation and CJK ideographs; most of them follow no space.
    """
    if len(token) > 1:
        return False
    ideograph = "\u3400" <= token <= "\u9fff" or "\uf900" <= token <= "\ufaff"
    return ideograph or token >= "\U00020000" or not token.isalnum()


def reader(tokenizer: Any) -> Reader:
    """How to read the tokens of a tokenizer that transformers loads."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    kind: Literal["bytes", "words", "plain"] = "plain"
    prefix = "##"
    if backend is not None:
        normalizer = backend.normalizer
        uncased = normalizer is not None and "A" not in normalizer.normalize_str("A")
        if type(backend.model).__name__ == "WordPiece":
            kind, prefix = "words", backend.model.continuing_subword_prefix
        elif "ByteLevel" in repr(backend.decoder):
            kind = "bytes"
    else:  # one written in Python: it declares less
        uncased = bool(getattr(tokenizer, "do_lower_case", False))
        if hasattr(tokenizer, "wordpiece_tokenizer"):
            kind = "words"
        elif hasattr(tokenizer, "byte_decoder"):
            kind = "bytes"
    added = frozenset(getattr(tokenizer, "added_tokens_decoder", {}))
    return Reader(
        tokenizer, kind, prefix, special_ids(tokenizer), added, unknown_id(tokenizer), uncased
    )


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """
    What each token stands for, a word's start as a leading space: [len(ids)] texts.

    Of an uncased tokenizer it is lower case, as that is all it knows. Bytes that are no whole
    character are lone surrogates (``bytes_of`` gives them back); tokens without text are SPECIAL
    or, for what the vocabulary lacks, UNKNOWN.
    """
    return reader(tokenizer).pieces(ids)
