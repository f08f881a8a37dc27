"""The gRPC face of the engine.

`server` listens, loads, serves and drains, `listen` is its port and TLS; `servicer` implements
gptjet.v1.TextGeneration; `interceptors` make every RPC end in one status and one log line; `status`
is the table from our errors to gRPC's; `convert` translates between messages and the engine's
types; `text` tokenizes without blocking the event loop; `wire` finds what is wrong with bytes that
are no message; `health` answers probes.
"""
