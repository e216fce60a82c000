"""Offline: work on recordings. Replay them, compare the predictions of models over them, convert them."""
