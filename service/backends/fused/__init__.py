"""The `fused` backend: our own forward pass under paged KV and continuous batching."""
