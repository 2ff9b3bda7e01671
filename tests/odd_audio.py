"""Audio files as no recorder should write them."""

from __future__ import annotations

import io
import os
import struct
from pathlib import Path

import numpy as np
import soundfile

PCM, FLOAT = 1, 3
TONE = (0.2 * np.sin(np.arange(8000) / 7.0)).astype(np.float32)
"""Half a second at 16 kHz."""


def wav(
    samples: bytes, rate: int = 16000, channels: int = 1, bits: int = 16, kind: int = PCM, claimed: int = -1
) -> bytes:
    """A WAV file whose header says what it is told to."""
    frame = channels * bits // 8
    form = struct.pack("<HHIIHH", kind, channels, rate, min(rate * frame, 2**32 - 1), frame % 65536, bits)
    size = len(samples) if claimed < 0 else claimed
    body = b"fmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", size) + samples
    return b"RIFF" + struct.pack("<I", min(4 + len(body), 2**32 - 1)) + b"WAVE" + body


def flac(change: dict[int, int] | None = None) -> bytes:
    """A FLAC file; change: {offset: byte} of it."""
    buffer = io.BytesIO()
    soundfile.write(buffer, TONE, 16000, format="FLAC")
    data = bytearray(buffer.getvalue())
    for offset, value in (change or {}).items():
        data[offset] = value
    return bytes(data)


def contents() -> dict[str, bytes]:
    """Name -> bytes of files that say nothing, each in another way."""
    pcm = (TONE * 32767).astype("<i2").tobytes()
    floats = {"nan": [0.1, np.nan], "inf": [np.inf, 0.0], "minus_inf": [-np.inf, 0.1], "huge": [3e38, -3e38],
              "large": [1e30, -1e30]}
    found = {
        f"rate_{rate}.wav": wav(pcm, rate) for rate in (0, 1, 2, 999, 1_000_003, 2**31 - 1, 2**31, 2**32 - 1)
    }
    found |= {
        "no_channel.wav": wav(pcm, channels=0),
        "no_bits.wav": wav(pcm, bits=0),
        "odd_kind.wav": wav(pcm, kind=0x1234),
        "claims_more.wav": wav(pcm, claimed=2 * len(pcm)),
        "claims_huge.wav": wav(pcm, claimed=0x7FFE0000),
        "no_data.wav": wav(b""),
        "one_byte.wav": wav(b"x"),
        "truncated.wav": wav(pcm)[:700],
        "header_cut.wav": wav(pcm)[:30],
        "empty.wav": b"",
        "text.wav": b"not audio at all\n" * 50,
        "zeros.wav": bytes(5000),
        "truncated.flac": flac()[:-2000],
        "header_cut.flac": flac()[:20],
        "empty.flac": b"",
        "noise.flac": flac()[:200] + bytes(range(256)) * 20,
        "rate_0.flac": flac({18: 0, 19: 0, 20: 0x0F & flac()[20]}),
        "claims_huge.flac": flac({21: flac()[21] | 0x0F, 22: 0xFF, 23: 0xFF, 24: 0xFF, 25: 0xFF}),
        "cut.mp3": b"\xff\xfb\x90\x64" + bytes(100),
        "cut.ogg": b"OggS" + bytes(60),
        "sphere.sph": b"NIST_1A\n   1024\nsample_count -i 99999999999\nend_head\n".ljust(1024),
    }
    return found | {
        f"{name}.wav": wav(np.array(values * 4000, "<f4").tobytes(), bits=32, kind=FLOAT)
        for name, values in floats.items()
    }


def write_odd_files(folder: Path) -> list[Path]:
    """Write files that cannot be used, each for another reason; directories and links among them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in contents().items():
        (folder / name).write_bytes(data)
    (folder / "folder.wav").mkdir()
    (folder / "link.wav").symlink_to(folder / "nowhere.wav")
    (folder / "loop.wav").symlink_to(folder / "loop.wav")
    os.mkfifo(folder / "pipe.wav")
    (folder / "secret.wav").write_bytes(wav((TONE * 32767).astype("<i2").tobytes()))
    (folder / "secret.wav").chmod(0)
    names = [*sorted(path.name for path in folder.iterdir()), "absent.wav", "n" * 300 + ".wav"]
    if os.access(folder / "secret.wav", os.R_OK):  # root may read everything
        names.remove("secret.wav")
    return [folder / name for name in names]
