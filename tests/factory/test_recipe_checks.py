import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

import run
from common.errors import ArenaError
from common.experiment import load_experiment, parse_experiment, read_yaml
from common.stages import STEPS
from factory.devices import Devices, Gpu
from factory.recipe_checks import check_device, check_recipe, check_recipes, device_faults, weight_faults
from factory.recipes import write_recipe

ROOT = Path(__file__).parents[2]


def experiment(**values):
    base = {"model": "org/base-4b", "template": "qwen3_nothink", "cutoff_len": 1024}
    return parse_experiment(base | values, "exp", where="experiment.yaml")


@pytest.fixture
def faults(tmp_path):
    """Render a step's recipe, edit it by {key: line or None to remove}, and return its faults by key."""

    def of(step="sft", its=None, **lines):
        its = its or experiment()
        write_recipe(its, step, force=True, root=tmp_path)
        path = tmp_path / its.recipe(step)
        text = path.read_text(encoding="utf-8")
        for key, value in lines.items():
            text = re.sub(rf"^{key}: .*\n", "", text, flags=re.MULTILINE)
            text += "" if value is None else f"{key}: {value}\n"
        path.write_text(text, encoding="utf-8")
        found = check_recipe(its, step, tmp_path)
        assert all(fault.startswith(f"factory_configs/exp/{step}.yaml: ") for fault in found)
        return dict(fault.removeprefix(f"factory_configs/exp/{step}.yaml: ").split(": ", 1) for fault in found)

    return of


@pytest.mark.parametrize("name", sorted(path.parent.name for path in ROOT.glob("factory_configs/*/experiment.yaml")))
def test_the_committed_recipes_are_without_a_fault(name):
    check_recipes(load_experiment(name, ROOT), STEPS, ROOT)


@pytest.mark.parametrize("step", STEPS)
def test_a_rendered_recipe_has_no_fault(faults, step):
    for its in (
        experiment(),
        experiment(quantization_bit=None, enable_thinking=False, trust_remote_code=True, revision="v2"),
        experiment(model="./models/base/", template="qwen3", enable_thinking=False, start_from={"rm": "sft"}),
    ):
        assert faults(step, its) == {}


