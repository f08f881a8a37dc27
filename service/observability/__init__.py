"""Metrics for Prometheus, spans for OpenTelemetry, and the dashboard and alerts that go with them.

Everything here watches: it takes what the engine and the RPCs report and keeps nothing back from
them. What is off is not imported.
"""
