"""The forecast: from real exported lengths to memory and hours, with advice that makes it fit."""

import dataclasses
import json

import numpy as np
import pytest

from common.errors import ArenaError, UsageError
from factory.forecast import _time, forecast, print_forecast
from factory.gpu import CARDS
from factory.memory import scoring_memory, training_memory, weight_bytes
from factory.model_size import shape_of
from factory.runtime import Speed, training_work
from factory.train_config import Setup, Workload, setup_of, workload_of

MODEL = "Qwen/Qwen3-8B"
SETUP = Setup(
    stage="sft",
    batch=2,
    accumulation=8,
    eval_batch=2,
    checkpointing=True,
    bits=4,
    double_quantization=True,
    rank=64,
    trained_modules=(),
    epochs=1.0,
    max_steps=-1,
    liger=False,
    reference=False,
    compute_bytes=2,
    optimizer_bytes=8,
    evaluations=0.0,
    grouped=False,
)


@pytest.fixture
def exported(workplace, make_experiment):
    """An experiment with rows, pairs and recipes of a known model, written without a tokenizer."""
    import pyarrow as pa
    from pyarrow.parquet import write_table

    from common.stages import STEPS
    from factory.recipes import write_recipe

    experiment = make_experiment(model=MODEL, cutoff_len=2048, swap_copies=True, swap_tta=True)
    experiment.data_folder.mkdir(parents=True)
    rows = {
        "split": ["train"] * 40 + ["valid"] * 8 + ["test"] * 12,
        "verdict": ["a", "b", "tie", "a"] * 12 + [None] * 12,
        "tokens": [100 * (1 + i % 20) for i in range(60)],
    }
    write_table(pa.table(rows), experiment.data_folder / "rows.parquet")
    pairs = {"tokens_a": [50 + i for i in range(60)], "tokens_b": [90 - i for i in range(60)]}
    write_table(pa.table(pairs), experiment.data_folder / "pairs.parquet")
    for step in STEPS:
        write_recipe(experiment, step)
    return experiment