@pytest.mark.parametrize(
    ("key", "value", "part"),
    [
        ("lora_rnak", "8", "no such key; did you mean lora_rank?"),
        ("eval_strategy", "no", 'YAML reads an unquoted no as false; write eval_strategy: "no"'),
        ("learning_rate", "0.0", "must be above 0"),
        ("gradient_accumulation_steps", "0", "must be at least 1"),
        ("warmup_steps", "-1", "must not be negative"),
        ("lora_dropout", "1.0", "must lie in [0, 1)"),
        ("bf16", '"true"', "expected bool"),
        ("report_to", "tensorbord", "is no reporter; choices: none, all"),
        ("report_to", "wandb", "needs wandb, which is not installed"),
        ("report_to", "[tensorboard, wandb, swanlab]", "needs wandb, swanlab, which is not installed"),
        ("report_to", "[tensorboard, mlfow]", "'mlfow' is no reporter"),
        ("model_name_or_path", "org/other", "is 'org/other', but by factory_configs/exp/experiment.yaml it is 'org/"),
        ("template", "llama3", "write that here, or change the experiment"),
        ("cutoff_len", "512", "it is 1024; write that here, or change the experiment"),
        ("cutoff_len", None, "is missing, but by"),
        ("quantization_bit", "8", "it is 4; write that here, or change the experiment"),
        ("quantization_bit", None, "is missing"),
        ("quantization_method", "hqq", "it is 'bnb'"),
        ("dataset", "exp_sft_valid", "it is 'exp_sft_train'"),
        ("dataset", "exp_sft_train,extra", "it is 'exp_sft_train'"),
        ("eval_dataset", None, "is missing"),
        ("dataset_dir", "data/demo", "it is 'data/exp'"),
        ("output_dir", "saves/x", "it is 'saves/base-4b/lora/exp_sft'"),
        ("stage", "dpo", "it is 'sft'; write that here"),
        ("trust_remote_code", "true", "it is False"),
        ("enable_thinking", "false", "it is True"),
        ("model_revision", "dev", "it is 'main'"),
        ("do_train", "false", "trains nothing; write true"),
        ("do_predict", "true", "run.py scores"),
        ("finetuning_type", "full", "needs a LoRA adapter"),
        ("val_size", "0.1", "splits by row, so that copies of one prompt land on both sides"),
        ("tokenized_path", "data/tokens", "overrides every other key about data"),
        ("overwrite_output_dir", "true", "a checkpoint in output_dir is resumed without being asked"),
        ("packing", "true", "lets battles attend to each other"),
        ("neat_packing", "true", "takes one token off cutoff_len"),
        ("resize_vocab", "true", "cannot grow a quantized model's embeddings"),
        ("use_dora", "true", "is always refused on a quantized model"),
        ("pissa_init", "true", "is refused on a quantized model"),
        ("quantization_device_map", "auto", "for inference only"),
        ("fp16", "true", "exclude each other"),
        ("use_galore", "true", "does not go with a LoRA adapter"),
        ("use_apollo", "true", "does not go with a LoRA adapter"),
        ("use_badam", "true", "does not go with a LoRA adapter"),
        ("swanlab_api_key", "0123456789", "remove the key and set SWANLAB_API_KEY in your shell"),
        ("flash_attn", "fa3", "not implemented"),
        ("flash_attn", "fa2", "needs flash_attn, which is not installed"),
        ("enable_liger_kernel", "true", "needs liger_kernel"),
        ("use_unsloth", "true", "needs unsloth"),
        ("infer_backend", "vllm", "cannot train"),
        ("ref_model_quantization_bit", "3", "choices: 4, 8, null"),
        ("adapter_name_or_path", "saves/a,saves/b", "which takes one; merge them first"),
        ("load_best_model_at_end", "true", "to be equal"),
    ],
)
def test_a_fault_is_found_and_told(faults, key, value, part):
    edits = {"save_strategy": "epoch"} if key == "load_best_model_at_end" else {}
    found = faults(**{key: value, **edits})
    assert list(found) == [key]
    assert part in found[key]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("learning_rate", "5e-5"),
        ("learning_rate", "1"),
        ("lora_target", "[q_proj, v_proj]"),
        ("dataset", "[exp_sft_train]"),
        ("dataset_dir", "./data/exp/"),
        ("report_to", "none"),
        ("eval_strategy", '"no"'),
        ("seed", "7"),
        ("use_rslora", "true"),
        ("max_samples", "100"),
        ("lora_alpha", "null"),
        ("lr_scheduler_kwargs", "{num_cycles: 2}"),
        ("val_size", "0.0"),
    ],
)
def test_what_a_user_may_choose_is_no_fault(faults, key, value):
    assert faults(**{key: value}) == {}


def test_the_reporter_of_swanlab_that_works_is_named(faults, monkeypatch):
    monkeypatch.setattr("factory.recipe_checks.find_spec", lambda name: object())
    assert "use_swanlab: true, which is LLaMA-Factory's own" in faults(report_to="swanlab")["report_to"]
    assert faults(report_to="swanlab", use_swanlab="true") == {}


@pytest.mark.parametrize(("loss", "instead"), [("hinge", "sigmoid"), ("kto_pair", "sigmoid"), ("ipo", "averaged")])
def test_a_loss_that_trains_another_is_refused(faults, loss, instead):
    found = faults("dpo_judge", pref_loss=loss, dpo_label_smoothing=None)
    assert list(found) == ["pref_loss"]
    assert f"'{loss}' is refused" in found["pref_loss"] and "choices: sigmoid, orpo, simpo" in found["pref_loss"]
    assert instead in found["pref_loss"]


