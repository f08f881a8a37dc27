"""Triton kernels of a decode step for NVIDIA cards from sm_70 on, one module each.

Importing this package imports no Triton; a kernel's module does, and is imported where it is used.
"""