def test_the_work_of_each_stage_is_what_its_export_holds(exported):
    sft = workload_of(exported, "sft")
    assert sft.train.shape == (80, 1) and sft.valid.shape == (8, 1)
    assert len(sft.scored) == 2 * 8 + 2 * 12  # both orders of the fold, and of the test set with swap_tta
    judge = workload_of(exported, "dpo_judge")
    assert judge.train.shape == (160, 2)  # both orders, each wrong label
    reward = workload_of(exported, "dpo_reward")
    assert reward.train.shape == (30, 2)  # ties have no pair
    assert reward.train[0].tolist() == [50, 90]
    assert len(reward.scored) == 2 * 20


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_padding_is_that_of_the_batches(batch):
    lengths = np.array([[5], [100], [7], [96], [6], [99], [8]])
    workload = Workload(lengths, lengths, lengths.ravel())
    grouped = workload.padded_tokens(lengths, batch, grouped=True)
    shuffled = workload.padded_tokens(lengths, batch, grouped=False)
    assert lengths.sum() <= grouped <= shuffled <= len(lengths) * workload.longest
    assert workload.longest == 104
    if batch == 1:
        assert grouped == shuffled == sum(-(-n // 8) * 8 for n in lengths.ravel())


def test_four_bits_take_what_bitsandbytes_takes():
    pytest.importorskip("bitsandbytes")
    import torch
    from bitsandbytes import functional

    weight = torch.randn(512, 512)
    packed, state = functional.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    held = packed.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    shape = shape_of(MODEL)
    bytes_each = (weight_bytes(shape, 4, 2) - 2 * (shape.embedding + shape.head)) / shape.linear
    assert bytes_each == pytest.approx(held / weight.numel(), rel=1e-3)


def test_memory_moves_the_way_that_each_change_moves_it():
    shape = shape_of(MODEL)
    total = training_memory(shape, SETUP, 2048).total
    for smaller in (
        SETUP.changed(batch=1),
        SETUP.changed(liger=True),
        SETUP.changed(optimizer_bytes=2),
        SETUP.changed(rank=8),
    ):
        assert training_memory(shape, smaller, 2048).total < total
    for larger in (
        SETUP.changed(checkpointing=False),
        SETUP.changed(bits=8),
        SETUP.changed(bits=None),
        SETUP.changed(stage="dpo"),
        SETUP.changed(trained_modules=("embed_tokens", "lm_head")),
    ):
        assert training_memory(shape, larger, 2048).total > total
    assert training_memory(shape, SETUP, 1024).total < total
    assert (
        scoring_memory(shape, bits=4, budget=32768, longest=2048).total
        < 16
        < (scoring_memory(shape, bits=None, budget=32768, longest=2048).total)
    )


def test_work_grows_with_passes_and_rows():
    shape = shape_of(MODEL)
    lengths = np.full((320, 1), 800)
    workload = Workload(lengths, lengths[:16], lengths.ravel())
    plain = training_work(shape, SETUP, workload)
    assert plain.steps == 20
    # three passes over 8.2 billion weights less the embedding, 2 operations each: the known rule of thumb
    assert plain.operations == pytest.approx(6 * (shape.linear + shape.head) * lengths.sum(), rel=0.12)
    assert training_work(shape, SETUP.changed(checkpointing=False), workload).operations < plain.operations
    assert training_work(shape, SETUP.changed(max_steps=10), workload).operations == pytest.approx(
        plain.operations / 2, rel=0.01
    )
    judged = training_work(shape, SETUP.changed(evaluations=4.0), workload)
    assert judged.operations > plain.operations
    assert Speed(1e12, start=0).seconds(plain) == pytest.approx(plain.operations / 1e12)


def test_what_does_not_fit_gets_changes_that_make_it_fit(exported):
    found = forecast(exported, ["sft", "dpo_reward"], ["T4", "RTX-4090", "H100"])
    devices = found["stages"]["sft"]["devices"]
    assert devices["H100"]["fits"] and not devices["T4"]["fits"]
    assert devices["H100"]["training_hours"] < devices["RTX-4090"]["training_hours"] < devices["T4"]["training_hours"]
    advice = devices["T4"]["advice"]
    assert advice[0].startswith("it has no bf16")
    last = next(line for line in reversed(advice) if line.endswith("GiB") and "precision" not in line)
    assert float(last.split()[-2]) <= CARDS["T4"].memory
    assert any("precision: 8bit" in line or "precision: 4bit" in line for line in advice)
    assert devices["H100"]["advice"] == []
    assert sum(devices["H100"]["memory_parts"].values()) == pytest.approx(devices["H100"]["memory"])
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_the_table_says_what_it_is_made_of(exported, capsys):
    from rich.console import Console

    print_forecast(Console(width=120), forecast(exported, ["sft"], ["T4"]))
    shown = capsys.readouterr().out
    assert "80 rows" in shown and "the longest 2,000" in shown
    assert "too much" in shown and "not run" in shown


def test_a_small_model_gets_this_machines_cpu_and_cards_alike_share_a_row(exported, monkeypatch):
    import io

    from rich.console import Console

    from factory import forecast as module

    assert list(forecast(exported, ["sft"], [])["stages"]["sft"]["devices"]) == list(CARDS), "8 billion are too many"
    tiny = dataclasses.replace(shape_of(MODEL), hidden=64, layers=2, heads=8, kv_heads=8, head_dim=8)
    tiny = dataclasses.replace(tiny, feed_forward=128, vocabulary=1024)
    monkeypatch.setattr(module, "shape_of", lambda *_: tiny)
    found = forecast(exported, ["sft"], [])
    assert list(found["stages"]["sft"]["devices"]) == [*CARDS, "cpu"]
    printed = io.StringIO()
    print_forecast(Console(file=printed, width=200), found)
    (shared,) = (line for line in printed.getvalue().splitlines() if "RTX-4090" in line and "GiB" not in line)
    assert {name for name in CARDS if name in shared} == set(CARDS)
    assert "its speed was measured now" in printed.getvalue()
    assert " 60 s " in shared, "a tiny model's time on a card is the start"
    assert "60 s assumed on a card, 12 s on the cpu." in printed.getvalue()
    narrow = io.StringIO()
    print_forecast(Console(file=narrow, width=60), found)
    assert "tokens on average, the longest 2,000; 5 steps" in narrow.getvalue(), "in one line, however narrow the table"


@pytest.mark.parametrize(
    ("seconds", "told"),
    [
        (0.01, "1 s"),
        (36, "36 s"),
        (99.4, "99 s"),
        (99.6, "2 min"),
        (720, "12 min"),
        (3569, "59 min"),
        (3571, "1.0 h"),
        (3.4 * 3600, "3.4 h"),
        (200 * 3600, "200.0 h"),
    ],
)
def test_a_time_is_told_in_the_unit_that_fits(seconds, told):
    assert _time(seconds / 3600) == told


def test_stages_that_are_left_out_are_told_with_the_command(exported, capsys):
    from rich.console import Console

    assert set(forecast(exported, [], ["T4"])["stages"]) == {"sft", "dpo_judge", "dpo_reward", "rm"}
    (exported.data_folder / "pairs.parquet").unlink()
    exported.recipe("dpo_judge").unlink()
    found = forecast(exported, [], ["T4"])
    assert list(found["stages"]) == ["sft"] and set(found["left_out"]) == {"dpo_judge", "dpo_reward", "rm"}
    print_forecast(Console(width=200), found)
    shown = capsys.readouterr().out
    assert (
        f"left out: rm: the pairs that it trains on are not exported yet: python run.py prepare -e {exported.name}"
        in shown
    )
    assert "--train FILE --pairs" in shown and "dpo_judge.yaml is not rendered yet" in shown


def test_what_is_missing_is_told_with_the_command_that_makes_it(exported):
    with pytest.raises(UsageError, match="no card GTX"):
        forecast(exported, ["sft"], ["GTX"])
    (exported.data_folder / "pairs.parquet").unlink()
    with pytest.raises(ArenaError, match="--pairs"):
        forecast(exported, ["rm"], ["T4"])
    (exported.data_folder / "rows.parquet").unlink()
    with pytest.raises(ArenaError, match=r"run\.py prepare"):
        forecast(exported, ["sft"], ["T4"])


def test_a_set_up_is_the_recipe_with_llamafactorys_defaults(exported):
    setup = setup_of(exported, "sft")
    assert (setup.batch, setup.bits, setup.rank, setup.checkpointing, setup.compute_bytes) == (2, 4, 64, True, 2)
    path = exported.recipe("dpo_judge")
    path.write_text(path.read_text().replace("bf16: true", "bf16: false") + "optim: paged_adamw_8bit\n")
    changed = setup_of(exported, "dpo_judge")
    assert (changed.compute_bytes, changed.optimizer_bytes, changed.reference) == (4, 2, True)


def test_this_machines_cpu_is_measured(exported):
    device = forecast(exported, ["sft"], ["cpu"])["stages"]["sft"]["devices"]["cpu"]
    assert device["training_hours"] > 1 and device["memory"] > 10


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("per_device_train_batch_size", "many"),
        ("num_train_epochs", "two"),
        ("lora_rank", ""),
        ("quantization_bit", "5"),
        ("max_samples", "0"),
    ],
)
def test_a_recipe_that_was_broken_by_hand_is_told_before_anything_is_computed(exported, key, value):
    path = exported.recipe("sft")
    kept = [line for line in path.read_text().splitlines() if not line.startswith(f"{key}:")]
    path.write_text("\n".join([*kept, f"{key}: {value}"]))
    with pytest.raises(ArenaError, match=rf"sft\.yaml: {key}: "):
        forecast(exported, ["sft"], ["T4"])


