"""Plots of a report say in words what they show."""

from __future__ import annotations

import matplotlib as mpl

from stream_mmrnn.training.report import _confusion

mpl.use("Agg")


def test_a_confusion_matrix_has_class_names_and_numbers() -> None:
    from matplotlib import pyplot as plt

    long = "a label of more letters than a plot has room for"
    figure = _confusion("label", {"confusion": [[191, 11], [2, 181]], "accuracy": 0.966}, ["shake", long], plt)
    [axes] = figure.axes
    assert [text.get_text() for text in axes.get_xticklabels()] == ["shake", "a label of more l…"]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["shake", "a label of more l…"]
    assert sorted(text.get_text() for text in axes.texts) == ["11", "181", "191", "2"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted (ticks)", "true")
    assert axes.get_title() == "What label takes for what: 96.6% right"
    plt.close(figure)
