"""The console script's way in: next to nothing is imported before Ctrl-C is minded."""

import sys

INTERRUPTED = 130


def main() -> None:
    """Entry point of the console script."""
    try:
        from step1x_edit.apps.cli import main as carry_out

        carry_out()
    except KeyboardInterrupt:  # while the command line itself was imported
        sys.stderr.write("step1x: interrupted\n")
        sys.exit(INTERRUPTED)
