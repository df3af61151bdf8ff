"""SentencePiece's `tokenizer.model`: read, and applied exactly as the library of that name does.

The file is a protocol buffer: pieces with scores, how the text is normalised, and the kind of model
(BPE or unigram). Rank-ordered merges, which `tokenizers` has, cannot express it: a piece keeps one
score however it came about, equal scores go from the left, unused pieces fall apart again.
"""

import heapq
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxneurons.errors import SourceError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
UNIGRAM, BPE = 1, 2
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
_UNKNOWN_PENALTY = 10.0
_USER_DEFINED_BONUS = 0.1  # for each further byte of a user-defined piece, in release 0.2.3
_MODELS = {UNIGRAM: "unigram", BPE: "BPE", 3: "word", 4: "character"}


class Settings(NamedTuple):
    """What the file says beside its pieces; the defaults are the format's."""

    model: int = UNIGRAM
    byte_fallback: bool = False
    space_at_end: bool = False
    dummy_prefix: bool = True
    remove_extra_spaces: bool = True
    escape_spaces: bool = True
    charsmap: bytes = b""
    bos: str = "<s>"
    eos: str = "</s>"
    unknown: str = "<unk>"
    pad: str = "<pad>"


def read_sentencepiece(path: Path) -> "SentencePiece":
    """Read a `tokenizer.model`.

    Raises:
      SourceError: not such a file, or a model of words or characters.
    """
    try:
        pieces, settings, denormalizer = _parse(path.read_bytes())
    except (OSError, ValueError, IndexError, struct.error) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a SentencePiece model"
        raise SourceError(
            f"{path}: {reason}, or damaged; fetch it again, or add the model's tokenizer.json"
        ) from None
    if settings.model not in (UNIGRAM, BPE) or denormalizer:
        what = _MODELS.get(settings.model, f"kind {settings.model}")
        what = "with a rule for decoding" if denormalizer else what
        raise SourceError(
            f"{path}: a SentencePiece model ({what}) of a kind that is not supported (supported: "
            "BPE and unigram, without rules for decoding); add the model's tokenizer.json"
        )
    if not settings.escape_spaces:
        raise SourceError(f"{path}: escape_whitespaces = false is not supported")
    try:
        return SentencePiece(pieces, settings)
    except ValueError as error:
        raise SourceError(f"{path}: {error}") from None


def _parse(data: bytes) -> tuple[list[tuple[str, float, int]], Settings, bool]:
    pieces: list[tuple[str, float, int]] = []
    values: dict[str, Any] = {}
    denormalizer = False
    names = {3: "model", 24: "space_at_end", 35: "byte_fallback"}
    names |= {45: "unknown", 46: "bos", 47: "eos", 48: "pad"}
    rules = {2: "charsmap", 3: "dummy_prefix", 4: "remove_extra_spaces", 5: "escape_spaces"}
    for field, value in _fields(data):
        if field == 1:
            parts = dict(_fields(_bytes(value)))
            score = parts.get(2, b"\0\0\0\0")
            number = struct.unpack("<f", _bytes(score))[0]
            pieces.append((_bytes(parts.get(1, b"")).decode(), number, int(parts.get(3, NORMAL))))
        elif field in (2, 3):
            known = names if field == 2 else rules
            values |= {known[n]: v for n, v in _fields(_bytes(value)) if n in known}
        elif field == 5:
            denormalizer = any(n == 2 and v for n, v in _fields(_bytes(value)))
    if not pieces:
        raise ValueError("no pieces")
    for name, kind in Settings.__annotations__.items():
        if name in values:
            value = values[name]
            values[name] = _bytes(value).decode() if kind is str else kind(value)
    return pieces, Settings(**values), denormalizer


def _bytes(value: object) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a number where bytes are due")
    return value


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of a message's fields: integers, or bytes (four or eight for a float)."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value
            if shift > 63:
                raise ValueError("a number of more than 64 bits")

    while at < len(data):
        tag = varint()
        field, kind = tag >> 3, tag & 7
        if field == 0:
            raise ValueError("field 0")
        if kind == 0:
            yield field, varint()
            continue
        if kind not in (1, 2, 5):
            raise ValueError("an unknown kind of field")
        size = varint() if kind == 2 else {1: 8, 5: 4}[kind]
        if at + size > len(data):
            raise ValueError("cut short")
        yield field, data[at : at + size]
        at += size


