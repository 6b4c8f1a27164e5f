import json
import re
from functools import partial
from pathlib import Path

import pytest
from chain import ROOT, call, experiment_of, hub_cache

from common.errors import ArenaError
from common.experiment import load_experiment, read_yaml
from common.stages import STEPS
from factory.devices import Devices, Gpu
from factory.recipe_checks import check_device, check_recipe, check_recipes, device_faults
from factory.recipe_reach import require_fit_base, weight_faults
from factory.recipes import write_recipe

SHARED = ROOT.parent / "shared" / "cases" / "recipes"
CASES = sorted(path.name for path in SHARED.glob("*.yaml")) or [
    pytest.param("", marks=pytest.mark.skip("the folder of cases is not beside this checkout"))
]
experiment = partial(experiment_of, "exp", model="org/base-4b", cutoff_len=1024)
# An adapter to train further: its own adapter_config.json decides its shape.
ADAPTER = {"adapter_name_or_path": "saves/a", "lora_rank": None, "lora_alpha": None}


@pytest.fixture
def faults(tmp_path, monkeypatch):
    """Render a step's recipe, edit it by {key: line or None to remove}, and return its faults by key."""

    monkeypatch.chdir(tmp_path)

    def of(step="sft", its=None, **lines):
        its = its or experiment()
        write_recipe(its, step, force=True)
        path = its.recipe(step)
        text = path.read_text(encoding="utf-8")
        for key, value in lines.items():
            text = re.sub(rf"^{key}: .*\n", "", text, flags=re.MULTILINE)
            text += "" if value is None else f"{key}: {value}\n"
        path.write_text(text, encoding="utf-8")
        found = check_recipe(its, step)
        assert all(fault.startswith(f"factory_configs/exp/{step}.yaml: ") for fault in found)
        return dict(fault.removeprefix(f"factory_configs/exp/{step}.yaml: ").split(": ", 1) for fault in found)

    return of


