"""What the server counts, in Prometheus' format."""

from __future__ import annotations

from dso.serve.engine import Engine

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)


class Metrics:
    """The counters of one server; gauges ask the engine."""

    def __init__(self, engine: Engine):
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self.registry = CollectorRegistry()
        self.requests = Counter(
            "dso_requests", "Requests answered, by path and status", ["path", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "dso_request_seconds", "Time to the end of an answer", ["path"], buckets=SECONDS, registry=self.registry
        )
        self.first = Histogram(
            "dso_first_token_seconds", "Time to the first token", buckets=SECONDS, registry=self.registry
        )
        self.prompt = Counter("dso_prompt_tokens", "Tokens of prompts taken in", registry=self.registry)
        self.written = Counter("dso_generated_tokens", "Tokens written", registry=self.registry)
        self.left = Counter("dso_clients_left", "Requests whose client went away", registry=self.registry)
        running = Gauge("dso_running", "Answers that are being written", registry=self.registry)
        running.set_function(lambda: engine.running)
        waiting = Gauge("dso_waiting", "Answers in the queue", registry=self.registry)
        waiting.set_function(lambda: engine.waiting)

    def text(self) -> tuple[bytes, str]:
        """The figures, and their content type."""
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

        return generate_latest(self.registry), CONTENT_TYPE_LATEST
