"""Conversions for other programs and formats: Foxglove, Rerun, Triton, XDF, and plain files."""
