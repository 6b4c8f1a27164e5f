"""The reader of votes: a table on the disk in, one `Battle` after another out, at flat memory.

    reader = VoteReader(Path("train.csv"), labelled=True)
    for row, battle in reader:         # row 1 is the first after the header
        ...
    reader.rejected                    # the rows that were left out, each with its reason

A table may be a folder of parts, which are read in the order of their names; rows are counted in each part.
Which columns mean what: `data_prep.schemas`.
"""

from __future__ import annotations

import re
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from common.battle import VERDICTS, Battle, swap
from common.console import name_of
from common.errors import ArenaError
from data_prep.cells import (
    BadCell,
    BadVerdict,
    drawn_verdict,
    first_turns,
    fraction_of,
    is_formula,
    is_no,
    parse_id,
    winner_of,
)
from data_prep.schemas import (
    EXTRAS,
    KEYS,
    VERDICT_NAMES,
    advice_on,
    find_schema,
    missing_columns,
    no_such_column,
    renamed,
)
from data_prep.tables import BrokenRow, Table, open_tables

# The share of bad rows up to which a table is read: of votes, and of battles to answer, where every row that is left
# out costs a line of the submission.
_MOST_BAD, _MOST_UNREAD = 0.01, 0.5
_UNWRITABLE = re.compile("[\0\ud800-\udfff]")
# Bad rows that, more than half of those read so far, end the reading: they wait in memory for the audit.
_HOPELESS = 10_000
_SHOWN = 5
_SAMPLE = 64  # rows whose cells show how the table is written
_IMAGES = ("image", "images")
_MODELS = re.compile("gpt|claude|gemini|llama|qwen|mi[sx]tral|deepseek|prometheus|gemma", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Rejected:
    """A row that was left out; `row` counts data rows from 1, the header is not one; `before` the battles before it."""

    file: str
    row: int
    id: str | None
    reason: str
    before: int = field(default=0, compare=False)

    @property
    def kind(self) -> str:
        """The reason without what belongs to this row alone."""
        return re.sub(r"\d+", "#", self.reason.split(": ")[0])


class VoteReader:
    """The battles of one table of votes, streamed; iterating again reads the file again.

    `labelled`: every row must have a verdict; otherwise verdicts are read where they are valid. `columns` are the
    table's own names for ours, as --columns gives them. Raises ArenaError for a file that is not a table of votes or
    that lacks columns.
    """

    def __init__(self, path: Path, *, labelled: bool, columns: Mapping[str, str] | None = None):
        """Open the table and look at its first rows."""
        self.path, self.labelled, self._given = Path(path), labelled, dict(columns or {})
        self.rejected: list[Rejected] = []
        self.rows_read = 0
        self.formulas = 0  # ids that a spreadsheet would run
        self._verdicts: Counter[str | None] = Counter()
        self._not_anonymous = self._shared = 0
        self._remedies: dict[str, str] = {}  # by kinds of reasons
        self._tables = open_tables(self.path)
        self.parts = [table.path for table in self._tables]  # the files that are read, in their order
        self._sizes = [path.stat().st_size for path in self.parts]
        self._part = 0  # which of them is being read
        first = self._tables[0]
        self._named = renamed(first.columns, self._given, labelled=labelled, where=f"{first.path} header")
        self.columns = columns = self._ours(first)
        schema = find_schema(columns)
        found = set(columns)
        extras = (*EXTRAS, *(KEYS if schema.id == "question_id" else ()))
        extras += ("winner",) if schema.verdict_format == "one-hot" else ()
        extras = tuple(name for name in dict.fromkeys(extras) if name in found)
        for table in self._tables:
            columns = self._ours(table)
            missing = missing_columns(schema, columns, labelled=labelled)
            if missing := missing or [name for name in (*schema.columns, *extras) if name not in set(columns)]:
                raise ArenaError(
                    f"lacks {len(missing)} column(s) {missing}; found {columns[:30]}",
                    where=f"{table.path} header",
                    remedy=advice_on(schema, columns, missing),
                )
        self._names = (*schema.columns, *extras)
        self._extras = {name: len(schema.columns) + at for at, name in enumerate(extras)}
        self._schema = schema.decided(self._sample(self._names))
        # Several votes on a question of MT-bench share its question_id: then ids are made of all that differs.
        self._keys = [self._names.index(name) for name in KEYS if name in extras]
        self._repeats: bool | None = None if self._keys and schema.id == "question_id" else False
        self._refuse_other_votes(found)

    @property
    def has_verdicts(self) -> bool:
        """Whether the table has all columns of a verdict."""
        return self._schema.verdict_format is not None

    @property
    def is_plain(self) -> bool:
        """Whether prompt and responses are plain texts, not lists of turns."""
        return self._schema.is_plain

    @property
    def is_wsdm(self) -> bool:
        """Whether this is a test set of the WSDM Cup, whose submission is `id,winner`."""
        return self._schema.is_plain and "scored" in self.columns

    @property
    def read_as(self) -> str:
        """How the table is read, in one line."""
        how = self._schema.described()
        return f"{how['texts']}; verdicts: {how['verdicts']}; ids: {how['ids']}"

    @property
    def facts(self) -> dict[str, Any]:
        """How the table is read, for the audit; counts and ids are known when it was read to its end."""
        made = {"ids": ", ".join(self._names[at] for at in (0, *self._keys))} if self._repeats else {}
        return {
            **self._schema.described(),
            **made,
            "columns": self._named,
            "verdict_counts": {verdict: self._verdicts[verdict] for verdict in VERDICTS},
            "verdicts_of_shares": self._shared,
            "not_anonymous": self._not_anonymous,
        }

    @property
    def share(self) -> float:
        """The part of the whole table, 0 to 1, that was read so far, by the sizes of its files."""
        at, sizes = self._part, self._sizes
        return (sum(sizes[:at]) + sizes[at] * self._tables[at].share) / max(sum(sizes), 1)

    def __iter__(self) -> Iterator[tuple[int, Battle]]:
        """Yield (row number in its file, battle) in the files' order; bad rows go to `rejected`.

        Raises ArenaError at once for a row without exactly one winner, and at the end for an id that comes twice, when
        more than one row and more than 1 % of the rows are bad (half, where verdicts are not needed), or when no row
        is left.
        """
        if self._repeats is None:
            self._repeats = self._has_repeats()
        self.rejected, self.rows_read, self.formulas, self._not_anonymous, self._shared = [], 0, 0, 0, 0
        self._verdicts.clear()
        hashes = array("q")  # of all ids, eight bytes each
        for where, number, cells in self._rows(self._names):
            self.rows_read += 1
            identity = self._identity(cells)
            try:
                if identity and _UNWRITABLE.search(identity):
                    shown, identity = identity, None
                    raise BadCell(f"{self._names[0]} {shown[:80]!a} holds a character that no CSV file keeps")
                if isinstance(cells, BrokenRow):
                    # Its first cell may be any scrap of text: it is reported, and not compared with other ids.
                    raise BadCell(cells.reason)
                if identity is None:
                    raise BadCell(f"has no {self._names[0]}")
                hashes.append(hash(identity))
                battle = self._battle(identity, cells)
            except BadCell as error:
                before = self.rows_read - 1 - len(self.rejected)
                self.rejected.append(bad := Rejected(str(where), number, identity, str(error), before))
                if error.remedy:
                    self._remedies[bad.kind] = error.remedy
                if len(self.rejected) >= _HOPELESS and 2 * len(self.rejected) > self.rows_read:
                    self._check_rejected()
            except BadVerdict as error:
                raise self._verdict_error(f"{where} row {number}", f"(id {name_of(identity)}) {error}") from None
            else:
                self.formulas += is_formula(battle.id)
                self._verdicts[battle.verdict] += 1
                yield number, battle
        self._refuse_repeats(hashes)
        self._check_rejected()

    def require_same_texts(self, test: VoteReader) -> None:
        """Raise ArenaError where one table has plain texts and the other turns: the judge would read raw JSON."""
        mine, its = self._schema, test._schema
        if mine.texts == its.texts and mine.is_plain != its.is_plain:
            raise ArenaError(
                f"holds {its.described()['texts']}, and the training table {mine.described()['texts']} ({self.path})",
                where=str(test.path),
                remedy="write both tables in one format; compare their first rows",
            )

    def _ours(self, table: Table) -> list[str]:
        """Return a table's columns by our names."""
        ours = {theirs: name for name, theirs in self._named.items()}
        return [ours.get(name, name) for name in table.columns if name in ours or name not in self._named]

    def _rows(self, names: Sequence[str]) -> Iterator[tuple[Path, int, Sequence[object] | BrokenRow]]:
        """Yield (file, row number in it, cells) of all parts."""
        names = [self._named.get(name, name) for name in names]
        for part, table in enumerate(self._tables):
            self._part = part
            for number, cells in enumerate(table.rows(names), 1):
                yield table.path, number, cells

    def _sample(self, names: Sequence[str]) -> list[Sequence[object]]:
        rows = (cells for _, _, cells in islice(self._rows(names), _SAMPLE))
        return [cells for cells in rows if not isinstance(cells, BrokenRow)]

    def _refuse_other_votes(self, found: set[str]) -> None:
        """Raise ArenaError for battles about images, and for verdicts of models."""
        images = [name for name in _IMAGES if name in found]
        judges = ["judge"] if self.labelled and "judge" in found else []
        if not images and not judges:
            return
        rows = self._sample((self._names[0], *images, *judges))
        if any(not (cell is None or cell == "" or cell == []) for cells in rows for cell in cells[1 : 1 + len(images)]):
            raise ArenaError(
                f"holds battles about images (column {images[0]}), and the judge reads texts alone",
                where=str(self.path),
                remedy="give battles about texts; rows whose image is empty are read",
            )
        by_models = [cells[-1] for cells in rows if judges and _MODELS.search(str(cells[-1]))]
        if 2 * len(by_models) > len(rows):
            raise ArenaError(
                f"holds verdicts of a model, not of people (column judge: {str(by_models[0])[:60]})",
                where=str(self.path),
                remedy="give the votes of people (of MT-bench the human split); to train on a model's all the same, "
                "remove the column judge",
            )

    def _identity(self, cells: Sequence[object] | BrokenRow) -> str | None:
        if self._schema.id is None:
            return str(self.rows_read)
        if isinstance(cells, BrokenRow):
            return parse_id(cells.first)
        identity = parse_id(cells[0])
        if identity is None or not self._repeats:
            return identity
        return ":".join((identity, *(parse_id(cells[at]) or "" for at in self._keys)))

    def _has_repeats(self) -> bool:
        seen: set[int] = set()
        rows = (cells for _, _, cells in self._rows(self._names[:2]) if not isinstance(cells, BrokenRow))
        for identity in (parse_id(cells[0]) for cells in rows):
            if identity is not None and hash(identity) in seen:
                return True
            seen.add(hash(identity))
        return False

    def _battle(self, identity: str, cells: Sequence[object]) -> Battle:
        schema, extras = self._schema, self._extras
        start = 1 if schema.id else 0
        end = start + len(schema.texts)
        texts = schema.read_texts(cells[start:end])
        if "turn" in extras and not schema.is_plain:
            texts = first_turns(texts, cells[extras["turn"]])
        prompts, responses_a, responses_b = texts
        if not len(prompts) == len(responses_a) == len(responses_b):
            raise BadCell(
                f"the numbers of turns differ: prompt {len(prompts)}, response_a {len(responses_a)}, "
                f"response_b {len(responses_b)}"
            )
        found = None
        if schema.verdict_format:
            try:
                found = schema.read_verdict(cells[end : end + len(schema.verdict)])
            except BadVerdict:
                if self.labelled:
                    raise
        said = winner_of(cells[extras["winner"]]) if "winner" in extras and isinstance(found, str) else None
        if said not in (None, found):
            if self.labelled:
                raise BadCell(f"winner says {said}, and {', '.join(schema.verdict)} say {found}")
            found = None
        texts = {name: cells[extras[name]] for name in ("language", "model_a", "model_b") if name in extras}
        named = {name: text.strip() or None for name, text in texts.items() if isinstance(text, str)}
        self._not_anonymous += "anony" in extras and is_no(cells[extras["anony"]])
        if isinstance(found, tuple):
            self._shared += 1
            verdict = drawn_verdict(found, identity)
            return Battle(identity, prompts, responses_a, responses_b, verdict, shares=found, **named)
        battle = Battle(identity, prompts, responses_a, responses_b, found, **named)
        # The side of what was chosen must tell nothing.
        return swap(battle) if schema.verdict_format == "chosen" and fraction_of(identity) < 0.5 else battle

    def _verdict_error(self, where: str, first: str) -> ArenaError:
        """Return the error for rows without a verdict: the first of them, how many there are, what they may be."""
        schema, bad, empty, rows = self._schema, 0, 0, 0
        for _, _, cells in self._rows((schema.texts[0], *schema.verdict)):
            rows += 1
            try:
                if not isinstance(cells, BrokenRow):
                    schema.read_verdict(cells[1:])
            except BadVerdict as error:
                bad, empty = bad + 1, empty + str(error).startswith("no winner")
        count = f"; {bad:,} of {rows:,} rows are so" if bad > 1 else ""
        if empty and empty == bad:
            remedy = (
                "such rows are most likely votes for 'both are bad', or battles that nobody judged: make the first "
                "kind ties, and remove the second"
            )
        elif schema.verdict_format == "winner":
            remedy = "write one of these words, or remove the row; a number or a model's name is not taken for a side"
        else:
            remedy = "give the row exactly one winner, or remove it; or give all rows shares of votes that sum to 1"
        return ArenaError(f"{first}{count}", where=where, remedy=remedy)

    def _refuse_repeats(self, hashes: array) -> None:
        """Raise ArenaError if an id comes twice; where hashes do, the table is read once more to compare the ids."""
        sorted_hashes = np.sort(np.frombuffer(hashes, np.int64)) if hashes else np.empty(0, np.int64)
        double = set(sorted_hashes[1:][sorted_hashes[1:] == sorted_hashes[:-1]].tolist())
        places: dict[str, str] = {}
        names = self._names if self._repeats else self._names[:2]
        for where, number, cells in self._rows(names) if double and self._schema.id else ():
            identity = None if isinstance(cells, BrokenRow) else self._identity(cells)
            if identity is None or hash(identity) not in double:
                continue
            if identity in places:
                raise ArenaError(
                    f"the {self._names[0]} {identity[:80]!a} is in {places[identity]} and again in row {number}",
                    where=f"{where} row {number}",
                    remedy="remove one of the two rows, give each its own id, or name another column: --columns id=…",
                )
            places[identity] = f"row {number}" if len(self._tables) == 1 else f"{where} row {number}"

    def _check_rejected(self) -> None:
        bad, rows = len(self.rejected), self.rows_read
        if not rows:
            raise ArenaError("has a header and no row", where=str(self.path), remedy="give a file with rows")
        most = _MOST_BAD if self.labelled else _MOST_UNREAD
        if bad < rows and (bad <= 1 or bad <= most * rows):
            return
        kinds: dict[str, list[Rejected]] = {}
        for row in self.rejected:
            kinds.setdefault(row.kind, []).append(row)
        listed = [
            f"  - {f'{len(of)} rows, the first is ' if len(of) > 1 else ''}row {of[0].row} "
            f"(id {name_of(of[0].id) if of[0].id is not None else 'missing'}): {of[0].reason}"
            for of in sorted(kinds.values(), key=len, reverse=True)[:_SHOWN]
        ]
        more = [f"  - … and {len(kinds) - _SHOWN} more reasons"] if len(kinds) > _SHOWN else []
        what = "no row is left" if bad == rows else f"more than {most:.0%} of the rows are bad"
        known = next((self._remedies[kind] for kind in kinds if kind in self._remedies), None)
        raise ArenaError(
            "\n".join([f"{what}: {bad} of {rows} rows", *listed, *more]),
            where=f"{self.rejected[0].file} row {self.rejected[0].row}",
            remedy=known or f"correct or remove these rows; they were read as {self._schema.described()['texts']}",
        )


def require_used(given: Mapping[str, str], *readers: VoteReader) -> None:
    """Raise UsageError for a name of --columns that no table has, though its own columns are called as ours."""
    used = {name for reader in readers for name in reader.facts["columns"]}
    first = readers[0]
    if unused := [name for name in given if name not in used and (first.labelled or name not in VERDICT_NAMES)]:
        raise no_such_column(unused[0], given, first.columns, str(first.path))
