"""The same checkpoint and lengths through other libraries on this machine, interleaved with ours.

`python -m gptjet.benchmarks.peers setup` makes their environments, `run` compares. Each peer is a
process of its own (`worker`), in a virtual environment of its own where its versions need one.
"""
