"""`/metrics` says what was done, in the words of the answers themselves."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, disable_created_metrics, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from support.serving import hello, served

from pixtral_cli.server.metrics import PER_TOKEN, Metrics, QuickHistogram


@pytest.fixture(scope="module")
def server():
    with served() as server:
        yield server


def samples(server):
    """Every sample by its name, labels in brackets."""
    response = server.open("/metrics")
    assert response.headers["Content-Type"].startswith("text/plain; version=")
    families = text_string_to_metric_families(response.read().decode())
    return {
        sample.name + "".join(f"[{value}]" for value in sample.labels.values()): sample.value
        for family in families
        for sample in family.samples
    }


def grown(server, act):
    """What `act` gives, and by how much it made each sample grow."""
    before = samples(server)
    result = act()
    after = samples(server)
    return result, {name: value - before.get(name, 0) for name, value in after.items()}


def test_tokens_are_counted_as_the_answers_usage_counts_them(server):
    def act():
        return [server.json("/v1/chat/completions", hello(max_tokens=6, ignore_eos=True))["usage"] for _ in range(2)]

    usages, growth = grown(server, act)
    assert growth["pixtral_prompt_tokens_total"] == sum(usage["prompt_tokens"] for usage in usages)
    assert growth["pixtral_generated_tokens_total"] == 12
    cached = sum(usage["prompt_tokens_details"]["cached_tokens"] for usage in usages)
    assert growth["pixtral_cached_tokens_total"] == cached


def test_times_are_measured_once_for_each_token(server):
    _, growth = grown(server, lambda: server.json("/v1/chat/completions", hello(max_tokens=6, ignore_eos=True)))
    assert growth["pixtral_time_to_first_token_seconds_count"] == 1
    assert growth["pixtral_time_per_token_seconds_count"] == 5
    assert 0 < growth["pixtral_time_to_first_token_seconds_sum"] < 60


def test_what_runs_and_what_it_holds_is_seen_while_it_runs(server):
    stream = server.events(max_tokens=2000, ignore_eos=True)
    next(stream)
    during = samples(server)
    stream.close()
    assert (during["pixtral_requests_running"], during["pixtral_requests_queued"]) == (1, 0)
    assert 0 < during["pixtral_kv_cache_used_ratio"] < 1
    for _ in range(200):
        if samples(server)["pixtral_requests_running"] == 0:
            break
    assert samples(server)["pixtral_kv_cache_used_ratio"] == 0


@pytest.mark.parametrize(
    ("path", "body", "kind", "request_label"),
    [
        ("/v1/chat/completions", hello(temperature=-1), "invalid_request", "[/v1/chat/completions][400]"),
        ("/v1/chat/completions", hello(model="another"), "not_found", "[/v1/chat/completions][404]"),
        ("/never/heard/of/1234", None, "not_found", "[other][404]"),
    ],
)
def test_errors_are_counted_by_kind_and_requests_by_route(server, path, body, kind, request_label):
    response, growth = grown(server, lambda: server.open(path, body))
    assert response.status >= 400 and growth[f"pixtral_errors_total[{kind}]"] == 1
    assert growth[f"pixtral_requests_total{request_label}"] == 1
    assert not any("1234" in name for name in growth)


class FullDriver:
    """What `Metrics` reads of a driver and its engine, with numbers that cannot be mistaken for each other."""

    waiting = 5

    engine = SimpleNamespace(
        running=3,
        table=SimpleNamespace(in_use=7, count=28),
        counters=SimpleNamespace(
            prompt_tokens=1100, cached_tokens=13, generated_tokens=17, proposed_tokens=23, accepted_tokens=11
        ),
        scheduler=SimpleNamespace(preemptions=19),
    )


def test_each_figure_of_the_engine_has_its_own_name():
    text = Metrics(FullDriver).exposition().decode()
    values = {sample.name: sample.value for family in text_string_to_metric_families(text) for sample in family.samples}
    assert {name.removeprefix("pixtral_"): value for name, value in values.items() if value} == {
        "requests_running": 3,
        "requests_queued": 5,
        "kv_cache_used_ratio": 0.25,
        "prompt_tokens_total": 1100,
        "cached_tokens_total": 13,
        "generated_tokens_total": 17,
        "proposed_tokens_total": 23,
        "accepted_tokens_total": 11,
        "preemptions_total": 19,
    }


def test_two_servers_in_one_process_count_apart():
    first, second = Metrics(FullDriver), Metrics(FullDriver)
    first.failed(408)
    assert b'pixtral_errors_total{kind="timeout"} 1.0' in first.exposition()
    assert b"timeout" not in second.exposition()


@given(st.lists(st.sampled_from(PER_TOKEN) | st.floats(0, 4), max_size=30))
def test_the_quick_histogram_says_what_prometheus_own_says(amounts):
    disable_created_metrics()
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    quick, known = QuickHistogram("a", "b", PER_TOKEN), Histogram("a", "b", buckets=PER_TOKEN, registry=theirs)
    ours.register(quick)
    for amount in amounts:
        quick.observe(amount)
        known.observe(amount)
    assert generate_latest(ours) == generate_latest(theirs)
