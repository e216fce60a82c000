"""`stream-mmrnn diff`: compare the predictions of two models over one recording, or of one model with its labels."""
