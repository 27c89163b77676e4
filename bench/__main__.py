"""The entry to `python -m bench`, which says what to install where that is not done: the program is `bench.program`."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run the command that was typed."""
    try:
        from bench.program import cli
    except ImportError as missing:
        if os.environ.get("LOPT_TRACEBACK"):
            raise
        from lopt.core.installation import CHECKOUT

        advice = f'pip install -e "{CHECKOUT}[dev]"'
        if not (CHECKOUT / "bench").is_dir():  # lopt is another one than that which this folder belongs to
            advice = "install the lopt that it belongs to: in that checkout, pip install -e '.[dev]'"
        sys.exit(f"python -m bench measures a checkout that is installed with the extra 'dev' ({missing}): {advice}")
    cli(prog_name="python -m bench")


if __name__ == "__main__":
    main()
