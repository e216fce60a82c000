"""Recordings: MCAP files written, read, counted and repaired."""
