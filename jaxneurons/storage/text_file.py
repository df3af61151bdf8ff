"""Text that people wrote, in the encodings that their programs save."""

import json
import os
import stat
from pathlib import Path

from jaxneurons.errors import DataError


def read_text(path: Path) -> str:
    """A text file in UTF-8, or in what its byte-order mark says; every line ends in "\n".

    Raises:
      DataError: no file, one that cannot be read, or another encoding; says which line.
    """
    try:
        data = _read(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot be read: {reason}") from None
    encoding = json.detect_encoding(data)  # by the mark, or by the zeros of UTF-16 and UTF-32
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}: not in {encoding.upper().removesuffix('-SIG')} (byte {error.start}, line "
            f"{line}); save it as UTF-8"
        ) from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise DataError(
            f"{path}: line {line} holds a zero byte, so it is no text; save it as UTF-8"
        )
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _read(path: Path) -> bytes:
    # A pipe that nobody writes into is empty instead of waited for.
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        kind = os.fstat(handle).st_mode
        if stat.S_ISDIR(kind):
            raise OSError("it is a directory")
        if stat.S_ISFIFO(kind):
            os.set_blocking(handle, True)
        elif not stat.S_ISREG(kind):
            raise OSError("it is a device")
        with open(handle, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(handle)
