"""What the compiler made of each GPU kernel for each card, without a card.

    python -m gptjet.benchmarks.kernels_report

Compiles every CompileCase of gptjet.kernels.gpu for the capabilities that it is for, in processes
of their own, and prints registers, shared memory, stack, occupancy, loads in flight and bytes.
"""
