"""Entry point of the command. It imports the rest only when called, because each child process imports this file."""

_ENDED_BY_SIGNALS = ("live", "record")
"""Verbs that end with exit code 0 at a signal, at any moment."""


def main() -> None:
    import sys

    from stream_mmrnn.core import signals

    watched = sys.argv[1:2] and sys.argv[1] in _ENDED_BY_SIGNALS
    if watched:
        signals.ENDING.watch()  # before the imports, which are slow enough for a Ctrl-C to arrive
    try:
        from stream_mmrnn.cli.app import run

        run()
    finally:
        if watched:
            signals.ignore()  # all work is done, but Python takes a while to exit


if __name__ == "__main__":
    main()
