"""`make gpu-evidence`: everything that only a GPU can show, in one command and one result file.

`stages` says what is run, `runner` runs each stage in a process of its own, `__main__` is the
command. Parity comes first, and a backend whose parity is red is given no times.
"""
