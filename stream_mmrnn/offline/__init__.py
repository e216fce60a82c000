"""Recordings again: replay, the player, `diff`, and conversion to other formats."""
