"""The bars of the CPU path, measured in one command: ours beside its peers on three checkpoints.

`python -m gptjet.benchmarks.cpu_bars --out FILE.jsonl` makes the checkpoints, runs every race and
prints each bar beside what was measured. It needs the peers' environments: see `peers`.
"""
