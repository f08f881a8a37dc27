"""Histograms without locks."""

from __future__ import annotations

import threading

from prometheus_client import CollectorRegistry, Histogram

from gptjet.service.observability.tally import Tally


def test_a_value_on_a_bound_counts_as_up_to_it() -> None:
    tally = Tally((1, 2))
    tally.add_all((1, 1.5, 2, 2.5))
    assert tally.read() == ([("1.0", 1.0), ("2.0", 3.0), ("+Inf", 4.0)], 7.0)


def test_values_are_counted_in_parts_of_the_unit() -> None:
    tally = Tally((0.001, 0.5), unit=1e9)
    tally.add(1_000_000)
    tally.add(1_000_001)
    assert tally.read() == ([("0.001", 1.0), ("0.5", 2.0), ("+Inf", 2.0)], 0.002000001)


def test_it_is_what_prometheus_client_makes_of_the_same_values() -> None:
    bounds, values = (0.005, 0.1, 4096.0), (0.0, 0.005, 0.0051, 0.1, 7.0, 9e9)
    registry = CollectorRegistry()
    theirs = Histogram("x", "x", buckets=bounds, registry=registry)
    ours = Tally(bounds)
    for value in values:
        theirs.observe(value)
        ours.add(value)
    buckets, total = ours.read()
    (family,) = registry.collect()
    expected = [
        (sample.labels["le"], sample.value)
        for sample in family.samples
        if sample.name == "x_bucket"
    ]
    assert buckets == expected
    assert total == registry.get_sample_value("x_sum")


def test_a_reader_beside_the_writer_never_sees_counts_that_fall() -> None:
    tally, stop = Tally((1, 2, 3)), threading.Event()

    def write() -> None:
        while not stop.is_set():
            tally.add_all((0, 1, 2, 3, 4))

    writer = threading.Thread(target=write)
    writer.start()
    try:
        last = 0.0
        for _ in range(2000):
            buckets, _ = tally.read()
            counts = [count for _, count in buckets]
            assert counts == sorted(counts)
            assert counts[-1] >= last
            last = counts[-1]
    finally:
        stop.set()
        writer.join()
    assert last > 0
