"""Finds tile shapes and routes on the present card and writes them into the kernels' tables.

python -m gptjet.benchmarks.tune --dry-run      what would be tried, without a card
python -m gptjet.benchmarks.tune                on a card: about a minute a launch, then routes
python -m gptjet.benchmarks.tune --only routes  a minute a weight type, with the present tiles
"""
