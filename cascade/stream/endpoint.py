"""Endpoints of segments of speech: rules on decoded blanks, as sherpa-onnx and Kaldi have them.

A frame after the last token is silence. A segment ends at the end of a decoding step (a chunk; in mode look_ahead a
block), so that the same audio gives the same segments whatever packets it came in.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from cascade.config.options import ENCODER_FRAME_MS, ConfigError

LONGEST_SEGMENT = 30.0
"""Seconds: the full pass looks at a whole segment, its cost and memory grow with it."""


@dataclass(frozen=True)
class EndpointOptions:
    """Limits of a segment, in seconds.

    Raises:
      ConfigError: a value that is not positive, longest_segment above 30 s or not above late_pause.
    """

    silence_from_start: float = 2.4
    """A segment that has said nothing is dropped after this."""
    silence_after_speech: float = 1.2
    """A segment that has said something ends after this much silence."""
    late_pause: float = 0.4
    """In the second half of longest_segment this much silence is enough: better there than inside a word."""
    longest_segment: float = 20.0
    """A segment never grows beyond this."""

    def __post_init__(self) -> None:
        for option in fields(self):
            value = getattr(self, option.name)
            if not value > 0:
                raise ConfigError(f"{option.name} must be positive (seconds), got {value}")
        if not self.late_pause < self.longest_segment <= LONGEST_SEGMENT:
            raise ConfigError(
                f"longest_segment must lie between late_pause ({self.late_pause:g} s) and {LONGEST_SEGMENT:g} s, "
                f"got {self.longest_segment:g}"
            )


def find_endpoint(options: EndpointOptions, num_frames: int, last_token: int | None, step_frames: int) -> str | None:
    """Does the open segment end here?

    Args:
      num_frames: 40 ms frames of the segment so far.
      last_token: the frame of its last token, counted from the segment's start; None = it has said nothing.
      step_frames: frames the next decoding step may add.
    Returns:
      The rule that ends it: silence_from_start | silence_after_speech | late_pause | longest_segment; None: it goes on.
    """
    if last_token is None:
        if _last(num_frames, options.silence_from_start):
            return "silence_from_start"
    else:
        silence = num_frames - 1 - last_token
        if _last(silence, options.silence_after_speech):
            return "silence_after_speech"
        if _last(silence, options.late_pause) and _last(num_frames, options.longest_segment / 2):
            return "late_pause"
    if (num_frames + step_frames) * ENCODER_FRAME_MS > 1000 * options.longest_segment:
        return "longest_segment"
    return None


def _last(num_frames: int, seconds: float) -> bool:
    """True where so many frames last so long."""
    return num_frames * ENCODER_FRAME_MS >= 1000 * seconds
