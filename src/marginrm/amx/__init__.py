"""Kernels of our own for x86 processors with matrix tiles (AMX): attention over packed rows, and products."""
