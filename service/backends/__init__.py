"""Backends: models behind the engine's `Backend` protocol.

`factory` is the table of them and the one way to load one; `mock` can be calculated by hand,
`huggingface` runs transformers' own model; `device` chooses device and dtype or says why not.
"""
