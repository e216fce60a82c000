"""The command's door. Imports the rest only when called: each child process looks at this file when it starts."""

_ENDED_BY_SIGNALS = ("live", "record")
"""Verbs that a signal ends with exit code 0, from their first moment to their last."""


def main() -> None:
    import sys

    from stream_mmrnn.core import signals

    watched = sys.argv[1:2] and sys.argv[1] in _ENDED_BY_SIGNALS
    if watched:
        signals.ENDING.watch()  # before the imports, which take longer than many an impatient finger
    try:
        from stream_mmrnn.cli.app import run

        run()
    finally:
        if watched:
            signals.ignore()  # all is done and said; Python itself still takes its time to end


if __name__ == "__main__":
    main()
