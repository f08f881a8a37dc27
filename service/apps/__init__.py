"""Applications on the gRPC service: they know its client and nothing else of ours."""
