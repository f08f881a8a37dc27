"""`make gpu-evidence`: everything that only a GPU can show, in one command and one result file.

`stages` says what is run, `runner` runs each stage in a process of its own, `__main__` is the
command. Parity comes first, and what is red is given no times. `kernel_cases` and `kernel_measure`
hold single kernels to their references and time them; whole models are measured by modules of the
service. `bars` judges the goals, and `modelled` says what the shares mean on cards not at hand.
"""
