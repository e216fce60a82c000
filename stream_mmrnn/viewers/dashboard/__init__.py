"""The live page: what the system sees and says, in a browser on the same machine."""