def test_the_losses_that_are_offered(faults):
    for loss in ("sigmoid", "orpo", "simpo"):
        assert faults("dpo_reward", pref_loss=loss) == {}
    assert faults("dpo_judge", dpo_label_smoothing="0.1") == {}
    assert "sigmoid only" in faults("dpo_judge", pref_loss="orpo", dpo_label_smoothing="0.1")["dpo_label_smoothing"]
    assert "[0, 0.5)" in faults("dpo_judge", dpo_label_smoothing="0.5")["dpo_label_smoothing"]
    assert "did you mean" in faults("dpo_judge", pref_loss="sigmod")["pref_loss"]


def test_an_adapter_under_dpo_needs_its_own_reference(faults):
    its = experiment(start_from={"dpo_judge": "base"})
    adapter = "saves/base-4b/lora/exp_sft"
    found = faults("dpo_judge", its, adapter_name_or_path=adapter)
    assert "silently the base model as its reference" in found["adapter_name_or_path"]
    explicit = {"ref_model": "org/base-4b", "ref_model_adapters": adapter, "adapter_name_or_path": adapter}
    assert faults("dpo_judge", its, **explicit) == {}
    assert list(faults("dpo_judge", its, create_new_adapter="true", **explicit)) == ["create_new_adapter"]


def test_a_stage_that_starts_elsewhere_than_its_merge_is_found(faults, tmp_path):
    its = experiment(start_from={"dpo_judge": "sft"})
    assert (
        "'outputs/exp/sft/merged'" in faults("dpo_judge", its, model_name_or_path="org/base-4b")["model_name_or_path"]
    )
    assert "it is 'saves/" in faults("merge_sft", adapter_name_or_path="saves/other")["adapter_name_or_path"]
    assert "it is 'outputs/exp/sft/merged'" in faults("merge_sft", export_dir="outputs/x")["export_dir"]


def test_a_merge_takes_no_training_keys_and_no_quantized_base(faults):
    assert "`llamafactory-cli export` rejects it" in faults("merge_sft", output_dir="saves/x")["output_dir"]
    assert "cannot be merged into a quantized model" in faults("merge_sft", quantization_bit="4")["quantization_bit"]
    found = faults("merge_sft", export_quantization_bit="4")
    assert "quantize the merged model" in found["export_quantization_bit"]
    assert "it is 'rm'" in faults("merge_rm", stage=None)["stage"]
    assert "did you mean auto?" in faults("merge_sft", export_device="aut")["export_device"]


# Each was refused, or silently done otherwise, by LLaMA-Factory 0.9.5's own parser, loader or adapter code.
@pytest.mark.parametrize(
    ("bits", "key", "value", "part"),
    [
        *((bits, "use_dora", "true", "always refused on a quantized model") for bits in (4, 8)),
        *((bits, "pissa_init", "true", "is refused on a quantized model") for bits in (4, 8)),
        *((bits, "resize_vocab", "true", "embeddings") for bits in (4, 8)),
        *((bits, "fp8", "true", "not compatible with quantization_bit") for bits in (4, 8)),
        *((bits, "finetuning_type", kind, "needs a LoRA adapter") for bits in (4, 8) for kind in ("full", "oft")),
        *((bits, "quantization_bit", None, "is missing") for bits in (4, 8)),
        (8, "quantization_type", "fp4", "for 4 bits only"),
        (8, "fsdp", "full_shard", "takes 4 bits or none, not 8"),
        (8, "deepspeed", "zero3.json", "ZeRO-3, which takes 4 bits or none"),
        (None, "quantization_bit", "4", "it is None; write that here, or change the experiment"),
        (None, "finetuning_type", "full", "needs a LoRA adapter"),
    ],
)
def test_what_does_not_go_with_the_bits_is_refused(faults, monkeypatch, tmp_path, bits, key, value, part):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("factory.recipe_checks.find_spec", lambda name: True)
    (tmp_path / "zero3.json").write_text('{"zero_optimization": {"stage": 3}}', encoding="utf-8")
    for step in ("sft", "dpo_reward", "rm"):
        found = faults(step, experiment(quantization_bit=bits), **{key: value})
        assert list(found) == [key]
        assert part in found[key]


