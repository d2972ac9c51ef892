"""Benchmarks: what an append and a read cost, beside what else there is."""
