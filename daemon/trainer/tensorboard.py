"""Scalars as TensorBoard reads them, without its package: length-prefixed records with CRC-32C, protobuf inside."""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Mapping
from pathlib import Path

_CASTAGNOLI = 0x82F63B78


def _table() -> list[int]:
    table = []
    for byte in range(256):
        value = byte
        for _ in range(8):
            value = value >> 1 ^ (_CASTAGNOLI if value & 1 else 0)
        table.append(value)
    return table


_TABLE = _table()


def crc32c(data: bytes) -> int:
    """CRC-32 with Castagnoli's polynomial."""
    value = 0xFFFFFFFF
    for byte in data:
        value = _TABLE[(value ^ byte) & 0xFF] ^ value >> 8
    return value ^ 0xFFFFFFFF


class ScalarWriter:
    """Appends scalars to one events file in `folder`. An attempt has a file of its own; TensorBoard joins them."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"events.out.tfevents.{int(time.time())}.dropforge.{os.getpid()}"
        self._file = path.open("ab")
        self._record(_event(version=b"brain.Event:2"))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """One point of each curve; the file is whole after each call."""
        self._record(_event(step=step, scalars=scalars))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _record(self, data: bytes) -> None:
        length = struct.pack("<Q", len(data))
        self._file.write(length + _masked(length) + data + _masked(data))
        self._file.flush()


def _masked(data: bytes) -> bytes:
    """The checksum as TensorFlow stores it: rotated and offset, so that a checksum of checksums stays sound."""
    value = crc32c(data)
    return struct.pack("<I", ((value >> 15 | value << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _event(*, step: int = 0, version: bytes = b"", scalars: Mapping[str, float] | None = None) -> bytes:
    """tensorflow.Event: wall_time = 1, step = 2, file_version = 3, summary = 5."""
    message = b"\x09" + struct.pack("<d", time.time())
    if step:
        message += b"\x10" + _varint(step)
    if version:
        message += b"\x1a" + _sized(version)
    if scalars:
        # tensorflow.Summary: repeated value = 1 of tag = 1, simple_value = 2
        values = (
            b"\x0a" + _sized(name.encode()) + b"\x15" + struct.pack("<f", value) for name, value in scalars.items()
        )
        message += b"\x2a" + _sized(b"".join(b"\x0a" + _sized(value) for value in values))
    return message


def _sized(data: bytes) -> bytes:
    return _varint(len(data)) + data


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])
