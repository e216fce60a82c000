"""`stream-mmrnn devices`: which cameras and microphones there are, and which is which."""