class SentencePiece:
    """A vocabulary of pieces that a text is cut into.

    Attributes:
      pieces: piece, score and kind of every id.
      settings: how a text is normalised and cut.
    """

    def __init__(self, pieces: list[tuple[str, float, int]], settings: Settings):
        """Index the pieces.

        Raises:
          ValueError: a piece is there twice, or there is no unknown piece.
        """
        self.pieces, self.settings = pieces, settings
        self._ids = {piece: index for index, (piece, _, _) in enumerate(pieces)}
        if len(self._ids) != len(pieces):
            raise ValueError("holds a piece twice")
        unknown = [piece for piece, _, kind in pieces if kind == UNKNOWN]
        if len(unknown) != 1:
            raise ValueError(f"holds {len(unknown)} unknown pieces instead of one")
        self.unknown = unknown[0]
        kinds = {index: kind for index, (_, _, kind) in enumerate(pieces)}
        if settings.byte_fallback and sum(kind == BYTE for kind in kinds.values()) != 256:
            raise ValueError("falls back to bytes, but lacks some of the 256 byte pieces")
        self._text = {p: (s, k) for p, s, k in pieces if k in (NORMAL, USER_DEFINED, UNUSED)}
        self._longest = max((len(piece) for piece in self._text), default=1)
        user_defined = sorted((p for p, _, k in pieces if k == USER_DEFINED), key=len, reverse=True)
        self._user_defined = tuple(user_defined)
        scores = [score for _, score, kind in pieces if kind == NORMAL]
        self._lowest = min(scores, default=0.0)
        self._map = _CharsMap(settings.charsmap) if settings.charsmap else None

    def cut(self, text: str, *, prefix: bool = True) -> list[str]:
        """The pieces of a text; an unknown stretch is the unknown piece, or its bytes.

        Args:
          text: without control pieces, which mean nothing here.
          prefix: put the space before the text that the model asks for.
        """
        normal = self._normalise(text, prefix=prefix)
        symbols = self._bpe(normal) if self.settings.model == BPE else self._unigram(normal)
        pieces: list[str] = []
        last_unknown = False
        for piece in symbols:
            known = piece in self._text
            if known:
                pieces.append(piece)
            elif self.settings.byte_fallback:
                pieces += [f"<0x{byte:02X}>" for byte in piece.encode()]
            elif not last_unknown:
                pieces.append(self.unknown)
            last_unknown = not known
        return pieces

    def _normalise(self, text: str, *, prefix: bool) -> str:
        settings = self.settings
        parts = list(self._mapped(text))
        if settings.remove_extra_spaces:
            first = next((n for n, part in enumerate(parts) if part != " "), len(parts))
            parts = parts[first:]
        if not parts:
            return ""
        out: list[str] = []
        after_space = settings.remove_extra_spaces
        for part in parts:
            trimmed = part.lstrip(" ") if after_space else part
            if trimmed:
                out.append(trimmed)
                after_space = trimmed.endswith(" ")
            after_space = after_space and settings.remove_extra_spaces
        normal = "".join(out).replace(" ", SPACE)
        space = SPACE if settings.dummy_prefix and prefix else ""
        if not settings.space_at_end:
            normal = space + normal
        if settings.remove_extra_spaces:
            normal = normal.rstrip(SPACE)
        return normal + space if settings.space_at_end else normal

    def _mapped(self, text: str) -> Iterator[str]:
        """The text in steps: user-defined pieces as they are, else what the rules make of it."""
        at = 0
        while at < len(text):
            piece = self._user_defined_at(text, at)
            if piece is not None:
                yield piece
                at += len(piece)
                continue
            length, becomes = (0, "") if self._map is None else self._map.longest(text, at)
            yield becomes if length else text[at]
            at += length or 1

    def _user_defined_at(self, text: str, at: int) -> str | None:
        return next((piece for piece in self._user_defined if text.startswith(piece, at)), None)

    def _bpe(self, text: str) -> list[str]:
        """Join the adjacent pair that makes the best piece, leftmost first, until none is left."""
        symbols: list[str] = []
        frozen: list[bool] = []
        at = 0
        while at < len(text):
            piece = self._user_defined_at(text, at)
            symbols.append(piece or text[at])
            frozen.append(piece is not None)
            at += len(symbols[-1])
        after = [*range(1, len(symbols)), -1]
        before = [*range(-1, len(symbols) - 1)]
        agenda: list[tuple[float, int, int, int]] = []
        halves: dict[str, tuple[str, str]] = {}  # how an unused piece came about

        def offer(left: int, right: int) -> None:
            if left < 0 or right < 0 or frozen[left] or frozen[right]:
                return
            joined = symbols[left] + symbols[right]
            if joined not in self._text:
                return
            score, kind = self._text[joined]
            heapq.heappush(agenda, (-score, left, right, len(joined)))
            if kind == UNUSED:
                halves[joined] = (symbols[left], symbols[right])

        for left in range(len(symbols) - 1):
            offer(left, left + 1)
        while agenda:
            _, left, right, size = heapq.heappop(agenda)
            length = len(symbols[left]) + len(symbols[right])
            if not symbols[left] or not symbols[right] or length != size:
                continue  # one of the two has been joined to another meanwhile
            symbols[left] += symbols[right]
            symbols[right] = ""
            after[left] = after[right]
            if after[right] >= 0:
                before[after[right]] = left
            offer(before[left], left)
            offer(left, after[left])
        return [part for symbol in symbols if symbol for part in self._apart(symbol, halves)]

    def _apart(self, symbol: str, halves: Mapping[str, tuple[str, str]]) -> list[str]:
        if self._text.get(symbol, (0.0, NORMAL))[1] != UNUSED or symbol not in halves:
            return [symbol]
        return [part for half in halves[symbol] for part in self._apart(half, halves)]

    def _unigram(self, text: str) -> list[str]:
        """The cut of the highest summed score, in the library's arithmetic: sums in float32."""
        best: list[tuple[float, int] | None] = [(0.0, 0), *[None] * len(text)]

        def reach(end: int, start: int, score: float) -> None:
            there, score = best[end], _float32(score)
            if there is None or score > there[0]:
                best[end] = (score, start)

        for start in range(len(text)):
            here = best[start]
            assert here is not None  # every character is reached from the one before
            single = False
            for end in range(start + 1, min(start + self._longest, len(text)) + 1):
                score, kind = self._text.get(text[start:end], (0.0, UNUSED))
                if kind == UNUSED:
                    continue
                if kind == USER_DEFINED:
                    score = _USER_DEFINED_BONUS * (len(text[start:end].encode()) - 1)
                reach(end, start, here[0] + score)
                single = single or end == start + 1
            if not single:
                reach(start + 1, start, here[0] + self._lowest - _UNKNOWN_PENALTY)
        pieces: list[str] = []
        end = len(text)
        while end:
            step = best[end]
            assert step is not None
            pieces.append(text[step[1] : end])
            end = step[1]
        return pieces[::-1]


