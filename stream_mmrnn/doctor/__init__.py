"""`stream-mmrnn doctor`: what of this machine a session can use, and what to do about the rest."""
