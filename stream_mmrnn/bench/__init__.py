"""Benchmarks: one file a bench, on a harness (`measure`, `machine`, `roofline`, `report`) that all of them share."""
