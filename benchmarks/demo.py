"""What a run of the demo ends with, and how long it takes, for README.md.

python benchmarks/demo.py --work FOLDER [--seed 1] [--write]
"""

from __future__ import annotations

import os
import subprocess

from figures import options, put
from workbench import Workbench

SESSION = """```console
$ make demo
…
{printed}
```

From one run of the demo on two cores without a GPU, the installation done: {seconds:.0f} s."""


def main() -> None:
    parser = options(__doc__, work=True)
    parser.add_argument("--seed", default="1")
    asked = parser.parse_args()
    bench = Workbench(asked.work)
    if bench.output("demo", "sft").exists():
        raise SystemExit(f"{bench.folder} holds a run already: give another --work")
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "env": {**os.environ, "COLUMNS": "96"}}
    seconds, printed = bench.run("demo", "--seed", asked.seed, **piped)
    lines = [line.rstrip() for line in printed.splitlines()]
    # The table of log losses and the figures below it, up to the position bias.
    first = next(number for number, line in enumerate(lines) if "log loss on" in line)
    last = next(number for number, line in enumerate(lines) if line.startswith("Position bias"))
    session = SESSION.format(printed="\n".join(lines[first:last]), seconds=seconds)
    print(session)
    if asked.write:
        put("session", session)


if __name__ == "__main__":
    main()
