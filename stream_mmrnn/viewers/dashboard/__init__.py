"""The live page: the state of a session in a browser, its web server, and what the other viewers share with it."""
