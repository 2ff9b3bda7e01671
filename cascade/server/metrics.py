"""What the server counts, in Prometheus's text format."""

from __future__ import annotations

from cascade.server.worker import Failure, Result, Worker


class Metrics:
    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self.num_streams = self.num_rejected = self.num_segments = self.num_failures = 0

    def count(self, result: Result) -> None:
        """Count a text that goes to a client."""
        if isinstance(result, Failure):
            self.num_failures += 1
        else:
            self.num_segments += len(getattr(result, "segments", ()))

    def text(self) -> str:
        worker = self._worker
        rows = [
            ("streams", "gauge", "Streams in use.", worker.num_sessions),
            ("streams_limit", "gauge", "Streams at a time, at most.", worker.max_streams),
            ("streams_total", "counter", "Streams so far.", self.num_streams),
            ("rejected_total", "counter", "Connections refused because all streams were in use.", self.num_rejected),
            ("segments_total", "counter", "Segments of speech that became final.", self.num_segments),
            ("failures_total", "counter", "Results that were errors.", self.num_failures),
            ("audio_seconds_total", "counter", "Seconds of audio decoded.", round(worker.audio_seconds, 3)),
            ("compute_seconds_total", "counter", "Seconds that the worker was busy.", round(worker.compute_seconds, 3)),
            ("rounds_total", "counter", "Rounds of the worker, a chunk of every busy stream each.", worker.num_rounds),
        ]
        return "".join(
            f"# HELP cascade_{name} {what}\n# TYPE cascade_{name} {kind}\ncascade_{name} {value}\n"
            for name, kind, what, value in rows
        )
