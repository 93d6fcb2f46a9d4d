"""Shared by all benchmarks: texts, workloads, rates, and the processes in which contenders and servers run."""