@pytest.mark.parametrize("name", sorted(path.parent.name for path in ROOT.glob("factory_configs/*/experiment.yaml")))
def test_the_committed_recipes_are_without_a_fault(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    check_recipes(load_experiment(name), STEPS)


@pytest.mark.parametrize("step", STEPS)
def test_a_rendered_recipe_has_no_fault(faults, step):
    for its in (
        experiment(),
        experiment(quantization_bit=None, enable_thinking=False, trust_remote_code=True, revision="v2"),
        experiment(model="./models/base/", template="qwen3", enable_thinking=False, start_from={"rm": "sft"}),
    ):
        assert faults(step, its) == {}


@pytest.mark.parametrize(  # tests/bad_inputs/configs.py has others
    ("key", "value", "part"),
    [
        ("learning_rate", "0.0", "must be above 0"),
        ("gradient_accumulation_steps", "0", "must be at least 1"),
        ("warmup_steps", "-1", "must not be negative"),
        ("bf16", '"true"', "expected bool; write it without quotes"),
        ("bf16", '"perhaps"', "expected bool; write true or false"),
        ("bf16", "1", "expected bool"),
        ("lora_rank", "64.0", "write 64"),
        ("lora_rank", "true", "expected int"),
        ("dataset_dir", "7", "put it in quotes"),
        ("log_level", "loud", "choices: detail, debug"),
        ("zzzz", "1", "no such key"),
        ("swanlab_lark_secret", "x", "remove the key"),  # no variable serves instead
        ("report_to", "[tensorboard, mlfow]", "'mlfow' is no reporter; choices: none, all"),
        ("cutoff_len", None, "is missing, but by"),
        ("quantization_bit", "8", "it is 4"),
        ("dataset", "exp_sft_train,extra", "it is 'exp_sft_train'"),
        ("model_revision", "dev", "it is 'main'"),
        ("do_train", "false", "trains nothing"),
        ("do_predict", "true", "run.py scores"),
        ("tokenized_path", "data/tokens", "overrides every other key about data"),
        ("overwrite_output_dir", "true", "is resumed without being asked"),
        ("packing", "true", "lets battles attend to each other"),
        ("neat_packing", "true", "takes one token off cutoff_len"),
        ("use_dora", "true", "is refused on a quantized model"),
        ("swanlab_api_key", "0123456789", "set SWANLAB_API_KEY in your shell"),
        ("flash_attn", "fa3", "not implemented"),
        ("seed", "9" * 30, "has 30 digits"),
        # what acts behind the back of merge and scoring
        ("default_system", "Be kind.", "is a system message that scoring does not send"),
        ("split_special_tokens", "true", "tokens in pieces"),
        *((key, "<win>,<lose>", "changes the vocabulary") for key in ("add_tokens", "add_special_tokens")),
        ("rope_scaling", "linear", "in training alone"),
        ("train_from_scratch", "true", "trains on random weights"),
        ("pissa_init", "true", "changes the base that the adapter belongs to"),
        ("resume_from_checkpoint", "true", "--resume takes the last whole checkpoint"),
        ("resume_from_checkpoint", "saves/a/checkpoint-675", "trains nothing where that has more steps"),
        ("early_stopping_steps", "3", "write load_best_model_at_end: true"),
        # what does nothing
        ("freeze_trainable_layers", "1", "does nothing without use_llama_pro"),
        *((f"{method}_rank", "7", "without finetuning_type: full") for method in ("galore", "apollo")),
        ("pref_beta", "0.5", "does nothing without stage: dpo"),
        ("simpo_gamma", "0.7", "without pref_loss: simpo"),
        ("kto_chosen_weight", "2.0", "without stage: kto"),
        ("infer_backend", "vllm", "does nothing without generation"),
        ("max_steps", "0", "limits nothing"),
        ("asft_alpha", "0.3", "does nothing without use_asft_loss"),
        ("hub_strategy", "end", "without push_to_hub"),
        ("temperature", "0.2", "does nothing without generation"),
        ("export_size", "2", "does nothing without a merge"),
        # what is called otherwise today
        ("evaluation_strategy", "steps", "is called eval_strategy today"),
        ("group_by_length", "true", "is called train_sampling_strategy: group_by_length today"),
        ("dpo_beta", "0.1", "is called pref_beta today"),
    ],
)
def test_a_fault_is_found_by_its_key(faults, key, value, part):
    found = faults(**{key: value})
    assert list(found) == [key] and part in found[key]


@pytest.mark.parametrize("name", CASES)
def test_the_recipes_that_went_wrong_in_silence_are_refused(faults, name):
    lines = read_yaml(SHARED / name)
    wanted = {"cutoff_and_rope.yaml": "rope_scaling", "create_new_adapter.yaml": "create_new_adapter"}
    assert wanted.get(name, next(iter(lines))) in faults(its=experiment(quantization_bit=None), **lines)


def test_a_budget_above_the_bases_positions_is_refused(faults, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    own = {"max_position_embeddings": 4096}
    for config, most in [
        *((own, 4096), ({"text_config": own}, 4096), (own | {"rope_scaling": {"factor": 2.0}}, 8192)),
        (own | {"rope_parameters": {"original_max_position_embeddings": 9}}, 4096),
        ({"hidden_size": 64}, None),
    ]:
        (base / "config.json").write_text(json.dumps(config))
        assert faults(its=experiment(model=str(base), cutoff_len=most or 9999)) == {}
        if most:
            its = experiment(model=str(base), cutoff_len=most + 1)
            assert f"is more than the {most:,} positions" in faults(its=its)["cutoff_len"]
            with pytest.raises(ArenaError, match="positions"):
                require_fit_base(its)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("learning_rate", "5e-5"),
        ("lora_target", "[q_proj, v_proj]"),
        ("dataset", "[exp_sft_train]"),
        ("dataset_dir", "./data/exp/"),
        ("report_to", "none"),
        ("eval_strategy", '"no"'),
        ("max_samples", "100"),
        ("lora_alpha", "null"),
        ("lr_scheduler_kwargs", "{num_cycles: 2}"),
        ("pref_beta", "0.1"),  # LLaMA-Factory's default misleads nobody
        ("freeze_trainable_layers", "2"),
        ("neftune_noise_alpha", "5.0"),
        ("train_on_prompt", "true"),
    ],
)
def test_what_a_user_may_choose_is_no_fault(faults, key, value):
    assert faults(**{key: value}) == {}