@pytest.mark.parametrize(
    ("bits", "key", "value"),
    [
        (None, "use_dora", "true"),
        (None, "resize_vocab", "true"),
        (None, "deepspeed", "zero3.json"),
        (None, "fsdp", "full_shard"),
        (4, "quantization_type", "fp4"),
        (4, "deepspeed", "zero3.json"),
        (4, "fsdp", "full_shard"),
        (8, "deepspeed", "zero2.json"),
        (8, "use_rslora", "true"),
    ],
)
def test_what_goes_with_the_bits_stands(faults, monkeypatch, tmp_path, bits, key, value):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("factory.recipe_checks.find_spec", lambda name: True)
    for stage in (2, 3):
        (tmp_path / f"zero{stage}.json").write_text(f'{{"zero_optimization": {{"stage": {stage}}}}}', encoding="utf-8")
    for step in ("sft", "dpo_reward", "rm"):
        assert faults(step, experiment(quantization_bit=bits), **{key: value}) == {}


@pytest.mark.slow
def test_llamafactorys_own_parser_refuses_and_takes_the_same(faults, tmp_path, monkeypatch):
    """What it refuses only with the model in memory (DoRA with bnb, ZeRO-3 with 8 bits) cannot be asked here."""
    from llamafactory.hparams import get_train_args

    monkeypatch.chdir(tmp_path)
    refused = [
        *((bits, "sft", {key: True}) for bits in (4, 8) for key in ("pissa_init", "resize_vocab", "fp8")),
        *((bits, "rm", {"finetuning_type": "full"}) for bits in (4, 8)),
        *((None, "sft", {key: True}) for key in ("use_galore", "use_apollo", "use_badam")),
        *((None, "rm", {key: True}) for key in ("train_on_prompt", "mask_history", "load_best_model_at_end")),
        (4, "sft", {"quantization_device_map": "auto"}),
        (4, "sft", {"adapter_name_or_path": "saves/a,saves/b"}),
        (4, "dpo_reward", {"ref_model_quantization_bit": 3}),
        (None, "dpo_reward", {"pissa_init": True}),
    ]
    taken = [
        (None, "sft", {"pissa_init": True}),
        (None, "sft", {"resize_vocab": True}),
        (None, "dpo_reward", {"pissa_init": True, "pref_loss": "orpo"}),
        (8, "sft", {"use_rslora": True}),
        (4, "sft", {"quantization_type": "fp4"}),
    ]
    for bits, step, values in refused + taken:
        its = experiment(quantization_bit=bits)
        lines = {key: str(value).lower() if isinstance(value, bool) else str(value) for key, value in values.items()}
        told = faults(step, its, **lines)
        recipe = read_yaml(tmp_path / its.recipe(step)) | {"use_cpu": True}
        assert bool(told) == ((bits, step, values) in refused), (told, values)
        if told:
            with pytest.raises((ValueError, AssertionError)):
                get_train_args(recipe)
        else:
            get_train_args(recipe)


def test_pissa_goes_without_bits_and_without_a_reference(faults):
    plain = experiment(quantization_bit=None)
    assert faults("sft", plain, pissa_init="true") == faults("rm", plain, pissa_init="true") == {}
    assert "beside a DPO reference" in faults("dpo_reward", plain, pissa_init="true")["pissa_init"]
    assert faults("dpo_reward", plain, pissa_init="true", pref_loss="orpo") == {}


