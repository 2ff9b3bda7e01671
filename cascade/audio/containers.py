"""Whether an audio file is whole and one recording, told from its bytes.

libsndfile takes a file that was cut short as a shorter one, reads only the first of several recordings that were put
one behind the other, and guesses the length of an MP3 that does not say it. What such a file holds beyond that would be
lost without a word.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

_UNKNOWN_BYTES = 0x7FFF0000  # pipes write sizes from here on (or 0) for "unknown"
_NARROW = (b"RIFF", b"FORM", b".snd", b"dns.")  # sizes of 32 bits
_LARGEST_OGG_PAGE = 65307
_FLAC_START = (b"fLaC\x00\x00\x00\x22", b"fLaC\x80\x00\x00\x22")  # and the header of its first block
_W64_DATA = b"data" + bytes.fromhex("f3acd3118cd100c04f8edb8a")
_PADDING = 4096
_BEGINNING = re.compile(
    rb"(RIFF|RF64).{4}WAVE|riff\x2e\x91\xcf\x11|\.snd\x00\x00.{2}|dns\..{2}\x00\x00|NIST_1A\n", re.DOTALL
)
_SEVERAL = "several {} one behind the other, only the first can be read: encode it again"
_MP3_SLACK = 10_000  # samples: delay and padding, which players cut off, are at most 2 x 4095, and a frame has 1152
_MP3_RATES = (44100, 48000, 32000)
_MP3_KBITS = {  # by (MPEG 1?, layer)
    (True, 1): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}


def check_is_whole(path: Path) -> None:
    """
    Raises:
      ValueError: a file cut short, or one with several recordings (WAV, RF64, W64, AIFF, AU, SPHERE, Ogg, FLAC).
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(12)
        if head[:4] == b"OggS":
            _check_ogg(path, file, size)
        elif head[:4] == b"fLaC":
            _check_flac(path, file)
        elif (declared := _declared_bytes(file, head)) is not None:
            available = size - file.tell()
            if declared == 0 < available:
                raise ValueError(
                    f"{path}: its header declares no samples, but {available} bytes follow (written to a pipe?): "
                    "encode it again"
                )
            if 0 < declared < available:
                _check_rest(path, file, file.tell() + declared, size, declared)
            if available < declared < (_UNKNOWN_BYTES if head[:4] in _NARROW else _UNKNOWN_BYTES << 32):
                raise ValueError(f"{path}: truncated audio, {available} of the {declared} bytes its header declares")


def _check_rest(path: Path, file: BinaryIO, end: int, size: int, declared: int) -> None:
    """Behind the samples lie tags or padding: no second recording, and not more of the first one."""
    file.seek(0)
    is_riff = file.read(4) in (b"RIFF", b"RF64")
    file.seek(end)
    rest = file.read(_PADDING)
    if _BEGINNING.search(rest):
        raise ValueError(f"{path}: {_SEVERAL.format('recordings')}")
    name = rest[declared % 2 :][:4]
    is_chunk = name.isascii() and name.decode().isprintable()
    if is_riff and size - end > _PADDING and not is_chunk and any(rest):
        raise ValueError(
            f"{path}: its header declares {declared} bytes of samples, and {size - end} more follow (was the recording "
            "broken off?): encode it again"
        )


def check_mp3_length(path: Path, num_samples: int) -> None:
    """
    Args:
      num_samples: of one channel, as libsndfile counts them.
    Raises:
      ValueError: the frames of the MP3 hold another number.
    """
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        frames = list(_mp3_frames(data))
    if frames and abs(sum(frame.num_samples for frame in frames) - num_samples) > _MP3_SLACK:
        seconds = sum(frame.num_samples for frame in frames) / frames[0].rate
        raise ValueError(
            f"{path}: truncated audio, or several MP3s in one file, or one without its length: its header says "
            f"{num_samples / frames[0].rate:.1f} s, {seconds:.1f} s are there; encode it again"
        )


def _declared_bytes(file: BinaryIO, head: bytes) -> int | None:
    """Bytes of samples that the header declares, the file left where they begin; None: another format, or not said."""
    kind, form = head[:4], head[8:]
    if kind in (b"RIFF", b"RF64") and form == b"WAVE":
        return _chunk(file, b"data", "little")
    if kind == b"FORM" and form in (b"AIFF", b"AIFC"):
        return _chunk(file, b"SSND", "big")
    if kind in (b".snd", b"dns."):
        order: Literal["big", "little"] = "big" if kind == b".snd" else "little"
        file.seek(int.from_bytes(head[4:8], order))
        return int.from_bytes(form, order)
    if kind == b"riff":
        file.seek(40)  # two GUIDs and the file's size
        while len(chunk := file.read(24)) == 24:  # a GUID, and a size that counts it
            length = int.from_bytes(chunk[16:], "little") - 24
            if chunk[:16] == _W64_DATA:
                return length
            if length < 0:
                return None
            file.seek(length + -length % 8, 1)
    if kind == b"NIST":
        return _sphere_bytes(file)
    return None


