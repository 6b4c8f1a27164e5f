import subprocess
import sys
from pathlib import Path

import pytest

from common.console import duration

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("encoding", ["ascii", "gbk", "cp1252", "utf-8"])
def test_any_text_is_printed_on_any_terminal(encoding):
    code = (
        "import sys; from common.console import make_output_safe; make_output_safe()\n"
        "print('verdict → ☃ 你好 \\ud83d'); print('note ☃', file=sys.stderr)\n"
        "from rich.console import Console; from rich.table import Table\n"
        "table = Table('☃'); table.add_row('你 → ü'); Console(width=40).print(table)\n"
    )
    environment = {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(b"verdict ") and done.stderr.startswith(b"note ")


def test_a_time_of_any_length_is_shown():
    assert duration(4000) == "1:06:40"
    assert duration(float("inf")) == duration(1e9)
