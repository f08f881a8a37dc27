"""Finds tile shapes on the present card and writes them into the kernels' table.

python -m gptjet.benchmarks.tune --dry-run      what would be tried, without a card
python -m gptjet.benchmarks.tune                on a card: about a minute a launch
"""
