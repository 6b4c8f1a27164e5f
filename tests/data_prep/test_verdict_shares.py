"""The truth of an arena covers its votes; labels drawn from distributions; the rows of a battle stay together."""

from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow.parquet import write_table

from common.battle import VERDICTS, Battle, swap_verdict
from data_prep.export import ensure_views, export
from data_prep.export_reader import read_manifest, read_rows, truth_of
from data_prep.readers import VoteReader
from data_prep.sources import Source
from data_prep.synthetic import write_arena
from data_prep.verdict_shares import Soft, drawn, mixed, probabilities_of, read_truth_ids, require_truth_of
from tests.votes import lines

HEAD = "id,winner_model_a,winner_model_b,winner_tie\n"


def truth(ids) -> Path:
    Path("truth.csv").write_text(HEAD + "".join(f"{name},0.2,0.3,0.5\n" for name in ids), encoding="utf-8")
    return Path("truth.csv")


def rows(ids, tests=()) -> Path:
    source = ["train"] * len(ids) + ["test"] * len(tests)
    write_table(pa.table({"source": source, "id": [*ids, *tests]}), "rows.parquet", row_group_size=7)
    return Path("rows.parquet")


def test_a_truth_of_all_votes_is_taken_in_any_order_and_with_others_and_an_id_reads_as_that_of_the_votes(workplace):
    path, ids = truth(["1e3", "other", "NA", " 12 ", "007", '" null"']), ["NA", " 12 ", "007", " null", "1e3"]
    require_truth_of(rows(ids, tests=["not in it"]), read_truth_ids(path), path)
    assert probabilities_of(truth_of(Path()), ids).tolist() == [[0.2, 0.3, 0.5]] * 5


SHARES = (0.5, 0.2, 0.3)


def test_labels_are_drawn_by_their_shares_anew_for_each_order_and_epoch():
    battles = [Battle(str(n), ("p",), ("a",), ("b",), "a", shares=SHARES) for n in range(4000)]
    counts = Counter(drawn(battle, 7, 0, "ab").verdict for battle in battles)
    assert np.allclose([counts[v] / 4000 for v in VERDICTS], SHARES, atol=0.03)
    assert drawn(battles[0], 7, 0, "ab") == drawn(battles[0], 7, 0, "ab")
    both = [[drawn(battle, *key).verdict for battle in battles] for key in ((7, 0, "ab"), (7, 1, "ab"), (7, 0, "ba"))]
    agree = sum(s * s for s in SHARES)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        same = np.mean([x == y for x, y in zip(both[one], both[other], strict=True)])
        assert same == pytest.approx(agree, abs=0.03), "draws are independent"
    assert drawn(Battle("1", ("p",), ("a",), ("b",), "tie"), 7) == Battle("1", ("p",), ("a",), ("b",), "tie")


def test_a_soft_label_is_mixed_with_the_verdict_or_stands_alone():
    battle = Battle("1", ("p",), ("a",), ("b",), "tie")
    assert mixed(battle, SHARES, 0.9).shares == pytest.approx((0.45, 0.18, 0.37))
    assert mixed(battle, SHARES, 0.9).verdict == "tie", "what validates keeps its verdict"
    alone = mixed(Battle("1", ("p",), ("a",), ("b",)), SHARES, 0.9)
    assert alone.shares == SHARES and alone.verdict == "a"


@pytest.fixture
def taught(experiment, workplace):
    """An export with soft labels of all battles and 40 that nobody voted on; two epochs, orders together."""
    arena = write_arena(workplace / "arena", seed=5, train_rows=200, test_rows=20)
    more = write_arena(workplace / "more", seed=6, train_rows=40, test_rows=40)
    header, *truth = arena.truth.read_text().splitlines()
    ids = [battle.id for _, battle in VoteReader(more.test, labelled=False)]
    pseudo = [f"train_2:{identity},0.1,0.1,0.8" for identity in ids]  # by the name that the export gives them
    known = {battle.id for _, battle in VoteReader(arena.train, labelled=True)}
    Path("soft.csv").write_text("\n".join([header, *(t for t in truth if t.split(",")[0] in known), *pseudo]) + "\n")
    its = experiment.model_copy(update={"epochs_as_rows": 2, "orders_together": True})
    sources = [Source(arena.train), Source(more.test)]
    audit = export(its, sources, arena.test, views=("judge", "reward"), soft=Soft(Path("soft.csv"), 1.0))
    return its, audit


def test_epochs_are_rows_and_the_orders_of_a_battle_stay_together(taught):
    its, audit = taught
    train, valid = lines(its.data_folder, "sft_train"), lines(its.data_folder, "sft_valid")
    rows = read_rows(its.data_folder, "train")
    assert len(train) == 2 * 2 * len(rows) == audit["exported"]["sft_train"]
    ids = [row["id"] for row in train]
    assert ids[::2] == ids[1::2], "the swapped copy is right behind"
    half = len(rows)
    assert set(ids[::2][:half]) == set(ids[::2][half:]) == set(rows["id"]), "epoch by epoch"
    assert ids[::2][:half] != rows["id"].tolist() and ids[::2][:half] != ids[::2][half:], "each shuffled for itself"
    label = dict(zip("ABC", VERDICTS, strict=True))
    seen = defaultdict(list)
    for number, row in enumerate(train):
        verdict = label[row["conversations"][1]["value"]]
        seen[row["id"]].append(swap_verdict(verdict) if number % 2 else verdict)
    pseudo = [verdict for identity, found in seen.items() if identity.startswith("train_2:") for verdict in found]
    assert Counter(pseudo)["tie"] / len(pseudo) == pytest.approx(0.8, abs=0.12), "a pseudo-label is drawn as any other"
    held = read_rows(its.data_folder, "valid")
    assert [label[row["conversations"][1]["value"]] for row in valid] == held["verdict"].tolist(), "people judge"
    assert set(held["source"]) == {"train"}


def test_reward_pairs_are_drawn_too_and_a_later_view_gives_the_same(taught):
    its, _ = taught
    pairs = [row["id"] for row in lines(its.data_folder, "dpo_reward_train")]
    shares = {row.id: row.shares for row in read_rows(its.data_folder, "train").itertuples()}
    expected = 2 * sum(each[0] + each[1] for each in shares.values())
    assert len(pairs) == pytest.approx(expected, rel=0.2), "a drawn tie gives no pair"
    before = read_manifest(its.data_folder)
    assert before["sources"]["soft"]["weight"] == 1.0
    sources = [Source(Path(before["sources"][name]["file"])) for name in ("train", "train_2")]
    export(its, sources, Path(before["sources"]["test"]["file"]), soft=Soft(Path("soft.csv"), 1.0))
    assert ensure_views(its, ("reward",)) and read_manifest(its.data_folder)["files"] == before["files"]