@pytest.mark.parametrize(
    ("step", "lines", "fault"),
    [
        *(
            ("dpo_judge", {"pref_loss": loss}, ("pref_loss", "silently trains"))
            for loss in ("hinge", "kto_pair", "ipo")
        ),
        *(("dpo_reward", {"pref_loss": loss}, None) for loss in ("sigmoid", "orpo", "simpo")),
        ("dpo_judge", {"dpo_label_smoothing": "0.1"}, None),
        ("dpo_judge", ADAPTER, ("adapter_name_or_path", "the base model as its reference")),
        ("dpo_judge", {**ADAPTER, "ref_model": "org/base-4b", "ref_model_adapters": "saves/a"}, None),
        ("dpo_reward", {"ref_model": "org/other-4b"}, ("ref_model", "another reference than the one that scoring")),
        ("dpo_reward", {"ref_model_adapters": "saves/a"}, ("ref_model_adapters", "does nothing without ref_model")),
        ("dpo_reward", {"ref_model": "org/base-4b"}, None),
        ("sft", ADAPTER, None),
        ("sft", {**ADAPTER, "lora_rank": 32}, ("lora_rank", "whose adapter_config.json decides")),
        ("sft", {**ADAPTER, "create_new_adapter": "true"}, ("create_new_adapter", "the merge holds that one alone")),
        ("sft", {**ADAPTER, "adapter_name_or_path": "saves/a,x"}, ("adapter_name_or_path", "are several adapters")),
        ("sft", {"early_stopping_steps": 3, "load_best_model_at_end": "true"}, None),
        ("rm", {"early_stopping_steps": 3, "metric_for_best_model": "eval_loss"}, None),
        ("rm", {"compute_accuracy": "true"}, ("compute_accuracy", "does nothing without stage: sft")),
        ("dpo_reward", {"simpo_gamma": 1.0, "pref_loss": "simpo"}, None),
        ("merge_sft", {"lora_rank": 32}, ("lora_rank", "does nothing in a merge")),
        ("merge_sft", {"cutoff_len": 9}, ("cutoff_len", "does nothing in a merge")),
        ("merge_sft", {"export_quantization_bit": 4}, ("export_quantization_bit", "cannot score")),
        ("dpo_judge", {"model_name_or_path": "org/base-4b"}, ("model_name_or_path", "'outputs/exp/sft/merged'")),
        ("merge_sft", {"adapter_name_or_path": "saves/other"}, ("adapter_name_or_path", "it is 'saves/")),
        ("merge_sft", {"output_dir": "saves/x"}, ("output_dir", "`llamafactory-cli export` rejects it")),
        ("merge_sft", {"export_device": "aut"}, ("export_device", "did you mean auto?")),
        ("merge_rm", {"stage": None}, ("stage", "it is 'rm'")),
        ("sft", {"streaming": "true", "dataloader_num_workers": "0"}, ("streaming", "dataloader_num_workers")),
        ("sft", {"streaming": "true", "dataloader_num_workers": "2"}, None),
    ],
)
def test_keys_that_do_not_go_together(faults, step, lines, fault, workplace):
    Path("saves/a").mkdir(parents=True)
    found = faults(step, **lines)
    assert list(found) == ([fault[0]] if fault else [])
    assert not fault or fault[1] in found[fault[0]]


@pytest.mark.parametrize("step", ["sft", "dpo_reward", "rm"])
def test_what_does_not_go_with_the_bits_is_refused(faults, step):
    eight, none = experiment(quantization_bit=8), experiment(quantization_bit=None)
    assert list(faults(step, eight, use_dora="true")) == ["use_dora"] and not faults(step, none, use_dora="true")
    assert list(faults(step, eight, quantization_bit=None)) == ["quantization_bit"]
    assert list(faults(step, none, quantization_bit="4")) == ["quantization_bit"]


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
        ({"pure_bf16": True}, OLD, {"pure_bf16": "write pure_bf16: false and fp16: true"}),
        ({"bf16": True}, CPU, {"bf16": "write bf16: false, or use_cpu: true beside it"}),
        ({"bf16": True, "use_cpu": True}, CPU, {}),
        ({"bf16": True}, Devices(accelerator="mps"), {}),
        ({"bf16": True}, Devices(failure="torch is broken"), {}),
        ({"fp16": True}, OLD, {}),
    ],
)
def test_what_a_device_cannot_compute_in(recipe, seen, expected):
    found = dict(device_faults(recipe, seen))
    assert found.keys() == expected.keys() and all(part in found[key] for key, part in expected.items())


