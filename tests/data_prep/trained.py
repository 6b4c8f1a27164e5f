"""What LLaMA-Factory trains on, for the tests that compare it with what was exported and with what is scored."""

from __future__ import annotations

Ids = list[int]


def _rows(experiment, data_set: str, stage: str):
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer

    recipe = {
        "model_name_or_path": experiment.model,
        "stage": "sft" if stage == "sft" else "dpo",
        "do_train": True,
        "finetuning_type": "lora",
        "template": experiment.template,
        "dataset": f"{experiment.name}_{data_set}_train",
        "dataset_dir": str(experiment.data_folder),
        "cutoff_len": experiment.cutoff_len,
        "output_dir": "saves/unused",
        "use_cpu": True,
        "report_to": "none",
        **({} if experiment.enable_thinking is None else {"enable_thinking": experiment.enable_thinking}),
    }
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
