"""The command `stream-mmrnn`, one file for each verb or group of verbs."""
