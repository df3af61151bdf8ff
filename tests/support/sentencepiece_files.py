"""`tokenizer.model` files: a protocol buffer is tags, lengths and values."""

import struct


def number(value):
    out = b""
    while value > 0x7F:
        out, value = out + bytes([value & 0x7F | 0x80]), value >> 7
    return out + bytes([value])


def part(field, data):
    return number(field << 3 | 2) + number(len(data)) + data


def piece(text, score, kind=1):
    own = part(1, text.encode()) + number(2 << 3 | 5) + struct.pack("<f", score)
    return part(1, own + number(3 << 3) + number(kind))


def model(pieces, kind=2, extra=b""):
    trainer = part(2, number(3 << 3) + number(kind))
    rules = part(3, number(4 << 3) + number(0))
    return b"".join(pieces) + trainer + rules + extra