def _float32(value: float) -> float:
    return struct.unpack("<f", struct.pack("<f", value))[0]


class _CharsMap:
    """A precompiled map of characters: a double-array trie of keys, and what each becomes."""

    def __init__(self, data: bytes):
        """Take it apart.

        Raises:
          ValueError: it does not hold what its length says.
        """
        if len(data) < 4:
            raise ValueError("a normaliser that is cut short")
        size = struct.unpack_from("<I", data)[0]
        if size % 4 or 4 + size > len(data):
            raise ValueError("a normaliser that is cut short")
        self._units = struct.unpack_from(f"<{size // 4}I", data, 4)
        self._results = data[4 + size :]

    def longest(self, text: str, at: int) -> tuple[int, str]:
        """How many characters of `text` the longest key at `at` takes, and what it becomes."""
        units = self._units
        node = self._child(0)
        taken, becomes = 0, -1
        ends = 0
        for end in range(at, len(text)):
            for byte in text[end].encode():
                node ^= byte
                if node >= len(units) or units[node] & 0x800000FF != byte:
                    return self._result(taken, becomes)
                ends = units[node] >> 8 & 1
                node ^= self._child(node)
            if ends and node < len(units):
                taken, becomes = end + 1 - at, units[node] & 0x7FFFFFFF
        return self._result(taken, becomes)

    def _child(self, node: int) -> int:
        unit = self._units[node]
        return (unit >> 10) << ((unit & 0x200) >> 6)

    def _result(self, taken: int, start: int) -> tuple[int, str]:
        if not taken:
            return 0, ""
        end = self._results.index(b"\0", start)
        return taken, self._results[start:end].decode()
