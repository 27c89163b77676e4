"""The entry to the command line, `lopt` or `python -m lopt`: the program is in `lopt.cli.program`.

Nothing is imported before an interrupt is caught, so that Ctrl-C ends the process in silence at any time.
"""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run the command line and end the process, with status 130 after Ctrl-C."""
    try:
        from lopt.cli.program import run_program

        status = run_program()
        _flush()
    except KeyboardInterrupt:
        status = 130
    except ImportError as missing:
        if os.environ.get("LOPT_TRACEBACK"):
            raise
        from lopt.core.installation import advise

        print(  # noqa: T201
            f"lopt: the command line needs the extra 'train' ({missing}): {advise('train')}", file=sys.stderr
        )
        status = 1
    sys.exit(status)


def _flush() -> None:
    """Write what is still buffered, or give it up where nobody reads it any more."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


if __name__ == "__main__":
    main()
