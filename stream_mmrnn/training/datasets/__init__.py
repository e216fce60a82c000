"""Loaders for published data sets, each in its published layout, from a folder or an archive; numpy, no torch.

    mnist         load(path, split) -> images, labels            idx files
    fsdd          load(path) -> recordings; two splits            spoken digits, WAV
    hapt          load(path) -> recordings; official split        motion, 50 Hz, labels
    switchboard   Switchboard(path).dialogues(ids), .splits()     words in time on two channels; voice(), spoken()
    timit         utterances(path, split)                         sentences with phones and words, SPHERE or WAV
    imdb          load(path, split) -> reviews                    aclImdb
    polarity      sentences(path), reviews(path)                  nltk's sentence_polarity and movie_reviews

All loaders check their input: missing or damaged data raise FileError. `files` and `audio` are shared helpers. Nothing
here downloads or caches.
"""

from stream_mmrnn.training.datasets import fsdd, hapt, imdb, mnist, polarity, switchboard, timit

__all__ = ["fsdd", "hapt", "imdb", "mnist", "polarity", "switchboard", "timit"]
