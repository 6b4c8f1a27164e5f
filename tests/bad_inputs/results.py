"""Broken things that we or a trainer wrote: exports, states, adapters, models, judges, scores, submissions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.bad_inputs.case import COMPARE, SCORE, SCORE_INPUT, SFT, SHOW, SHOW_PAIR, Case, change, cut, remove, write
from tests.bad_inputs.place import Place

DATA, OUT = "data/exam", "outputs/exam/sft"
MERGED, ADAPTER = f"{OUT}/merged", "saves/tiny/lora/exam_sft"
DEEP = "[" * 50_000
GATE = f"{OUT}/merge_gate.json"
AGAIN = "run prepare again"


def edited(path: str, **changed: Any) -> Callable[[Place], None]:
    return lambda place: place.edit_json(path, **changed)


def frame(path: str, **changed: Any) -> Callable[[Place], None]:
    def breaks(place: Place) -> None:
        content = json.loads(Path(path).read_text())["frame"] | changed
        place.edit_json(path, frame={k: v for k, v in content.items() if v is not ...})

    return breaks


def anew(breaks: Callable[[Place], Any]) -> Callable[[Place], None]:
    """Return the same fault in a place where nothing was scored yet."""

    def both(place: Place) -> None:
        Path(OUT, "state.json").unlink()
        breaks(place)

    return both


MANIFEST = [
    Case(f"manifest_{name}", anew(breaks), SCORE, words)
    for name, breaks, words in [
        ("missing", remove(f"{DATA}/manifest.json"), ("there is no exported data", "prepare -e exam")),
        ("empty", write(f"{DATA}/manifest.json", ""), ("manifest.json: is damaged", AGAIN)),
        ("cut_off", change(f"{DATA}/manifest.json", cut(0.5)), ("manifest.json: is damaged", AGAIN)),
        ("not_utf8", write(f"{DATA}/manifest.json", b"\xff"), ("is damaged",)),
        ("deep", write(f"{DATA}/manifest.json", DEEP), ("is damaged",)),
        ("a_list", write(f"{DATA}/manifest.json", "[]"), ("was exported by another version",)),
        ("other_format", edited(f"{DATA}/manifest.json", format=1), ("was exported by another version",)),
        ("no_frame", edited(f"{DATA}/manifest.json", frame=...), ("is damaged",)),
        ("frame_a_number", edited(f"{DATA}/manifest.json", frame=7), ("is damaged",)),
        ("files_a_list", edited(f"{DATA}/manifest.json", files=[1]), ("is damaged",)),
        ("files_lead_out", edited(f"{DATA}/manifest.json", files={"../x": "0"}), ("is damaged",)),
        ("no_sources", edited(f"{DATA}/manifest.json", sources=...), ("is damaged",)),
        ("source_a_word", edited(f"{DATA}/manifest.json", sources={"train": "x"}), ("is damaged",)),
        ("other_tokenizer", frame(f"{DATA}/manifest.json", before="x"), ("another tokenizer or chat template",)),
    ]
]
EXPORT = [
    # What was computed before the fault showed waits for the next run.
    Case(f"export_{name}", anew(breaks), SCORE, words, writes=(f"{OUT}/state.json", f"{OUT}/scoring/", GATE))
    for name, breaks, words in [
        ("no_rows", remove(f"{DATA}/rows.parquet"), ("rows.parquet: is damaged",)),
        ("rows_cut_off", change(f"{DATA}/rows.parquet", cut(0.5)), ("rows.parquet: is damaged",)),
        ("rows_of_words", write(f"{DATA}/rows.parquet", "hello"), ("rows.parquet: is damaged",)),
        ("no_battles", remove(f"{DATA}/battles.parquet"), ("battles.parquet: is damaged",)),
        ("battles_cut_off", change(f"{DATA}/battles.parquet", cut(0.5)), ("battles.parquet: is damaged",)),
        ("battles_are_rows", write(f"{DATA}/battles.parquet", b"PAR1PAR1"), ("battles.parquet: is damaged",)),
        ("battles_swapped", lambda p: Path(DATA, "rows.parquet").replace(f"{DATA}/battles.parquet"), ("is damaged",)),
    ]
]
INFO = [
    Case(f"dataset_info_{name}", breaks, SFT, words)
    for name, breaks, words in [
        ("missing", remove(f"{DATA}/dataset_info.json"), ("there is no exported data",)),
        ("empty", write(f"{DATA}/dataset_info.json", ""), ("dataset_info.json: is not JSON",)),
        ("deep", write(f"{DATA}/dataset_info.json", DEEP), ("is not JSON: nested too deeply",)),
        ("a_list", write(f"{DATA}/dataset_info.json", "[]"), ("is not a JSON object",)),
        ("entry_a_word", write(f"{DATA}/dataset_info.json", '{"exam_sft_train": "x"}'), ("does not name a file",)),
        (
            "leads_out",
            write(f"{DATA}/dataset_info.json", '{"exam_sft_train": {"file_name": "../../../etc/passwd"}}'),
            ("does not name a file in the data folder",),
        ),
    ]
]
STATE = [
    Case(f"state_{name}", write(f"{OUT}/state.json", text), SCORE, ("state.json: is not a state", "--fresh"))
    for name, text in [
        ("empty", ""),
        ("cut_off", '{"version": 1, "parts": {'),
        ("deep", DEEP),
        ("a_list", "[]"),
        ("no_parts", '{"version": 1}'),
        ("part_a_word", '{"parts": {"score": "x"}}'),
        ("unknown_key", '{"parts": {"score": {"x": 1}}}'),
        ("inputs_a_list", '{"parts": {"score": {"inputs": [], "outputs": [], "started_at": "x"}}}'),
        ("outputs_numbers", '{"parts": {"score": {"inputs": {}, "outputs": [1], "started_at": "x"}}}'),
    ]
]


def load_judge() -> None:
    from scoring.judge import load_judge

    load_judge(Path(MERGED))


JUDGE_JSON = f"{MERGED}/judge.json"
JUDGE = [
    Case(f"judge_{name}", breaks, load_judge, words)
    for name, breaks, words in [
        ("missing", remove(JUDGE_JSON), ("is not a judge: judge.json is missing", "train and merge first")),
        ("empty", write(JUDGE_JSON, ""), ("judge.json: is damaged", "merge the adapter again")),
        ("cut_off", change(JUDGE_JSON, cut(0.5)), ("is damaged",)),
        ("deep", write(JUDGE_JSON, DEEP), ("is damaged: nested too deeply",)),
        ("a_list", write(JUDGE_JSON, "[]"), ("is damaged",)),
        ("not_utf8", write(JUDGE_JSON, b"\xff"), ("is damaged",)),
        ("other_format", edited(JUDGE_JSON, format=99), ("was made by another version",)),
        ("other_classes", edited(JUDGE_JSON, classes=["tie", "a", "b"]), ("was made by another version",)),
        ("no_frame", edited(JUDGE_JSON, frame=...), ("is damaged: 'frame'",)),
        ("frame_a_list", edited(JUDGE_JSON, frame=[1]), ("is damaged",)),
        ("frame_lacks_a_key", frame(JUDGE_JSON, before=...), ("is damaged",)),
        ("frame_words_for_ids", frame(JUDGE_JSON, label_ids=["A", "B", "C"]), ("is damaged",)),
        ("frame_two_labels", frame(JUDGE_JSON, label_ids=[1, 2]), ("is damaged",)),
        ("frame_foreign_id", frame(JUDGE_JSON, label_ids=[1, 2, 10**9]), ("token 1000000000 is not among",)),
        ("frame_negative_id", frame(JUDGE_JSON, suffix_ids=[-5]), ("token -5 is not among",)),
        ("labels_equal", edited(JUDGE_JSON, labels={"a": "A", "b": "A", "tie": "C"}), ("is damaged",)),
        ("cutoff_a_word", edited(JUDGE_JSON, cutoff_len="many"), ("cutoff_len is not of type int",)),
        ("tta_a_word", edited(JUDGE_JSON, swap_tta="no"), ("swap_tta is not of type bool",)),
        ("prompt_a_number", edited(JUDGE_JSON, judge_prompt=7), ("judge_prompt is not of type str",)),
        ("prompt_broken", edited(JUDGE_JSON, judge_prompt="{{"), ("is not a valid Jinja template",)),
        ("prompt_hostile", edited(JUDGE_JSON, judge_prompt="{{ lipsum(9) }}"), ("does more than place texts",)),
        ("shares", edited(JUDGE_JSON, budget_shares={"prompt": 1}), ("is damaged",)),
        ("canaries_a_list", edited(JUDGE_JSON, canaries=[]), ("canaries is not of type dict",)),
        ("other_tokenizer", edited(JUDGE_JSON, canaries={"x": [1, 2, 3]}), ("the tokenizer in this folder",)),
        ("no_tokenizer", remove(f"{MERGED}/tokenizer.json"), ("tokenizer.json is missing",)),
        ("tokenizer_empty", write(f"{MERGED}/tokenizer.json", ""), ("tokenizer.json: is damaged",)),
        ("tokenizer_cut_off", change(f"{MERGED}/tokenizer.json", cut(0.5)), ("is damaged",)),
        ("tokenizer_other_json", write(f"{MERGED}/tokenizer.json", '{"a": 1}'), ("is damaged",)),
    ]
]


def load_model() -> None:
    from scoring.model_loading import load_model

    load_model(Path(MERGED), "cpu")


def header(text: bytes, length: int | None = None) -> bytes:
    return (len(text) if length is None else length).to_bytes(8, "little") + text


WEIGHTS = f"{MERGED}/model.safetensors"
MODEL = [
    Case(f"model_{name}", breaks, load_model, ("the model cannot be loaded", "merge again", *words))
    for name, breaks, words in [
        ("no_config", remove(f"{MERGED}/config.json"), ()),
        ("config_empty", write(f"{MERGED}/config.json", ""), ()),
        ("config_a_list", write(f"{MERGED}/config.json", "[]"), ()),
        ("config_unknown_type", write(f"{MERGED}/config.json", '{"model_type": "nonsense"}'), ()),
        ("config_deep", write(f"{MERGED}/config.json", DEEP), ()),
        ("config_negative_size", edited(f"{MERGED}/config.json", hidden_size=-3), ()),
        ("config_size_a_word", edited(f"{MERGED}/config.json", hidden_size="big"), ()),
        (
            "config_own_code",
            edited(f"{MERGED}/config.json", model_type="x", auto_map={"AutoModelForCausalLM": "e.E"}),
            (),
        ),
        ("no_weights", remove(WEIGHTS), ()),
        ("only_pickles", lambda p: Path(WEIGHTS).rename(f"{MERGED}/pytorch_model.bin"), ()),
        ("weights_empty", write(WEIGHTS, b""), ()),
        ("weights_cut_off", change(WEIGHTS, cut(0.5)), ()),
        ("weights_of_words", write(WEIGHTS, "hello, I am a model"), ()),
        ("weights_huge_header", write(WEIGHTS, header(b"{}", 2**62)), ()),
        ("weights_broken_header", write(WEIGHTS, header(b"{" * 100)), ()),
    ]
]


def load_adapter() -> None:
    from scoring.model_loading import TrainedAdapter

    TrainedAdapter(Path(ADAPTER), "models/tiny").load("cpu")


def merge() -> None:
    from common.experiment import load_experiment
    from common.progress import Show
    from factory.merge import merge
    from factory.stage_context import StageContext

    merge(StageContext(load_experiment("exam"), "sft"), lambda folder: None, Show())


CONFIG, TENSORS = f"{ADAPTER}/adapter_config.json", f"{ADAPTER}/adapter_model.safetensors"
ADAPTERS = [
    Case(f"adapter_{name}", breaks, load_adapter, (ADAPTER, *words))
    for name, breaks, words in [
        ("no_config", remove(CONFIG), ("is no finished adapter", "adapter_config.json")),
        ("no_weights", remove(TENSORS), ("is no finished adapter", "adapter_model.safetensors")),
        ("only_pickles", lambda p: Path(TENSORS).rename(f"{ADAPTER}/adapter_model.bin"), ("is no finished adapter",)),
        ("config_empty", write(CONFIG, ""), ("adapter_config.json is damaged",)),
        ("config_a_list", write(CONFIG, "[]"), ("adapter_config.json is damaged",)),
        ("config_deep", write(CONFIG, DEEP), ("adapter_config.json is damaged",)),
        ("config_base_a_number", edited(CONFIG, base_model_name_or_path=7), ("is no text",)),
        ("of_another_base", edited(CONFIG, base_model_name_or_path="other/model"), ("was trained on other/model",)),
        ("config_no_type", edited(CONFIG, peft_type=...), ("cannot be put on models/tiny",)),
        ("config_unknown_type", edited(CONFIG, peft_type="NONSENSE"), ("cannot be put on",)),
        ("foreign_weights", edited(CONFIG, target_modules=["v_proj"]), ("lacks 2 weights",)),
        ("weights_cut_off", change(TENSORS, cut(0.6)), ("cannot be put on",)),
    ]
]
MERGES = [
    Case("merge_no_config", remove(CONFIG), merge, ("no finished adapter to merge", "--until train")),
    Case("merge_no_weights", remove(TENSORS), merge, ("no finished adapter to merge",)),
]
REPORT = f"{OUT}/report.json"
REPORTS = [
    Case(f"report_{name}", breaks, SCORE_INPUT, words)
    for name, breaks, words in [
        ("missing", remove(REPORT), ("no readable report of this stage", "run.py sft -e exam")),
        ("empty", write(REPORT, ""), ("no readable report",)),
        ("cut_off", change(REPORT, cut(0.5)), ("no readable report",)),
        ("deep", write(REPORT, DEEP), ("no readable report",)),
        ("a_list", write(REPORT, "[]"), ("no readable report",)),
        ("no_calibration", edited(REPORT, calibration=...), ("no readable report",)),
        ("calibration_empty", edited(REPORT, calibration={}), ("the saved calibration lacks a value",)),
        (
            "calibration_of_words",
            edited(REPORT, calibration={"source_prior": "x", "target_prior": 1}),
            ("source_prior", "give a share for each of a, b, tie"),
        ),
    ]
]
HEAD = "id,winner_model_a,winner_model_b,winner_tie\n"
SCORES, CHANCES = f"{OUT}/scores_valid.parquet", f"{OUT}/probabilities_valid.csv"


def truth_of_others(place: Place) -> None:
    Path(DATA, "truth.csv").write_text(f"{HEAD}1,.5,.25,.25\n")


def ladder() -> None:
    from common.experiment import load_experiment
    from scoring.watch import baseline_losses

    baseline_losses(load_experiment("exam"))


COMPARES = [
    Case(f"compare_{name}", breaks, COMPARE, words)
    for name, breaks, words in [
        ("nothing_scored", remove(REPORT), ("no stage of this experiment was scored yet",)),
        ("no_scores", remove(SCORES), ("its scores cannot be read", "score again")),
        ("scores_cut_off", change(SCORES, cut(0.5)), ("its scores cannot be read",)),
        ("scores_of_words", write(SCORES, "hello"), ("its scores cannot be read",)),
        ("no_battles", remove(f"{DATA}/battles.parquet"), ("battles.parquet: is damaged", AGAIN)),
        ("battles_cut_off", change(f"{DATA}/battles.parquet", cut(0.5)), ("battles.parquet: is damaged", AGAIN)),
        ("no_probabilities", remove(CHANCES), ("its scores cannot be read",)),
        ("probabilities_empty", write(CHANCES, ""), ("its scores cannot be read",)),
        ("probabilities_of_words", change(CHANCES, lambda d: d.replace(b"0.", b"x.")), ("its scores cannot be read",)),
        (
            "probabilities_no_column",
            change(CHANCES, lambda d: d.replace(b"_tie", b"_tea")),
            ("its scores cannot be read",),
        ),
        ("flags_of_words", edited(REPORT, flags="red"), ("its flags cannot be read", "--fresh")),
        ("truth_of_others", truth_of_others, ("have no true probabilities", "prepare again")),
        ("other_rows", change(CHANCES, lambda d: b"\n".join(d.splitlines()[:-1])), ("hold different rows",)),
    ]
]
TEST_SCORES, TEST_CHANCES = f"{OUT}/scores_test.parquet", f"{OUT}/probabilities_test.csv"


def only(path: str, column: str) -> Callable[[Place], None]:
    """Return what leaves a parquet table one of its columns."""

    def breaks(place: Place) -> None:
        from pyarrow.parquet import read_table, write_table

        write_table(read_table(path, columns=[column]), path)

    return breaks


def headless(path: str) -> Callable[[Place], None]:
    """Return what takes all rows of a parquet table away."""

    def breaks(place: Place) -> None:
        from pyarrow.parquet import read_table, write_table

        write_table(read_table(path).slice(0, 0), path)

    return breaks


SHOWS = [
    Case(f"show_{name}", breaks, call, words)
    for name, breaks, call, words in [
        ("no_rows", remove(f"{DATA}/rows.parquet"), SHOW, ("rows.parquet: is damaged", AGAIN)),
        ("rows_cut_off", change(f"{DATA}/rows.parquet", cut(0.5)), SHOW, ("rows.parquet: is damaged", AGAIN)),
        ("rows_lack_a_column", only(f"{DATA}/rows.parquet", "id"), SHOW, ("rows.parquet: is damaged", AGAIN)),
        ("no_battles", remove(f"{DATA}/battles.parquet"), SHOW, ("battles.parquet: is damaged", AGAIN)),
        ("battles_cut_off", change(f"{DATA}/battles.parquet", cut(0.5)), SHOW, ("battles.parquet: is damaged", AGAIN)),
        ("battles_lack_a_column", only(f"{DATA}/battles.parquet", "id"), SHOW, ("battles.parquet: is damaged",)),
        ("battles_without_rows", headless(f"{DATA}/battles.parquet"), SHOW, ("has fewer rows than rows.parquet",)),
        ("pairs_of_words", write(f"{DATA}/pairs.parquet", "hello"), SHOW_PAIR, ("pairs.parquet: is damaged", AGAIN)),
        ("no_pairs", remove(f"{DATA}/pairs.parquet"), SHOW_PAIR, ("the reward view", "--pairs")),
        ("no_judge_prompt", remove(f"{DATA}/judge_prompt.j2"), SHOW, ("judge_prompt.j2: is damaged", AGAIN)),
        ("judge_prompt_not_utf8", write(f"{DATA}/judge_prompt.j2", b"\xff"), SHOW, ("judge_prompt.j2: is damaged",)),
        ("manifest_without_settings", edited(f"{DATA}/manifest.json", experiment=...), SHOW, ("is damaged", AGAIN)),
        ("scores_of_words", write(TEST_SCORES, "hello"), SHOW, ("scores_test.parquet: is damaged", "score the stage")),
        ("scores_cut_off", change(TEST_SCORES, cut(0.5)), SHOW, ("scores_test.parquet: is damaged", "score the stage")),
        ("scores_lack_the_id", only(TEST_SCORES, "group"), SHOW, ("scores_test.parquet: is damaged",)),
        ("chances_not_utf8", write(TEST_CHANCES, b"\xff\xfe"), SHOW, ("probabilities_test.csv: is damaged",)),
        ("chances_of_others", write(TEST_CHANCES, "name\n9000\n"), SHOW, ("probabilities_test.csv: is damaged",)),
        ("chances_cut_off", write(TEST_CHANCES, f"{HEAD}9000,0.5\n"), SHOW, ("probabilities_test.csv: is damaged",)),
        ("chances_without_the_row", write(TEST_CHANCES, HEAD), SHOW, ("lacks a row that was scored",)),
    ]
]


def scored_to(output: str) -> tuple[str, ...]:
    return (*SCORE_INPUT[:-1], output)


OUTPUTS = [
    Case(f"output_{name}", breaks, scored_to(output), (output, *words), 2)
    for name, breaks, output, words in [
        ("is_a_truth", write("truth.csv", f"{HEAD}1,1,0,0\n"), "truth.csv", ("is not an earlier output", "--output")),
        ("is_a_sample", write("sample_submission.csv", HEAD), "sample_submission.csv", ("is not an earlier output",)),
        ("is_the_votes", lambda p: None, "votes.csv", ("which exam was prepared from",)),
        ("was_the_votes", remove("votes.csv"), "votes.csv", ("which exam was prepared from",)),
        ("is_exported", lambda p: None, "data/exam/rows.parquet", ("lies in data/",)),
        ("is_in_an_arena", lambda p: None, "data/synthetic_arena/truth.csv", ("lies in data/",)),
    ]
]


def first_prompts() -> None:
    from scoring.checks.run_checks import shared_prompts

    shared_prompts(Path(DATA))


def test_ids() -> None:
    from scoring.checks.run_checks import submission_ids

    submission_ids(Path(DATA), [])


def half_store(place: Place) -> None:
    from scoring.score_store import RowStore

    RowStore.write(Path("store"), iter(()))
    Path("store/rows.parquet").write_bytes(b"PAR1")


def stored_ids() -> None:
    from scoring.score_store import RowStore

    list(RowStore(Path("store"), checked=False).ids())


OWN_READS = [
    Case(f"reads_{name}", breaks, call, words)
    for name, breaks, call, words in [
        ("rows_cut_off", change(f"{DATA}/rows.parquet", cut(0.5)), first_prompts, ("rows.parquet: is damaged",)),
        ("battles_of_words", write(f"{DATA}/battles.parquet", "x"), first_prompts, ("battles.parquet: is damaged",)),
        ("fewer_battles", headless(f"{DATA}/battles.parquet"), first_prompts, ("battles.parquet: is damaged",)),
        ("no_test_ids", only(f"{DATA}/rows.parquet", "id"), test_ids, ("rows.parquet: is damaged",)),
        ("no_audit", remove(f"{DATA}/audit.json"), test_ids, ("audit.json: is damaged", AGAIN)),
        ("audit_deep", write(f"{DATA}/audit.json", DEEP), test_ids, ("audit.json: is damaged",)),
        ("audit_a_list", write(f"{DATA}/audit.json", "[]"), test_ids, ("audit.json: is damaged",)),
        ("truth_of_others", truth_of_others, ladder, ("data/exam/truth.csv", "have no true probabilities")),
        ("half_a_row_store", half_store, stored_ids, ("rows.parquet: is damaged", "score again")),
    ]
]
IDS = ["1", "2", "3"]
GOOD = "1,.5,.25,.25\n2,.5,.25,.25\n3,.5,.25,.25\n"


def submission() -> None:
    from scoring.predictions import check_submission

    check_submission(Path("mine.csv"), IDS)


SUBMISSIONS = [
    Case(f"submission_{name}", write("mine.csv", content), submission, ("mine.csv", *words))
    for name, content, words in [
        ("empty", "", ("the header must be",)),
        ("no_header", GOOD, ("the header must be",)),
        ("other_header", HEAD.replace("winner_tie", "tie") + GOOD, ("the header must be",)),
        ("other_order", "id,winner_tie,winner_model_a,winner_model_b\n" + GOOD, ("the header must be",)),
        ("not_utf8", b"\xff" + HEAD.encode(), ("cannot be read",)),
        ("open_quote", HEAD + '"1', ("line 2 does not have 4 cells",)),
        ("short_row", HEAD + GOOD + "4,1\n", ("line 5 does not have 4 cells",)),
        ("missing_id", HEAD + GOOD[:13], ("2 id(s) are missing: 2, 3",)),
        ("unknown_id", HEAD + GOOD + "9,1,0,0\n", ("1 id(s) are not in the test set: 9",)),
        ("double_id", HEAD + GOOD + "3,1,0,0\n", ("ids occur twice",)),
        ("shuffled", HEAD + "2,.5,.25,.25\n1,.5,.25,.25\n3,.5,.25,.25\n", ("not in the test set's order",)),
        ("nan", HEAD + GOOD.replace("1,.5", "1,nan"), ("1 row(s) NaN or infinite: id 1",)),
        ("words", HEAD + GOOD.replace("1,.5", "1,half"), ("NaN or infinite",)),
        ("negative", HEAD + GOOD.replace("1,.5,.25", "1,1.5,-.75"), ("outside 0..1",)),
        ("sum", HEAD + GOOD.replace("3,.5", "3,.6"), ("not summing to 1: id 3",)),
        ("formula_id", HEAD + GOOD.replace("1,", '"=1+\n\x1b[2J",', 1), ("are not in the test set: '=1+\\n\\x1b[2J'",)),
    ]
]
SUBMISSIONS.append(Case("submission_missing", lambda p: None, submission, ("mine.csv: cannot be read",)))
CASES = [
    *(*MANIFEST, *EXPORT, *INFO, *STATE, *JUDGE, *MODEL, *ADAPTERS, *MERGES, *REPORTS, *COMPARES, *SHOWS, *OUTPUTS),
    *(*OWN_READS, *SUBMISSIONS),
]
