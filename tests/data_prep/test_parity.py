"""What LLaMA-Factory trains on is, token by token, what was exported, fitted and is scored."""

import csv
from itertools import islice
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from data_prep.chat_template import load_frame
from data_prep.export import export
from data_prep.export_reader import iter_pairs, read_battles, read_rows
from data_prep.model_lookup import choose_template
from data_prep.preference_pairs import pair_sequences
from scoring.judge import load_judge, write_judge
from tests.real_tokenizers import FAMILIES, with_tokenizer
from tests.votes import lines

Ids = list[int]


def _rows(experiment, data_set: str, stage: str):
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer

    model = {"model_name_or_path": experiment.model, "template": experiment.template, "finetuning_type": "lora"}
    data = {"dataset": f"{experiment.name}_{data_set}_train", "dataset_dir": str(experiment.data_folder)}
    more = {"do_train": True, "output_dir": "saves/unused", "use_cpu": True, "report_to": "none"}
    recipe = {**model, **data, **more, "stage": "sft" if stage == "sft" else "dpo", "cutoff_len": experiment.cutoff_len}
    if experiment.enable_thinking is not None:
        recipe["enable_thinking"] = experiment.enable_thinking
    model_args, data_args, training_args, _, _ = get_train_args(recipe)
    module = load_tokenizer(model_args)
    template = get_template_and_fix_tokenizer(module["tokenizer"], data_args)
    return get_dataset(template, model_args, data_args, training_args, stage=stage, **module)["train_dataset"]


def trained_rows(experiment) -> list[tuple[Ids, Ids]]:
    """Return (prompt ids, label ids) of each SFT row exactly as LLaMA-Factory trains on them."""
    rows = _rows(experiment, "sft", "sft")
    split = [sum(label == -100 for label in row["labels"]) for row in rows]
    return [(row["input_ids"][:n], row["input_ids"][n:]) for row, n in zip(rows, split, strict=True)]


def trained_pairs(experiment, data_set: str) -> list[tuple[Ids, Ids, Ids]]:
    """Return (prompt, chosen, rejected) ids of each row exactly as LLaMA-Factory's pairwise training sees them."""
    found = []
    # The DPO and the reward-model workflow both read their data as stage "rm".
    for row in _rows(experiment, data_set, "rm"):
        prompt_len = row["chosen_labels"].count(-100)
        assert prompt_len == row["rejected_labels"].count(-100)
        for kind in ("chosen", "rejected"):
            assert row[f"{kind}_labels"] == [-100] * prompt_len + row[f"{kind}_input_ids"][prompt_len:]
            assert row[f"{kind}_input_ids"][:prompt_len] == row["chosen_input_ids"][:prompt_len]
        ids = row["chosen_input_ids"], row["rejected_input_ids"]
        found.append((ids[0][:prompt_len], ids[0][prompt_len:], ids[1][prompt_len:]))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("source", ["synthetic", "real", *FAMILIES])
def test_exported_trained_and_scored_ids_are_the_same(experiment, arena, source, request, monkeypatch, make_experiment):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(Path("hf_cache").absolute()))
    table = arena.train
    if source in FAMILIES:  # a real tokenizer
        model = with_tokenizer(source, Path("models") / source)
        choice = choose_template(str(model), FAMILIES[source][0])
        thinking = False if choice.thinks else None
        experiment = make_experiment("exam", model=str(model), template=choice.template, enable_thinking=thinking)
    if source != "synthetic":
        real = request.getfixturevalue("real_data") / "arena" / "train_natural.csv"
        table = Path("real.csv")
        with real.open(newline="", encoding="utf-8") as file, table.open("w", newline="", encoding="utf-8") as part:
            csv.writer(part).writerows(islice(csv.reader(file), 501 if source == "real" else 201))
        experiment = experiment.model_copy(update={"cutoff_len": 512})
    export(experiment, table, views=("judge", "reward"))
    folder, (frame, tokenizer) = experiment.data_folder, load_frame(experiment)
    label_id = dict(zip("ABC", frame.label_ids, strict=True))
    assert [tokenizer.decode([each]) for each in frame.label_ids] == ["A", "B", "C"]

    prompt = (folder / "judge_prompt.j2").read_text(encoding="utf-8")
    write_judge(Path(experiment.model).resolve(), experiment, frame, prompt, source={})
    judge, battles = load_judge(Path(experiment.model)), read_battles(folder, "train")
    straight, swapped = judge.sequences(battles), judge.sequences(battles, swapped=True)
    scored = [ids for pair in zip(straight, swapped, strict=True) for ids in pair]
    trained, exported = trained_rows(experiment), lines(folder, "sft_train")
    assert [prompt for prompt, _ in trained] == scored and len(exported) == len(scored)
    for (_, answer), row in zip(trained, exported, strict=True):
        assert (answer[0], len(answer)) == (label_id[row["conversations"][1]["value"]], frame.answer_len)
    rows = read_rows(folder, "train")
    assert [len(prompt) + len(answer) for prompt, answer in trained[::2]] == rows["tokens"].tolist()
    assert max(len(prompt) + len(answer) for prompt, answer in trained) <= experiment.cutoff_len

    trained, exported = trained_pairs(experiment, "dpo_judge"), lines(folder, "dpo_judge_train")
    for (_, chosen, rejected), row in zip(trained, exported, strict=True):
        assert (chosen[0], rejected[0]) == (label_id[row["chosen"]["value"]], label_id[row["rejected"]["value"]])
        assert chosen[1:] == rejected[1:] and len(chosen) == frame.answer_len
    messages = [frame.wrap(row["conversations"][0]["value"]) for row in exported]
    encodings = tokenizer.encode_batch_fast(messages, add_special_tokens=False)
    assert [prompt for prompt, *_ in trained] == [frame.surround(encoding.ids) for encoding in encodings]

    trained, pairs = trained_pairs(experiment, "dpo_reward"), [pair for pair, _ in iter_pairs(folder, "train")]
    sequences = pair_sequences(frame, tokenizer, pairs)
    assert len(trained) == len(lines(folder, "dpo_reward_train"))
    assert trained == [
        (prompt, a, b) if verdict == "a" else (prompt, b, a)
        for (prompt, a, b), pair, verdict in zip(sequences, pairs, rows["verdict"], strict=True)
        if verdict != "tie" and pair.response_a != pair.response_b
    ]
    assert max(len(prompt) + max(map(len, both)) for prompt, *both in trained) <= experiment.cutoff_len
    end = frame.answer(tokenizer.encode(frame.wrap_answer("x"), add_special_tokens=False).ids)[1:]
    assert all(answer[-len(end) :] == end for _, *both in trained for answer in both), "no answer loses its end"
    written = pq.read_table(folder / "pairs.parquet", columns=["id", "tokens_a", "tokens_b"]).to_pylist()
    tokens = {row["id"]: (row["tokens_a"], row["tokens_b"]) for row in written}
    for pair, (prompt, a, b) in zip(pairs, sequences, strict=True):
        assert tokens[pair.id] == (len(prompt) + len(a), len(prompt) + len(b))
