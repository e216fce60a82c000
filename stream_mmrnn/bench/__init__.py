"""Benchmarks of the other rooms, one file per benchmark, on one harness (`measure`, `machine`, `report`)."""
