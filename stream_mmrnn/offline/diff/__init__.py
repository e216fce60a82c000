"""`stream-mmrnn diff`: predictions over one recording beside others, or beside its labels."""
