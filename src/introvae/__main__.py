"""`python -m introvae`, and what launchers start: `accelerate launch -m introvae fit ...`."""

import sys

from introvae.cli import main

if __name__ == "__main__":
    sys.exit(main())