def test_a_package_that_only_the_other_machine_needs_is_no_fault(exported):
    path = exported.recipe("sft")
    kept = [line for line in path.read_text().splitlines() if not line.startswith(("report_to:", "use_adam_mini:"))]
    path.write_text("\n".join([*kept, "use_adam_mini: true", "report_to: comet_ml"]))
    assert forecast(exported, ["sft"], ["T4"])["stages"]["sft"]["rows"] == 80


@pytest.mark.parametrize(("stage", "rows"), [("sft", 80), ("dpo_judge", 160), ("dpo_reward", 30)])
def test_max_samples_cuts_the_rows_that_are_trained_on(exported, stage, rows):
    whole = forecast(exported, [stage], ["T4"])["stages"][stage]
    path = exported.recipe(stage)
    path.write_text(path.read_text() + "max_samples: 6\n")
    cut = forecast(exported, [stage], ["T4"])["stages"][stage]
    assert (whole["rows"], cut["rows"]) == (rows, 6) and cut["steps"] < whole["steps"]
    assert cut["devices"]["T4"]["training_hours"] < whole["devices"]["T4"]["training_hours"]
    assert cut["scored_sequences"] == whole["scored_sequences"], "scoring reads every row"
    workload = workload_of(exported, stage)
    assert workload.first(6).valid.tolist() == workload.valid[:6].tolist()
