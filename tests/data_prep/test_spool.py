"""Spools: lines come back in their order, into one file or a folder of parts, and the waiting files vanish."""

from __future__ import annotations

import numpy as np
import pytest

from data_prep.export_rows import record
from data_prep.export_writer import Spool


def lines(number: int) -> list[str]:
    return [f'{{"id": {number}}}\n']


@pytest.mark.parametrize(("part", "segment"), [(500, 100), (7, 3), (1, 1), (4, 1000)])
def test_every_line_is_there_once_and_no_part_is_too_large(tmp_path, part, segment):
    spool = Spool(tmp_path, "sft", part=part, segment=segment)
    valid = np.arange(40) % 5 == 0
    for start in range(0, 40, 4):
        numbers = range(start, start + 4)
        spool.add(b"".join(record(lines(n), lines(-n)) for n in numbers), 4)
    spool.close()
    assert len(list(tmp_path.glob("*.spool-*"))) == max(1, -(-40 // max(segment, 4)))
    counts = spool.divide(valid)
    assert counts == {"train": 64, "valid": 8}
    assert not list(tmp_path.glob("*.spool-*"))
    expected = {
        "train": [text for n in range(40) if n % 5 for text in lines(n) + lines(-n)],
        "valid": [text for n in range(0, 40, 5) for text in lines(n)],
    }
    for split, wanted in expected.items():
        files = sorted((tmp_path / f"sft_{split}").glob("*")) or [tmp_path / f"sft_{split}.jsonl"]
        parts = [file.read_text().splitlines(keepends=True) for file in files]
        assert [line for each in parts for line in each] == wanted
        assert all(0 < len(each) <= max(part, 2) for each in parts), "a battle's lines stay together"
        assert (len(files) > 1) == (len(wanted) > part)
        assert [f.name for f in files] == (
            [f"part-{n:05}.jsonl" for n in range(len(files))] if files[1:] else [files[0].name]
        )


def test_a_battle_without_a_line_is_kept_in_step(tmp_path):
    spool = Spool(tmp_path, "dpo_reward")
    spool.add(record(lines(1)) + record([]) + record(lines(3)), 3)
    spool.close()
    assert spool.divide(np.array([False, False, True])) == {"train": 1, "valid": 1}
    assert (tmp_path / "dpo_reward_train.jsonl").read_text() == lines(1)[0]
    assert (tmp_path / "dpo_reward_valid.jsonl").read_text() == lines(3)[0]