def test_a_quantized_base_is_refused_before_it_is_trained_on(faults, tmp_path):
    base = tmp_path / "gptq"
    base.mkdir()
    (base / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}', encoding="utf-8")
    its = experiment(model=str(base))
    assert "no adapter can be merged" in faults("sft", its)["model_name_or_path"]
    (base / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    assert faults("sft", its) == {}


AMPERE, TURING = Gpu("A100", 80.0, 79.0, True), Gpu("T4", 15.0, 14.9, False)
CPU, NEW, OLD = Devices(), Devices(accelerator="cuda", gpus=(AMPERE,)), Devices(accelerator="cuda", gpus=(TURING,))


@pytest.mark.parametrize(
    ("recipe", "seen", "expected"),
    [
        ({"bf16": True}, NEW, {}),
        ({"bf16": True}, OLD, {"bf16": "T4 has no bf16; write bf16: false and fp16: true"}),
        ({"bf16": True}, Devices(accelerator="cuda", gpus=(AMPERE, TURING)), {"bf16": "T4 has no bf16"}),
        ({"fp16": True}, OLD, {}),
        ({"fp16": True}, CPU, {"fp16": "fp16 needs one; write fp16: false"}),
        ({"bf16": True}, CPU, {"bf16": "write bf16: false, or use_cpu: true beside it"}),
        ({"bf16": True, "use_cpu": True}, CPU, {}),
        ({"fp16": True, "use_cpu": True}, CPU, {"fp16": "needs one"}),
        ({"pure_bf16": True, "use_cpu": True}, CPU, {"pure_bf16": "there is no GPU here; write pure_bf16: false"}),
        ({"pure_bf16": True}, OLD, {"pure_bf16": "write pure_bf16: false and fp16: true"}),
        ({"use_cpu": True}, NEW, {"use_cpu": "hide the GPU with CUDA_VISIBLE_DEVICES="}),
        ({"bf16": True}, Devices(accelerator="mps"), {}),
        ({"bf16": True}, Devices(failure="torch is broken"), {}),
        ({}, CPU, {}),
    ],
)
def test_what_a_device_cannot_compute_in(recipe, seen, expected):
    found = dict(device_faults(recipe, seen))
    assert found.keys() == expected.keys()
    assert all(part in found[key] for key, part in expected.items())


def test_a_device_is_asked_only_where_it_matters(monkeypatch):
    monkeypatch.setattr("factory.recipe_checks.devices", lambda: pytest.fail("asked without need"))
    check_device(Path("sft.yaml"), {"bf16": False})
    monkeypatch.setattr("factory.recipe_checks.devices", lambda: OLD)
    with pytest.raises(ArenaError, match=r"sft\.yaml: bf16: T4 has no bf16") as caught:
        check_device(Path("sft.yaml"), {"bf16": True})
    assert "run.py doctor" in caught.value.remedy


def test_chat_templates_are_checked(faults):
    assert "no chat template 'qwen33'" in faults(its=experiment(template="qwen33"))["template"]
    told = faults(its=experiment(template="qwen3"))["template"]
    assert "trains on an empty thought before the label; write enable_thinking: false" in told
    assert told.endswith("or template: qwen3_nothink")


def test_all_faults_of_all_recipes_come_in_one_error(tmp_path):
    its = experiment()
    for step in ("sft", "merge_sft"):
        write_recipe(its, step, root=tmp_path)
    path = tmp_path / its.recipe("sft")
    text = path.read_text(encoding="utf-8").replace("lora_rank: 64", "lora_rnak: 64")
    path.write_text(text.replace("cutoff_len: 1024", "cutoff_len: 99"), encoding="utf-8")
    (tmp_path / its.recipe("merge_sft")).write_text("a: [\n", encoding="utf-8")
    with pytest.raises(ArenaError) as caught:
        check_recipes(its, ["sft", "merge_sft", "rm"], tmp_path)
    message = str(caught.value)
    assert message.startswith("4 fault(s)")
    assert "\n  - factory_configs/exp/sft.yaml: lora_rnak: " in message
    assert "\n  - factory_configs/exp/sft.yaml: cutoff_len: is 99, " in message
    assert "\n  - factory_configs/exp/merge_sft.yaml: is not readable YAML: " in message
    assert "\n  - factory_configs/exp/rm.yaml: is missing; `python run.py prepare -e exp" in message
    assert message.index("lora_rnak") < message.index("cutoff_len"), "in the order of the file"
    assert "`python run.py prepare -e exp --train FILE --force`, which drops its hand edits" in caught.value.remedy


def test_an_untouched_recipe_behind_its_experiment_needs_no_force(tmp_path):
    write_recipe(experiment(), "sft", root=tmp_path)
    changed = experiment(cutoff_len=512)
    with pytest.raises(ArenaError) as caught:
        check_recipes(changed, ["sft"], tmp_path)
    yaml = "factory_configs/exp/experiment.yaml"
    assert f"cutoff_len: is 1024, but by {yaml} it is 512: the recipe is older than that" in caught.value.what
    assert "`python run.py prepare -e exp --train FILE`" in caught.value.remedy
    assert "no hand edits" in caught.value.remedy and "--force" not in caught.value.remedy
    assert write_recipe(changed, "sft", root=tmp_path).state == "updated"
    check_recipes(changed, ["sft"], tmp_path)


def test_a_repeated_key_and_an_empty_file_are_faults(tmp_path):
    its = experiment()
    write_recipe(its, "sft", root=tmp_path)
    path = tmp_path / its.recipe("sft")
    for text, part in (
        (path.read_text(encoding="utf-8") + "seed: 1\n", "found duplicate key seed"),
        ("", "model_name_or_path: is missing"),
        ("- a\n", "must be a YAML mapping"),
    ):
        path.write_text(text, encoding="utf-8")
        assert any(part in fault for fault in check_recipe(its, "sft", tmp_path))


def test_a_recipe_that_was_read_is_not_read_again(tmp_path):
    its = experiment()
    write_recipe(its, "sft", root=tmp_path)
    read = {"sft": read_yaml(tmp_path / its.recipe("sft"))}
    (tmp_path / its.recipe("sft")).write_text("[", encoding="utf-8")
    check_recipes(its, ["sft"], tmp_path, read=read)


def test_a_stream_needs_steps_and_a_process_that_reads_it(faults):
    assert "max_steps" in faults(streaming="true", max_steps="-1", dataloader_num_workers="2")["streaming"]
    found = faults(streaming="true", max_steps="100", dataloader_num_workers="0")
    assert "dataloader_num_workers" in found["streaming"]
    assert faults(streaming="true", max_steps="100", dataloader_num_workers="2") == {}


def test_a_lora_target_that_no_module_has_changes_nothing_on_disk(place):
    place.edit_recipe("sft", "lora_target: q_projj,v_proj")
    before = place.snapshot()
    done = CliRunner().invoke(run.cli, ["sft", "-e", "exam", "--fresh"])
    assert done.exit_code == 1, done.output
    assert "sft.yaml: lora_target: models/tiny has no module 'q_projj'; did you mean q_proj?" in done.output
    after = place.snapshot()
    assert {name: after[name] for name in before} == before and "earlier-" not in "".join(after)


@pytest.mark.parametrize(
    ("targets", "part"),
    [
        ("all", None),
        ("q_proj, v_proj", None),
        (["self_attn.q_proj", "lm_head"], None),
        ("query", "no module 'query'; its layers hold down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"),
    ],
)
def test_targets_are_compared_as_peft_does(place, targets, part):
    found = dict(weight_faults({"model_name_or_path": "models/tiny", "lora_target": targets}))
    assert found == {} if part is None else part in found["lora_target"]


def test_an_index_and_a_hubs_cache_are_read_too(tmp_path, monkeypatch):
    kept = tmp_path / "hub" / "models--some--model"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs" / "main").write_text("abc")
    index = kept / "snapshots" / "abc" / "model.safetensors.index.json"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    recipe = {"model_name_or_path": "some/model", "lora_target": "q_proj"}
    assert not dict(weight_faults(recipe)), "not on this disk"
    index.parent.mkdir(parents=True)
    index.write_text(json.dumps({"weight_map": {"model.layers.0.attn.qkv_proj.weight": "1.safetensors"}}))
    assert "some/model has no module 'q_proj'; did you mean qkv_proj?" in dict(weight_faults(recipe))["lora_target"]
    index.write_text("{")
    assert not dict(weight_faults(recipe)), "damaged weights are reported by whoever loads them"