def _chunk(file: BinaryIO, wanted: bytes, order: Literal["big", "little"]) -> int | None:
    """The size of the samples' chunk; in RF64 it stands in the chunk ds64."""
    large = None
    while len(chunk := file.read(8)) == 8:
        length = int.from_bytes(chunk[4:], order)
        if chunk[:4] == wanted:
            return large if large is not None and length == 0xFFFFFFFF else length
        start = file.tell()
        if chunk[:4] == b"ds64":
            large = int.from_bytes(file.read(16)[8:], "little")
        file.seek(start + length + length % 2)
    return None


def _sphere_bytes(file: BinaryIO) -> int | None:
    file.seek(8)
    try:
        length = int(file.read(8))
        file.seek(0)
        fields = [line.split() for line in file.read(min(length, 1 << 20)).decode("ascii", "replace").splitlines()]
        values = {words[0]: words[2] for words in fields if len(words) == 3}
        file.seek(length)
        return int(values["sample_count"]) * int(values["channel_count"]) * int(values["sample_n_bytes"])
    except (ValueError, KeyError):
        return None  # libsndfile says what it thinks of this header


def _check_ogg(path: Path, file: BinaryIO, size: int) -> None:
    """The last page has the end-of-stream flag, and no page begins another stream once one has begun to speak."""
    file.seek(max(0, size - _LARGEST_OGG_PAGE))
    tail = file.read()
    page = tail[max(0, tail.rfind(b"OggS")) :]  # 27 bytes, the number of segments last; their sizes; they
    if not (len(page) > 27 and page[5] & 4 and len(page) >= 27 + page[26] + sum(page[27 : 27 + page[26]])):
        raise ValueError(f"{path}: truncated audio, the Ogg stream has no whole last page")
    file.seek(0)
    began = False
    while len(header := file.read(27)) == 27 and header[:4] == b"OggS":
        if began and header[5] & 2:
            raise ValueError(f"{path}: {_SEVERAL.format('Ogg streams')}")
        began = began or not header[5] & 2
        file.seek(sum(file.read(header[26])), 1)


def _check_flac(path: Path, file: BinaryIO) -> None:
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if any(data.find(start, 8) >= 0 for start in _FLAC_START):
            raise ValueError(f"{path}: {_SEVERAL.format('FLAC files')}")


class _Mp3Frame(NamedTuple):
    kind: tuple[int, int, int]
    """Version, layer, sampling rate: alike in all frames of a recording."""
    num_bytes: int
    num_samples: int
    rate: int


def _mp3_frame(data: mmap.mmap, place: int) -> _Mp3Frame | None:
    """The frame whose four bytes of header stand here (ISO 11172-3, 2.4.1.3); None: no header."""
    head = int.from_bytes(data[place : place + 4], "big")
    version, layer = head >> 19 & 3, 4 - (head >> 17 & 3)  # versions: 3 is MPEG 1, 2 MPEG 2, 0 MPEG 2.5
    bits, rates = head >> 12 & 15, head >> 10 & 3
    if head >> 21 != 0x7FF or version == 1 or layer == 4 or bits in (0, 15) or rates == 3:
        return None
    rate = _MP3_RATES[rates] >> (0 if version == 3 else 1 if version == 2 else 2)
    bit_rate, padding = 1000 * _MP3_KBITS[version == 3, layer][bits - 1], head >> 9 & 1
    num_samples = 384 if layer == 1 else 576 if layer == 3 and version != 3 else 1152
    slot = 4 if layer == 1 else 1
    num_bytes = (num_samples // 8 * bit_rate // rate // slot + padding) * slot
    return _Mp3Frame((version, layer, rate), num_bytes, num_samples, rate)


def _mp3_frames(data: mmap.mmap) -> Iterator[_Mp3Frame]:
    """The frames of an MP3; tags, rubbish between them and a last one that is cut off are left out."""
    place, kind, in_step = 0, None, False
    while 0 <= place < len(data) - 4:
        if data[place : place + 3] == b"ID3":
            size = data[place + 6 : place + 10]  # seven bits in each byte
            place += 10 + sum((byte & 127) << shift for byte, shift in zip(size, (21, 14, 7, 0), strict=True))
            in_step = False
            continue
        frame = _mp3_frame(data, place)
        end = place + frame.num_bytes if frame else 0
        if frame is None or (kind not in (None, frame.kind)) or end > len(data) or not (
            in_step or end == len(data) or ((after := _mp3_frame(data, end)) and after.kind == frame.kind)
        ):
            place, in_step = data.find(b"\xff", place + 1), False
            continue
        kind, in_step = frame.kind, True
        if not _is_index(data[place : place + 200]):
            yield frame
        place = end


def _is_index(frame: bytes) -> bool:
    """A first frame that holds lengths instead of sound."""
    return any(frame.find(word, 4, 48) >= 0 for word in (b"Xing", b"Info", b"VBRI"))
