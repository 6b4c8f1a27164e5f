"""Broken things that we or a trainer wrote: exports, states, adapters, models, judges, scores, submissions."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from chain import called
from pyarrow.parquet import read_table, write_table

from common.experiment import load_experiment
from common.progress import Show
from factory.merge import merge
from factory.stage_context import StageContext
from scoring.checks.run_checks import shared_prompts, submission_ids
from scoring.judge import load_judge
from scoring.model_loading import TrainedAdapter, load_model
from scoring.predictions import check_submission
from scoring.score_store import RowStore
from scoring.watch import baseline_losses
from tests.bad_inputs.place import COMPARE, PREPARE, SCORE, SCORE_INPUT, SFT, cases, change, cut, nothing, remove, write

PUBLISH = ("publish", "-e", "exam", "--repo", "me/judge", "--dry-run")
SHOW = ("show", "9000", "-e", "exam")
SHOW_PAIR = (*SHOW, "--stage", "dpo_reward")
DATA, OUT = "data/exam", "outputs/exam/sft"
MERGED, ADAPTER = f"{OUT}/merged", "saves/tiny/lora/exam_sft"
MANIFEST, INFO = f"{DATA}/manifest.json", f"{DATA}/dataset_info.json"
STATE, REPORT = f"{OUT}/state.json", f"{OUT}/report.json"
ROWS, BATTLES, AUDIT = f"{DATA}/rows.parquet", f"{DATA}/battles.parquet", f"{DATA}/audit.json"
JUDGE, WEIGHTS = f"{MERGED}/judge.json", f"{MERGED}/model.safetensors"
TOKENIZER, MODEL_CONFIG = f"{MERGED}/tokenizer.json", f"{MERGED}/config.json"
CONFIG, TENSORS = f"{ADAPTER}/adapter_config.json", f"{ADAPTER}/adapter_model.safetensors"
CHANCES = f"{OUT}/probabilities_valid.csv"
TEST_SCORES, TEST_CHANCES = f"{OUT}/scores_test.parquet", f"{OUT}/probabilities_test.csv"
NO_MODEL, NO_STATE = "the model cannot be loaded", "state.json: is not a state"
SCORED = f"{OUT}/scored/votes.csv"
OWN_CODE = {"model_type": "x", "auto_map": {"AutoModelForCausalLM": "e.E"}}
AGAIN = "run prepare again"
GOOD = "1,.5,.25,.25\n2,.5,.25,.25\n3,.5,.25,.25\n"
HEAD = "id,winner_model_a,winner_model_b,winner_tie\n"
OTHER_ORDER, FORMULA = "id,winner_tie,winner_model_a,winner_model_b\n", '"=1+\n\x1b[2J",'
TRAINED, DROP, SOFT = f"{DATA}/sft_train.jsonl", (*PREPARE, "--drop-ids", "drop.csv"), (*PREPARE, "--soft", SCORED)
PART = '{"parts": {"score": {"inputs": %s, "outputs": %s, "started_at": "x"}}}'
mine = partial(write, "mine.csv")


def edited(path: str, **changed: Any) -> Callable:
    return lambda place: place.edit_json(path, **changed)


def frame(path: str, **changed: Any) -> Callable:
    def breaks(place) -> None:
        content = json.loads(Path(path).read_text())["frame"] | changed
        place.edit_json(path, frame={k: v for k, v in content.items() if v is not ...})

    return breaks


def unscored(breaks: Callable) -> Callable:
    """Return the same fault in a place where nothing was scored yet."""
    return lambda place: (remove(STATE)(place), breaks(place))


def reduced(path: str, columns: list[str] | None = None, rows: int | None = None) -> Callable:
    """Return what leaves a parquet table some of its columns or rows."""
    return lambda place: write_table(read_table(path, columns=columns).slice(0, rows), path)


def truth_of_others(place) -> None:
    Path(DATA, "truth.csv").write_text(f"{HEAD}1,.5,.25,.25\n")


BLEND = ("ensemble", "--name", "both", "-e", "exam:sft", "-e", "exam:tfidf")
MEAN = (*BLEND, "--weights", "mean")
# What is called other than by a command.
LOAD_JUDGE = partial(load_judge, Path(MERGED))
LOAD_MODEL = partial(load_model, Path(MERGED), "cpu")
LOAD_ADAPTER = partial(TrainedAdapter(Path(ADAPTER), "models/tiny").load, "cpu")
FIRST_PROMPTS = partial(shared_prompts, Path(DATA), ["train"], ["valid"])
TEST_IDS = partial(submission_ids, Path(DATA), [])
SUBMISSION = partial(check_submission, Path("mine.csv"), ["1", "2", "3"])


def merge_again() -> None:
    merge(StageContext(load_experiment("exam"), "sft"), lambda folder: None, Show())


def ladder() -> None:
    baseline_losses(StageContext(load_experiment("exam"), "sft"))


def half_store(place) -> None:
    RowStore.write(Path("store"), iter(()))
    Path("store/rows.parquet").write_bytes(b"PAR1")


def stored_ids() -> None:
    list(RowStore(Path("store"), checked=False).ids())


def other_votes(place) -> None:
    """Prepare a second experiment with votes of its own."""
    place.table(place.rows(start=5000), "others.csv")
    shutil.copytree("factory_configs/exam", "factory_configs/other")
    called("prepare", "-e", "other", "--train", "others.csv", "--test", "test.csv")


def answered_its_own_rows(place) -> None:
    """Write what `score --input` would answer for the battles that the judge was trained on."""
    rows = [json.loads(line)["id"] for line in Path(DATA, "sft_train.jsonl").read_text().splitlines()]
    Path(SCORED).parent.mkdir()
    Path(SCORED).write_text(HEAD + "".join(f"{each},.2,.3,.5\n" for each in dict.fromkeys(rows)))


def one_less(data: bytes) -> bytes:
    return b"".join(data.splitlines(keepends=True)[:-1])


def into(output: str) -> tuple[str, ...]:
    return (*SCORE_INPUT[:-1], output)


def header(text: bytes, length: int | None = None) -> bytes:
    return (len(text) if length is None else length).to_bytes(8, "little") + text


# Each JSON file and each table in each way in which any of them may be damaged.
CONTENTS = {"empty": "", "deep": "[" * 50_000, "a_list": "[]", "not_utf8": b"\xff"}
JSON_DAMAGE = {name: partial(write, content=content) for name, content in CONTENTS.items()}
JSON_DAMAGE["cut_off"] = lambda path: change(path, cut(0.5))
JSON_FILES = {
    MANIFEST: (SCORE, AGAIN),
    INFO: (SFT, "dataset_info.json: is not "),
    STATE: (SCORE, NO_STATE, "--fresh"),
    JUDGE: (LOAD_JUDGE, "judge.json: is damaged"),
    TOKENIZER: (LOAD_JUDGE, "tokenizer.json: is damaged"),
    MODEL_CONFIG: (LOAD_MODEL, NO_MODEL, "merge again"),
    CONFIG: (LOAD_ADAPTER, ADAPTER, "adapter_config.json is damaged"),
    REPORT: (SCORE_INPUT, "no readable report"),
    AUDIT: (TEST_IDS, "audit.json: is damaged"),
}
TABLE_DAMAGE = {"gone": remove, "cut_off": lambda path: change(path, cut(0.5)), "of_words": partial(write, content="x")}
TABLES = [
    *((ROWS, call, "rows.parquet: is damaged", AGAIN) for call in (SCORE, SHOW, FIRST_PROMPTS)),
    *((BATTLES, call, "battles.parquet: is damaged", AGAIN) for call in (SCORE, SHOW, COMPARE)),
    (CHANCES, COMPARE, "probabilities_valid.csv: "),
]
# What was computed before the fault showed waits for the next run.
COMPUTED = (STATE, f"{OUT}/scoring/", f"{OUT}/merge_gate.json")


def damage(path: str, call, words, ways: dict[str, Callable]) -> list:
    """Return the cases of a file that is damaged in each way; scoring reads it only where nothing was scored yet."""
    to_score = call is SCORE and path != STATE
    prefix = f"{Path(path).stem}_for_{call[0] if isinstance(call, tuple) else 'reading'}"
    rows = [(f"{prefix}_{n}", unscored(way(path)) if to_score else way(path), call, *words) for n, way in ways.items()]
    return cases(rows, writes=COMPUTED if to_score else ())


DAMAGED = [
    *(case for path, (call, *words) in JSON_FILES.items() for case in damage(path, call, words, JSON_DAMAGE)),
    *(case for path, call, *words in TABLES for case in damage(path, call, words, TABLE_DAMAGE)),
]
FAULTS = [
    ("manifest_missing", unscored(remove(MANIFEST)), SCORE, "there is no exported data", "prepare -e exam"),
    ("manifest_other_format", unscored(edited(MANIFEST, format=1)), SCORE, "was exported by another version"),
    ("manifest_no_frame", unscored(edited(MANIFEST, frame=...)), SCORE, "is damaged"),
    ("manifest_files_a_list", unscored(edited(MANIFEST, files=[1])), SCORE, "is damaged"),
    ("manifest_files_lead_out", unscored(edited(MANIFEST, files={"../x": "0"})), SCORE, "is damaged"),
    ("manifest_no_sources", unscored(edited(MANIFEST, sources=...)), SCORE, "is damaged"),
    ("manifest_source_a_word", unscored(edited(MANIFEST, sources={"train": "x"})), SCORE, "is damaged"),
    ("manifest_other_tokenizer", unscored(frame(MANIFEST, before="x")), SCORE, "another tokenizer or chat template"),
    ("rows_of_the_training_set_lost", change(TRAINED, one_less), SFT, "sft_train.jsonl: is damaged", AGAIN),
    ("info_missing", remove(INFO), SFT, "there is no exported data"),
    ("info_entry_a_word", write(INFO, '{"exam_sft_train": "x"}'), SFT, "does not name a file"),
    ("info_leads_out", write(INFO, '{"exam_sft_train": {"file_name": "../../../x"}}'), SFT, "does not name a file"),
    ("state_no_parts", write(STATE, '{"version": 1}'), SCORE, NO_STATE),
    ("state_part_a_word", write(STATE, '{"parts": {"score": "x"}}'), SCORE, NO_STATE),
    ("state_unknown_key", write(STATE, '{"parts": {"score": {"x": 1}}}'), SCORE, NO_STATE),
    ("state_inputs_a_list", write(STATE, PART % ("[]", "[]")), SCORE, NO_STATE),
    ("state_outputs_numbers", write(STATE, PART % ("{}", "[1]")), SCORE, NO_STATE),
    ("judge_missing", remove(JUDGE), LOAD_JUDGE, "is not a judge: judge.json is missing", "train and merge first"),
    ("judge_other_format", edited(JUDGE, format=99), LOAD_JUDGE, "was made by another version"),
    ("judge_other_classes", edited(JUDGE, classes=["tie", "a", "b"]), LOAD_JUDGE, "was made by another version"),
    ("judge_no_frame", edited(JUDGE, frame=...), LOAD_JUDGE, "is damaged: 'frame'"),
    ("judge_frame_a_list", edited(JUDGE, frame=[1]), LOAD_JUDGE, "is damaged"),
    ("judge_frame_lacks_a_key", frame(JUDGE, before=...), LOAD_JUDGE, "is damaged"),
    ("judge_frame_words_for_ids", frame(JUDGE, label_ids=["A", "B", "C"]), LOAD_JUDGE, "is damaged"),
    ("judge_frame_foreign_id", frame(JUDGE, label_ids=[1, 2, 10**9]), LOAD_JUDGE, "token 1000000000 is not among"),
    ("judge_frame_negative_id", frame(JUDGE, suffix_ids=[-5]), LOAD_JUDGE, "token -5 is not among"),
    ("judge_labels_equal", edited(JUDGE, labels={"a": "A", "b": "A", "tie": "C"}), LOAD_JUDGE, "is damaged"),
    ("judge_cutoff_a_word", edited(JUDGE, cutoff_len="many"), LOAD_JUDGE, "cutoff_len is not of type int"),
    ("judge_cutoff_endless", edited(JUDGE, cutoff_len=10**18), LOAD_JUDGE, "cutoff_len is not between 1 and 1,048,576"),
    ("judge_prompt_broken", edited(JUDGE, judge_prompt="{{"), LOAD_JUDGE, "is not a valid Jinja template"),
    ("judge_prompt_hostile", edited(JUDGE, judge_prompt="{{ lipsum(9) }}"), LOAD_JUDGE, "does more than place texts"),
    ("judge_share", edited(JUDGE, prompt_share="most"), LOAD_JUDGE, "is damaged"),
    ("judge_canaries_a_list", edited(JUDGE, canaries=[]), LOAD_JUDGE, "canaries is not of type dict"),
    ("judge_other_tokenizer", edited(JUDGE, canaries={"x": [1, 2, 3]}), LOAD_JUDGE, "the tokenizer in this folder"),
    ("judge_no_tokenizer", remove(TOKENIZER), LOAD_JUDGE, "tokenizer.json is missing"),
    ("judge_tokenizer_other_json", write(TOKENIZER, '{"a": 1}'), LOAD_JUDGE, "is damaged"),
    ("model_no_config", remove(MODEL_CONFIG), LOAD_MODEL, NO_MODEL),
    ("config_unknown_type", write(MODEL_CONFIG, '{"model_type": "nonsense"}'), LOAD_MODEL, NO_MODEL),
    ("config_negative_size", edited(MODEL_CONFIG, hidden_size=-3), LOAD_MODEL, NO_MODEL),
    ("config_size_a_word", edited(MODEL_CONFIG, hidden_size="big"), LOAD_MODEL, NO_MODEL),
    ("config_own_code", edited(MODEL_CONFIG, **OWN_CODE), LOAD_MODEL, NO_MODEL),
    ("model_no_weights", remove(WEIGHTS), LOAD_MODEL, NO_MODEL),
    ("model_weights_cut_off", change(WEIGHTS, cut(0.5)), LOAD_MODEL, NO_MODEL),
    ("model_weights_huge_header", write(WEIGHTS, header(b"{}", 2**62)), LOAD_MODEL, NO_MODEL),
    ("model_weights_broken_header", write(WEIGHTS, header(b"{" * 100)), LOAD_MODEL, NO_MODEL),
    ("adapter_no_config", remove(CONFIG), LOAD_ADAPTER, ADAPTER, "is no finished adapter", "adapter_config.json"),
    ("adapter_no_weights", remove(TENSORS), LOAD_ADAPTER, ADAPTER, "is no finished adapter", "model.safetensors"),
    ("adapter_endless_regex", edited(CONFIG, target_modules="(([a-z._0-9])+)+!"), LOAD_ADAPTER, "regular expression"),
    ("adapter_base_a_number", edited(CONFIG, base_model_name_or_path=7), LOAD_ADAPTER, "is no text"),
    ("adapter_of_another_base", edited(CONFIG, base_model_name_or_path="x/y"), LOAD_ADAPTER, "was trained on x/y"),
    ("adapter_no_type", edited(CONFIG, peft_type=...), LOAD_ADAPTER, "adapter_config.json is damaged"),
    ("adapter_unknown_type", edited(CONFIG, peft_type="NONSENSE"), LOAD_ADAPTER, "peft_type is not LORA"),
    ("adapter_foreign_weights", edited(CONFIG, target_modules=["v_proj"]), LOAD_ADAPTER, "lacks 2 weights"),
    ("adapter_weights_cut_off", change(TENSORS, cut(0.6)), LOAD_ADAPTER, ADAPTER, "cannot be put on"),
    ("merge_no_config", remove(CONFIG), merge_again, "no finished adapter to merge", "--until train"),
    ("merge_no_weights", remove(TENSORS), merge_again, "no finished adapter to merge"),
    ("report_missing", remove(REPORT), SCORE_INPUT, "no readable report of this stage", "run.py sft -e exam"),
    ("report_no_calibration", edited(REPORT, calibration=...), SCORE_INPUT, "no readable report"),
    ("ids_to_drop_end_in_a_quote", write("drop.csv", 'id\n1\n"x\n"x\n'), DROP, "drop.csv row 2", "remove the row"),
    ("report_calibrations_a_word", edited(REPORT, calibrations="x"), SCORE_INPUT, "no readable report"),
    ("report_counts_of_words", edited(REPORT, train_class_counts={"a": "x"}), SCORE_INPUT, "no readable report"),
    ("report_flags_half", edited(REPORT, flags=[{"text": "x"}]), COMPARE, "no readable report"),
    ("report_of_a_huge_number", edited(REPORT, log_loss=10**400), COMPARE, "no readable report"),
    ("report_calibration_empty", edited(REPORT, calibration={}), SCORE_INPUT, "the saved calibration lacks a value"),
    ("report_published", edited(REPORT, calibration={}), PUBLISH, "the saved calibration lacks a value"),
    ("report_calibration_of_words", edited(REPORT, calibration={"source_prior": "x"}), SCORE_INPUT, "source_prior"),
    ("compare_nothing_scored", remove(REPORT), COMPARE, "no stage of this experiment was scored yet"),
    ("compare_chances_of_words", change(CHANCES, lambda d: d.replace(b"0.", b"x.")), COMPARE, "cannot be read"),
    ("compare_chances_no_column", change(CHANCES, lambda d: d.replace(b"_tie", b"_x")), COMPARE, "the header must be"),
    ("compare_flags_of_words", edited(REPORT, flags="red"), COMPARE, "no readable report"),
    ("compare_truth_of_others", truth_of_others, COMPARE, "have no true probabilities", "prepare again"),
    ("compare_other_rows", change(CHANCES, one_less), COMPARE, "1 id(s) are missing"),
    ("show_rows_lack_a_column", reduced(ROWS, ["id"]), SHOW, "rows.parquet: is damaged", AGAIN),
    ("show_battles_lack_a_column", reduced(BATTLES, ["id"]), SHOW, "battles.parquet: is damaged"),
    ("show_battles_without_rows", reduced(BATTLES, rows=0), SHOW, "has fewer rows than rows.parquet"),
    ("show_no_judge_prompt", remove(f"{DATA}/judge_prompt.j2"), SHOW, "judge_prompt.j2: is damaged", AGAIN),
    ("show_judge_prompt_not_utf8", write(f"{DATA}/judge_prompt.j2", b"\xff"), SHOW, "judge_prompt.j2: is damaged"),
    ("show_manifest_without_settings", edited(MANIFEST, experiment=...), SHOW, "is damaged", AGAIN),
    ("show_scores_of_words", write(TEST_SCORES, "hello"), SHOW, "scores_test.parquet: is damaged", "score the stage"),
    ("show_scores_cut_off", change(TEST_SCORES, cut(0.5)), SHOW, "scores_test.parquet: is damaged", "score the stage"),
    ("show_scores_lack_the_id", reduced(TEST_SCORES, ["group"]), SHOW, "scores_test.parquet: is damaged"),
    ("show_chances_not_utf8", write(TEST_CHANCES, b"\xff\xfe"), SHOW, "probabilities_test.csv: is damaged"),
    ("show_chances_cut_off", write(TEST_CHANCES, f"{HEAD}9000,0.5\n"), SHOW, "probabilities_test.csv: is damaged"),
    ("show_chances_without_the_row", write(TEST_CHANCES, HEAD), SHOW, "lacks the row 9000"),
    ("pairs_of_words", write(f"{DATA}/pairs.parquet", "hello"), SHOW_PAIR, "pairs.parquet: is damaged", AGAIN),
    ("no_pairs", remove(f"{DATA}/pairs.parquet"), SHOW_PAIR, "the reward view", "--pairs"),
    ("reads_no_test_ids", reduced(ROWS, ["id"]), TEST_IDS, "rows.parquet: is damaged"),
    ("reads_no_audit", remove(AUDIT), TEST_IDS, "audit.json: is damaged", AGAIN),
    ("reads_truth_of_others", truth_of_others, ladder, "data/exam/truth.csv", "have no true probabilities"),
    ("reads_half_a_row_store", half_store, stored_ids, "rows.parquet: is damaged", "score again"),
    ("submission_missing", nothing, SUBMISSION, "mine.csv: cannot be read"),
    ("submission_empty", mine(""), SUBMISSION, "cannot be read"),
    ("submission_other_header", mine(HEAD.replace("winner_tie", "tie") + GOOD), SUBMISSION, "the header must be"),
    ("submission_other_order", mine(OTHER_ORDER + GOOD), SUBMISSION, "the header must be"),
    ("submission_not_utf8", mine(b"\xff" + HEAD.encode()), SUBMISSION, "cannot be read"),
    ("submission_open_quote", mine(HEAD + '"1'), SUBMISSION, "cannot be read"),
    ("submission_missing_id", mine(HEAD + GOOD[:13]), SUBMISSION, "2 id(s) are missing: 2, 3"),
    ("submission_unknown_id", mine(HEAD + GOOD + "9,1,0,0\n"), SUBMISSION, "1 id(s) are not among the exported: 9"),
    ("submission_double_id", mine(HEAD + GOOD + "3,1,0,0\n"), SUBMISSION, "ids occur twice"),
    ("submission_shuffled", mine(HEAD + GOOD[13:] + GOOD[:13]), SUBMISSION, "not in the export's order"),
    ("submission_nan", mine(HEAD + GOOD.replace("1,.5", "1,nan")), SUBMISSION, "1 row(s) NaN or infinite: id 1"),
    ("submission_negative", mine(HEAD + GOOD.replace("1,.5,.25", "1,1.5,-.75")), SUBMISSION, "outside 0..1"),
    ("submission_sum", mine(HEAD + GOOD.replace("3,.5", "3,.6")), SUBMISSION, "not summing to 1: id 3"),
    ("submission_formula_id", mine(HEAD + GOOD.replace("1,", FORMULA, 1)), SUBMISSION, "exported: '=1+\\n\\x1b[2J'"),
]
EXPORT = [
    ("battles_empty", unscored(write(BATTLES, b"PAR1PAR1")), SCORE, "battles.parquet: is damaged"),
    ("battles_are_rows", unscored(lambda p: Path(ROWS).replace(BATTLES)), SCORE, "is damaged"),
]
MEMBERS = [
    ("members_too_few_rows_to_fit", nothing, BLEND, "remedy: --weights mean needs no fit"),
    ("members_not_scored", nothing, (*BLEND, "-e", "exam:rm"), "rm"),
    ("members_of_other_rows", other_votes, (*MEAN, "-e", "other:length"), "have none in common", "with the same votes"),
    ("teacher_saw_its_targets", answered_its_own_rows, SOFT, f"{SCORED} row 1", "trained on 28 of", CHANCES[-20:]),
]
NO_MEMBERS = [
    ("weights_do_not_sum", nothing, (*BLEND, "--weights", "0.5,0.4"), "weights of at least 0 that sum to 1"),
    ("weights_negative", nothing, (*BLEND, "--weights", "1.5,-0.5"), "weights of at least 0 that sum to 1"),
    ("weights_one_for_two", nothing, (*BLEND, "--weights", "1"), "is not 2 weights"),
    ("member_twice", nothing, (*BLEND, "-e", "exam:sft"), "two different members"),
    ("member_no_stage", nothing, (*BLEND, "-e", "exam:nothing"), "is no member"),
]
OUTPUTS = [
    ("output_is_a_truth", write("truth.csv", f"{HEAD}1,1,0,0\n"), into("truth.csv"), "is not an earlier output"),
    ("output_is_a_sample", write("sample_submission.csv", HEAD), into("sample_submission.csv"), "not an earlier"),
    ("output_is_the_votes", nothing, into("votes.csv"), "which exam was prepared from"),
    ("output_was_the_votes", remove("votes.csv"), into("votes.csv"), "which exam was prepared from"),
    ("output_is_exported", nothing, into("data/exam/rows.parquet"), "lies in data/"),
    ("output_is_in_an_arena", nothing, into("data/synthetic_arena/truth.csv"), "lies in data/"),
]
CASES = [*DAMAGED, *cases(FAULTS), *cases(EXPORT, writes=COMPUTED), *cases(MEMBERS)]
CASES += [*cases(NO_MEMBERS, code=2), *cases(OUTPUTS, code=2)]
