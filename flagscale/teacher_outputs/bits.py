"""Small integers in as many bits as they need: what fills bytes as bytes, the rest bit by bit."""

from __future__ import annotations

import numpy as np


def width_of(count: int) -> int:
    """Bits that tell `count` values apart, from 0 on."""
    return max(count - 1, 0).bit_length()


def packed_bytes(count: int, width: int) -> int:
    """Bytes that `count` integers of `width` bits take."""
    return count * (width // 8) + (count * (width % 8) + 7) // 8


def pack(values: np.ndarray, width: int) -> bytes:
    """Integers [n], each at least 0 and below `2**width`, as bytes.

    Raises:
        ValueError: one of them is not.
    """
    values = np.ascontiguousarray(values, "<i8").reshape(-1)
    if values.size and not 0 <= values.min() <= values.max() < 2**width:
        raise ValueError(f"{values.min()} to {values.max()}: do not fit {width} bits")
    whole = width // 8
    by_bytes = values.view(np.uint8).reshape(-1, 8)[:, :whole].tobytes()
    places = np.arange(8 * whole, width)
    by_bits = (values[:, None] >> places & 1).astype(np.uint8)
    return by_bytes + np.packbits(by_bits, bitorder="little").tobytes()


def unpack(content: bytes | memoryview, count: int, width: int) -> np.ndarray:
    """The int64 [count] that were packed.

    Raises:
        ValueError: they take another number of bytes.
    """
    if len(content) != packed_bytes(count, width):
        raise ValueError(f"{len(content)} bytes are not {count} integers of {width} bits")
    whole, rest = divmod(width, 8)
    values = np.zeros(count, "<i8")
    data = np.frombuffer(content, np.uint8)
    values.view(np.uint8).reshape(-1, 8)[:, :whole] = data[: count * whole].reshape(count, whole)
    bits = np.unpackbits(data[count * whole :], count=count * rest, bitorder="little")
    for place, bit in enumerate(bits.reshape(count, rest).T, 8 * whole):
        values |= bit.astype(np.int64) << place
    return values
