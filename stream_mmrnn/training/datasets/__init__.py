"""Loaders for published data sets, each in its published layout, from a folder or an archive; numpy, no torch.

    mnist         load(path, split) -> images, labels            idx files
    fsdd          load(path) -> recordings; two splits            spoken digits, WAV
    hapt          load(path) -> recordings; official split        motion, 50 Hz, labels
    switchboard   Switchboard(path).dialogues(ids), .splits()     words in time on two channels; voice(), spoken()
    timit         utterances(path, split)                         sentences with phones and words, SPHERE or WAV
    imdb          load(path, split) -> reviews                    aclImdb
    polarity      sentences(path), reviews(path)                  nltk's sentence_polarity and movie_reviews

They check what they read: what is missing or damaged is a FileError of one sentence. `files` and `audio` are what they
share. Nothing here downloads, caches or knows about features.
"""

from stream_mmrnn.training.datasets import fsdd, hapt, imdb, mnist, polarity, switchboard, timit

__all__ = ["fsdd", "hapt", "imdb", "mnist", "polarity", "switchboard", "timit"]
