"""How long a start takes: `python benchmarks/startup.py --json startup.json`.

Seconds of whole processes, each fresh, in turns, medians: `introvae --help`, the imports, and `introvae fit` from the
call to its end after one step.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
import tempfile

from common import alternate, parser, report


def main() -> None:
    own = parser(__doc__).parse_args()
    introvae, rounds, number = [sys.executable, "-m", "introvae"], 3 if own.short else 5, itertools.count()
    with tempfile.TemporaryDirectory() as temporary:

        def fit() -> list[str]:
            return [*introvae, "fit", "--data", "digits", "--steps", "1", "--out", f"{temporary}/{next(number)}"]

        commands = {
            "python -c pass": lambda: [sys.executable, "-c", "pass"],
            "import torch": lambda: [sys.executable, "-c", "import torch"],
            "import introvae": lambda: [sys.executable, "-c", "import introvae"],
            "introvae --help": lambda: [*introvae, "--help"],
            "introvae fit --data digits --steps 1": fit,
        }
        runs = {
            name: lambda words=words: subprocess.run(words(), check=True, capture_output=True, cwd=temporary)
            for name, words in commands.items()
        }
        found = alternate(runs, rounds)
    report([{"case": name, "seconds": round(seconds, 3)} for name, seconds in found.items()], own.json)


if __name__ == "__main__":
    main()
