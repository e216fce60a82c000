"""`evaluate --media`: the figures of a model on recorded sound, run as a session would serve it."""
