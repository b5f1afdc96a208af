"""What is going on, for Prometheus: GET /metrics, under the names that vLLM's dashboards ask for.

Counts come from the engine when they are asked for; times from every request that ends.
"""

from collections.abc import Iterator

from fastapi import APIRouter
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector
from starlette.responses import Response

from miniphi.llm import LiveStream
from miniphi.server.dependencies import Service
from miniphi.server.service import ModelService

__all__ = ["Metrics", "router"]

router = APIRouter(tags=["server"])

_FIRST_S = (0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 640)
_TOKEN_S = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5, 5)
_WHOLE_S = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640, 1280)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)


@router.get("/metrics", summary="Counts and times for Prometheus")
async def metrics(service: Service) -> Response:
    """Return all metrics in Prometheus's text format."""
    assert isinstance(service.observer, Metrics)
    return Response(generate_latest(service.observer.registry), media_type=CONTENT_TYPE_LATEST)


class Metrics(Collector):
    """The metrics of one service."""

    def __init__(self, service: ModelService) -> None:
        self.registry = CollectorRegistry()
        self._service = service
        self._ended: dict[str, int] = {}

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            family = Histogram(f"vllm:{name}", text, ["model_name"], registry=self.registry, buckets=buckets)
            return family.labels(service.name)

        self._first_s = histogram("time_to_first_token_seconds", "Time to the first token", _FIRST_S)
        self._token_s = histogram("time_per_output_token_seconds", "Mean time of a token after the first", _TOKEN_S)
        self._whole_s = histogram("e2e_request_latency_seconds", "Time of a whole request", _WHOLE_S)
        self._prompt = histogram("request_prompt_tokens", "Prompt tokens of a request", _TOKENS)
        self._generated = histogram("request_generation_tokens", "Generated tokens of a request", _TOKENS)
        self.registry.register(self)

    def on_end(self, stream: LiveStream) -> None:
        """Take note of a request that has ended, whatever ended it."""
        usage, timings = stream.usage, stream.timings
        for reason in stream.finish_reasons or ("abort",):
            self._ended[reason] = self._ended.get(reason, 0) + 1
        self._prompt.observe(usage.prompt_tokens)
        self._generated.observe(usage.completion_tokens)
        self._whole_s.observe(timings.total_s)
        if timings.time_to_first_token_s is not None:
            self._first_s.observe(timings.time_to_first_token_s)
        if timings.completion_tokens_per_s:
            self._token_s.observe(stream.request.params.n / timings.completion_tokens_per_s)

    def collect(self) -> Iterator[Metric]:
        """Yield what the engine counts, as it is now."""
        stats = self._service.llm.driver.engine.stats
        num_blocks = stats.num_blocks_used + stats.num_blocks_free + stats.num_blocks_cached
        name = [self._service.name]
        for gauge, text, value in (
            ("num_requests_running", "Sequences that are being computed", stats.num_running),
            ("num_requests_waiting", "Sequences that wait for memory or a place", stats.num_waiting),
            (
                "kv_cache_usage_perc",
                "Share of the key/value cache in use; 1 is all of it",
                stats.num_blocks_used / num_blocks,
            ),
        ):
            family = GaugeMetricFamily(f"vllm:{gauge}", text, labels=["model_name"])
            family.add_metric(name, value)
            yield family
        for counter, text, count in (
            ("prompt_tokens", "Prompt tokens computed or found", stats.num_prompt_tokens),
            ("generation_tokens", "Tokens generated", stats.num_generated_tokens),
            ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache", stats.num_prompt_tokens),
            ("prefix_cache_hits", "Prompt tokens found in the prefix cache", stats.num_reused_tokens),
            ("num_preemptions", "Sequences that lost their blocks for a while", stats.num_preemptions),
            ("spec_decode_num_draft_tokens", "Tokens guessed ahead", stats.num_drafted_tokens),
            ("spec_decode_num_accepted_tokens", "Guessed tokens that came true", stats.num_accepted_tokens),
        ):
            total = CounterMetricFamily(f"vllm:{counter}", text, labels=["model_name"])
            total.add_metric(name, count)
            yield total
        ended = CounterMetricFamily(
            "vllm:request_success", "Answers by reason", labels=["model_name", "finished_reason"]
        )
        for reason, count in self._ended.items():
            ended.add_metric([*name, reason], count)
        yield ended
