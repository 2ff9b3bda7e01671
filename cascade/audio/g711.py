"""Telephone audio, ITU-T G.711: a byte for a sample, at 8 kHz."""

from __future__ import annotations

import io
from functools import cache

import numpy as np
import soundfile

G711_RATE = 8000
LAWS = {"ulaw": "ULAW", "alaw": "ALAW"}


@cache
def _table(law: str) -> np.ndarray:
    """(256,) int16, what each byte says."""
    file = io.BytesIO(bytes(range(256)))
    return soundfile.read(file, dtype="int16", samplerate=G711_RATE, channels=1, format="RAW", subtype=LAWS[law])[0]


def decode_g711(data: bytes, law: str) -> np.ndarray:
    """(num_samples,) int16 samples of these bytes; `law` is one of LAWS."""
    return _table(law)[np.frombuffer(data, np.uint8)]