def test_what_this_machine_lacks_is_refused_and_a_device_asked_only_where_it_matters(monkeypatch):
    monkeypatch.setattr("factory.recipe_checks.devices", lambda: pytest.fail("asked without need"))
    check_device(Path("sft.yaml"), {"bf16": False, "report_to": "none"})
    with pytest.raises(ArenaError, match=r"report_to: needs wandb, swanlab(.|\n)*flash_attn: needs flash_attn"):
        check_device(Path("sft.yaml"), {"report_to": ["tensorboard", "wandb", "swanlab"], "flash_attn": "fa2"})
    monkeypatch.setattr("factory.recipe_checks.devices", lambda: OLD)
    with pytest.raises(ArenaError, match=r"sft\.yaml: bf16: T4 has no bf16"):
        check_device(Path("sft.yaml"), {"bf16": True})


def test_chat_templates_are_checked(faults):
    assert "no chat template 'qwen33'" in faults(its=experiment(template="qwen33"))["template"]
    told = faults(its=experiment(template="qwen3"))["template"]
    assert "trains on an empty thought before the label; write enable_thinking: false" in told
    assert told.endswith("or template: qwen3_nothink")


def test_all_faults_of_all_recipes_come_in_one_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    its = experiment()
    for step in ("sft", "merge_sft"):
        write_recipe(its, step)
    path = its.recipe("sft")
    text = path.read_text(encoding="utf-8").replace("lora_rank: 64", "lora_rnak: 64")
    path.write_text(text.replace("cutoff_len: 1024", "cutoff_len: 99"), encoding="utf-8")
    its.recipe("merge_sft").write_text("a: [\n", encoding="utf-8")
    with pytest.raises(ArenaError) as caught:
        check_recipes(its, ["sft", "merge_sft", "rm"])
    told = [("sft", "lora_rnak"), ("sft", "cutoff_len"), ("merge_sft", "is"), ("rm", "is")]  # in the order of the files
    assert re.findall(r"factory_configs/exp/(\w+)\.yaml: (\w+)", caught.value.what) == told
    assert "python run.py prepare -e exp" in caught.value.remedy and "--force" in caught.value.remedy


def test_an_untouched_recipe_behind_its_experiment_is_rendered_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_recipe(experiment(), "sft")
    changed = experiment(cutoff_len=512)
    with pytest.raises(ArenaError, match=r"cutoff_len: is 1024, but by .* it is 512"):
        check_recipes(changed, ["sft"])
    assert write_recipe(changed, "sft").state == "updated"
    check_recipes(changed, ["sft"])


def test_a_lora_target_that_no_module_has_changes_nothing_on_disk(place):
    place.edit_recipe("sft", "lora_target: q_projj,v_proj")
    before = place.snapshot()
    done = call("sft", "-e", "exam", "--fresh")
    assert done.exit_code == 1, done.output
    assert "sft.yaml: lora_target: models/tiny has no module 'q_projj'" in done.output
    after = place.snapshot()
    assert {name: after[name] for name in before} == before and "earlier-" not in "".join(after)


def test_targets_are_compared_as_peft_does(place):
    for targets in ("all", "q_proj, v_proj", ["self_attn.q_proj", "lm_head"]):
        assert dict(weight_faults({"model_name_or_path": "models/tiny", "lora_target": targets})) == {}
    found = dict(weight_faults({"model_name_or_path": "models/tiny", "lora_target": "query"}))
    layers = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    assert f"no module 'query'; its layers hold {layers}" in found["lora_target"]


def test_a_recipe_says_of_its_adapter_what_the_adapter_is(place):
    named = {"model_name_or_path": "models/tiny", "adapter_name_or_path": "saves/tiny/lora/exam_sft", "do_train": True}
    for own in ({}, {"lora_rank": 2, "lora_target": "o_proj, q_proj"}):
        assert not dict(weight_faults(named | own))
    for own in ({"lora_rank": 8}, {"lora_rank": 2, "lora_alpha": 16}, {"lora_rank": 2, "lora_target": "all"}):
        ((key, fault),) = weight_faults(named | own)
        assert key == [*own][-1] and "adapter_config.json decides" in fault


def test_an_index_and_a_hubs_cache_are_read_too(tmp_path, monkeypatch):
    index = hub_cache(tmp_path, "some/model") / "model.safetensors.index.json"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    recipe = {"model_name_or_path": "some/model", "lora_target": "q_proj"}
    assert not dict(weight_faults(recipe)), "not on this disk"
    index.write_text(json.dumps({"weight_map": {"model.layers.0.attn.qkv_proj.weight": "1.safetensors"}}))
    assert "some/model has no module 'q_proj'; its layers hold qkv_proj" in dict(weight_faults(recipe))["lora_target"]
    index.write_text("{")
    assert not dict(weight_faults(recipe)), "damaged weights are reported by whoever loads them"
