"""The command's door. Imports the rest only when called: each child process looks at this file when it starts."""


def main() -> None:
    from stream_mmrnn.cli import run

    run()


if __name__ == "__main__":
    main()
