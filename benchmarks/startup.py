"""How long it takes until something happens: importing the package and printing the config, beside importing torch.

python -m benchmarks.startup
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

from benchmarks.timing import Contender, asked, in_turn, milliseconds, parser, plain, ratio, tell

COMMANDS = {
    "import torch": ["-c", "import torch"],
    "import wejepa": ["-c", "import wejepa"],
    "--print-config": ["-m", "wejepa.train.pretrain", "--print-config"],
    "import wejepa.model": ["-c", "import wejepa.model"],
    "import wejepa.train.loop": ["-c", "import wejepa.train.loop"],
}


def make_command(arguments: list[str]) -> Callable[[], Any]:
    return lambda: subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    args = asked(parser(__doc__))
    times = in_turn([Contender(name, make_command, (command,)) for name, command in COMMANDS.items()], args.repeats, warmup=1)
    rows = [[name, *milliseconds(t), f"{1 / ratio(times['import torch'], t):.2f}"] for name, t in times.items()]
    tell("Start of a process, wall time", ["", "median, ms", "10 to 90 %, ms", "times import torch"], rows, plain(times), args)


if __name__ == "__main__":
    main()
