"""`stream-mmrnn config`: the schema of the settings, what is wrong with a file of them, and which ones hold."""
