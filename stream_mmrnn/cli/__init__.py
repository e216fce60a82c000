"""Cli: the `stream-mmrnn` command; one file per verb, or a few that belong together."""
