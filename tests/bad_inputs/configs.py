"""Broken configurations: experiments, judge prompts, recipes, recipe templates, names."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.bad_inputs.place import EXPERIMENT, PREPARE, ROOT, SFT, Case, Place, nothing, remove, write

DPO = ("dpo", "-e", "exam", "--view", "judge")
YAML = "factory_configs/exam/experiment.yaml"
RECIPE = "factory_configs/exam/sft.yaml"
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefg", "bcdefgh", strict=True)
)


def key(text: str) -> Callable[[Place], None]:
    return lambda place: place.edit_experiment(text)


def recipe(text: str, step: str = "sft") -> Callable[[Place], None]:
    return lambda place: place.edit_recipe(step, text)


def prompt(put: Callable[[Place], object]) -> Callable[[Place], object]:
    return lambda place: (put(place), place.edit_experiment("prompt_template: mine.j2\n"))


def linked(target: str) -> Callable[[Place], object]:
    return lambda place: Path("mine.j2").symlink_to(target)


def render(edit: Callable[[Path], None]) -> Callable[[], Any]:
    def call() -> None:
        from common.experiment import load_experiment
        from factory.recipes import render_recipe

        templates = Path(shutil.copytree(ROOT / "templates", "own_templates"))
        edit(templates / "sft.yaml.j2")
        try:
            render_recipe(load_experiment("exam"), "sft", templates)
        finally:
            shutil.rmtree(templates)

    return call


SYNTAX = [
    Case(f"yaml_{name}", write(YAML, text), PREPARE, words)
    for name, text, words in [
        ("empty", "", ("3 fault(s)", "model: is missing")),
        ("list", "- model\n- template\n", ("must be a YAML mapping",)),
        ("tab", "model:\n\ttiny: 1\n", ("is not readable YAML", "experiment.yaml")),
        ("open_list", "model: [x\n", ("is not readable YAML", "in line 2")),
        ("no_space", f"{EXPERIMENT}precision:fp32\n", ("in line 11", "a space after each colon", "experiment.yaml")),
        ("no_space_between", f"a: 1\nseed:7\n{EXPERIMENT}", ("is not readable YAML", "a space after each colon")),
        ("double_key", f"{EXPERIMENT}seed: 1\n", ("is not readable YAML", "seed")),
        ("unknown_alias", "model: *x\n", ("is not readable YAML", "undefined alias")),
        ("alias_of_itself", "model: &x [*x]\n", ("is not readable YAML",)),
        ("aliases_of_aliases", BOMB, ("holds more than 10,000 values", "a page or two")),
        ("deep", "model: " + "[" * 20_000, ("nests more than 32 levels deep",)),
        ("deep_by_indent", "".join(f"{' ' * i}a:\n" for i in range(60)), ("nests more than 32",)),
        ("long", "seed: 1 # x\n" * 30_000, ("is longer than",)),
        ("python_object", "model: !!python/object/apply:os.system [ls]\n", ("is not readable YAML",)),
        ("empty_integer", 'seed: !!int ""\n', ("a value that does not fit its tag",)),
        ("no_boolean", "swap_tta: !!bool maybe\n", ("a value that does not fit its tag",)),
        ("huge_integer", f"seed: {'9' * 5000}\n", ("is not readable YAML",)),
        ("list_as_key", "? [a]\n: b\n", ("is not readable YAML",)),
        ("nul", "model: \0\n", ("is not readable YAML",)),
        ("two_documents", f"{EXPERIMENT}---\nseed: 1\n", ("is not readable YAML",)),
        ("open_interpolation", "model: '${" * 5 + "'\n", ("is not readable YAML",)),
        ("deep_interpolation", f"model: '{'${' * 2000}{'}' * 2000}'\n", ("is not readable YAML",)),
        ("merge_of_a_number", "<<: 3\n", ("is not readable YAML",)),
    ]
]
ENCODINGS = [
    Case("yaml_utf16", write(YAML, EXPERIMENT.encode("utf-16")), PREPARE, ("is not readable YAML",)),
    Case("yaml_latin1", write(YAML, EXPERIMENT.encode() + b"# \xfc\n"), PREPARE, ("is not readable YAML",)),
    Case("yaml_is_binary", write(YAML, bytes(range(256))), PREPARE, ("is not readable YAML",)),
]
KEYS = [
    Case(f"key_{name}", key(text), PREPARE, ("fault(s) in the experiment", *words))
    for name, text, words in [
        ("unknown", "modle: x\n", ("modle: there is no such key; did you mean model?",)),
        ("numeric", "7: x\n", ("7: there is no such key",)),
        ("model_a_number", "model: 7\n", ("model: must be a valid string, not 7",)),
        ("model_empty", 'model: ""\n', ("model:",)),
        ("template_null", "template: null\n", ("template: must be a valid string, not None",)),
        ("cutoff_a_word", "cutoff_len: many\n", ("cutoff_len: must be a valid integer",)),
        ("cutoff_too_small", "cutoff_len: 8\n", ("cutoff_len: must be greater than or equal to 32",)),
        ("cutoff_infinite", "cutoff_len: .inf\n", ("cutoff_len",)),
        ("cutoff_interpolated", "cutoff_len: ${seed}\n", ("cutoff_len",)),
        ("bits", "quantization_bit: 3\n", ("quantization_bit: must be 4 or 8",)),
        ("seed_negative", "seed: -1\n", ("seed: must be greater than or equal to 0",)),
        ("labels_equal", "labels: {a: A, b: A, tie: C}\n", ("labels: the three verdict labels must be distinct",)),
        ("labels_a_list", "labels: [A, B, C]\n", ("labels:",)),
        ("labels_unknown", "labels: {c: A}\n", ("labels.c: there is no such key",)),
        ("share_one", "prompt_share: 1\n", ("prompt_share: ", "less than 1")),
        ("share_nan", "prompt_share: .nan\n", ("prompt_share",)),
        ("valid_share_all", "valid_share: 1\n", ("valid_share: must be less than 0.9",)),
        ("prior_sum", "target_prior: {a: 0.5, b: 0.4, tie: 0.3}\n", ("a + b + tie must be 1",)),
        ("rejected", "dpo_rejected: both\n", ("dpo_rejected: must be 'each' or 'one'",)),
        ("start", "start_from: {rm: dpo}\n", ("start_from.rm",)),
        ("remote_code", 'trust_remote_code: "yes"\n', ("trust_remote_code: must be a valid boolean",)),
        ("recipes_a_list", "recipes: [sft]\n", ("recipes:",)),
        ("unknown_step", "recipes: {ppo: {}}\n", ("no such step: ppo",)),
        ("two_faults", "seed: x\ncutoff_len: y\n", ("2 fault(s)", "seed", "cutoff_len")),
        ("seed_of_32_digits", f"seed: {'9' * 32}\n", ("seed: must be less than 4294967296",)),
        ("cutoff_endless", "cutoff_len: 999999999999\n", ("cutoff_len: must be less than or equal to 1048576",)),
        ("gate_endless", "merge_gate: {rows: 99999999999}\n", ("merge_gate.rows: must be less",)),
        ("revision_a_path", "revision: ../../x\n", ("revision:", "pattern")),
        ("revision_absolute", "revision: /x\n", ("revision:", "pattern")),
        ("description_steers", 'description: "a\\e[2Jb"\n', ("description: must hold no control characters",)),
        ("description_nul", 'description: "a\\0b"\n', ("description: must hold no control characters",)),
        ("description_endless", f"description: {'x' * 2000}\n", ("description: String should have at most 1000",)),
        ("model_of_two_lines", 'model: "x\\npush_to_hub: true"\n', ("model: must be one line",)),
        ("label_of_two_lines", 'labels: {a: "A\\nB"}\n', ("labels.a: must be one line",)),
        ("prompt_above", "prompt_template: ../mine.j2\n", ("prompt_template: must be a path inside the project",)),
        ("prompt_absolute", "prompt_template: /dev/zero\n", ("prompt_template: must be a path inside",)),
    ]
]
FIRST_VALUES = [
    Case(f"first_value_{name}", key(f"recipes: {{sft: {{{text}}}}}\n"), PREPARE, words)
    for name, text, words in [
        ("unknown", "lerning_rate: 1", ("recipes.sft.lerning_rate", "did you mean learning_rate?")),
        ("wrong_type", "lora_rank: many", ("recipes.sft.lora_rank", "expected int")),
        ("wrong_choice", "lr_scheduler_type: cosin", ("did you mean cosine?",)),
        ("shared", "cutoff_len: 9", ("recipes.sft.cutoff_len", "change it there")),
        ("nan", "learning_rate: .nan", ("recipes.sft.learning_rate", "is not a finite number")),
        ("token", "hf_hub_token: hf_x", ("recipes.sft.hf_hub_token", "set HF_TOKEN")),
        ("derived", "compute_dtype: fp16", ("recipes.sft.compute_dtype", "remove the key")),
        ("of_several_steps", "lora_rnk: 8}, rm: {learning_rate: fast", ("2 fault(s)", "sft.lora_rnk", "rm.learning")),
    ]
]
PLACES = [
    Case("no_experiment", nothing, ("sft", "-e", "nowhere"), ("no experiment 'nowhere'", "choose one of: exam"), 2),
    Case("no_judge_prompt", key("prompt_template: none.j2\n"), PREPARE, ("none.j2: the judge prompt cannot be read",)),
    Case("judge_prompt_a_link_out", prompt(linked("/etc/hostname")), PREPARE, ("it lies outside of the project",)),
    Case("judge_prompt_a_device", prompt(linked("/dev/zero")), PREPARE, ("it lies outside of the project",)),
    Case("cutoff_above_positions", key("cutoff_len: 600\n"), PREPARE, ("the 512 positions of models/", "cutoff_len")),
    Case("judge_prompt_a_folder", key("prompt_template: models\n"), PREPARE, ("the judge prompt cannot be read",)),
    Case("cutoff_below_the_prompt", key("cutoff_len: 40\n"), PREPARE, ("the judge prompt alone takes", "cutoff_len")),
]
TEXTS = "{{ turn.prompt }}{{ turn.a }}{{ turn.b }}"
LOOP = "{% for turn in turns %}" + TEXTS + "{% endfor %}"
PROMPTS = [
    Case(f"prompt_{name}", prompt(write("mine.j2", text)), PREPARE, ("mine.j2", *words))
    for name, text, words in [
        ("empty", "", ("places 0 texts instead of 3",)),
        ("open_block", "{% for turn in turns %}", ("is not a valid Jinja template",)),
        ("open_brace", "{{ turns", ("is not a valid Jinja template",)),
        ("unknown_name", f"{{{{ nothing }}}}{LOOP}", ("cannot be rendered: 'nothing' is undefined",)),
        ("unknown_field", LOOP.replace("turn.a", "turn.answer"), ("answer",)),
        ("unknown_filter", "{% for turn in turns %}{{ turn.a|nice }}{% endfor %}", ("mine.j2",)),
        ("no_answer", "{% for turn in turns %}{{ turn.a }}{% endfor %}", ("places 1 texts instead of 3",)),
        ("text_twice", LOOP * 2, ("places 6 texts instead of 3",)),
        ("first_turn_only", "{{ turns[0].prompt }}{{ turns[0].a }}{{ turns[0].b }}", ("with 2 turn(s)",)),
        ("filter", LOOP.replace("turn.a", "turn.a|trim"), ("changes or tests the texts",)),
        ("test", LOOP.replace("{{ turn.a }}", "{% if turn.a == 'x' %}!{% endif %}{{ turn.a }}"), ("changes or tests",)),
        ("range", "{% for i in range(9) %}{% endfor %}" + LOOP, ("Call is not allowed", "only one loop")),
        ("deep", "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}" + LOOP, ("is not a valid Jinja template",)),
        ("long", "x" * 70_000 + LOOP, ("is longer than",)),
        ("not_utf8", b"\xff" + LOOP.encode(), ("the judge prompt cannot be read",)),
        ("division", "{{ 1 // 0 }}" + LOOP, ("mine.j2",)),
    ]
]
RECIPES = [
    Case("recipe_missing", remove(RECIPE), SFT, ("sft.yaml: is missing", "prepare -e exam")),
    Case("recipe_empty", write(RECIPE, ""), SFT, ("8 fault(s)", "do_train")),
    Case("recipe_broken", write(RECIPE, "stage: [sft"), SFT, ("is not readable YAML",)),
    Case("recipe_bomb", write(RECIPE, BOMB), SFT, ("holds more than 10,000 values",)),
    Case("recipe_not_utf8", write(RECIPE, b"\xff\xfe"), SFT, ("is not readable YAML",)),
    *(
        Case(f"recipe_{name}", recipe(text), SFT, ("sft.yaml", "found before anything was started", *words))
        for name, text, words in [
            ("unknown_key", "lora_ranks: 3\n", ("did you mean lora_rank?",)),
            ("quoted_number", 'learning_rate: "1e-4"\n', ("write it without quotes",)),
            ("no_for_a_choice", "eval_strategy: no\n", ('write eval_strategy: "no"',)),
            ("unknown_choice", "lr_scheduler_type: cosinus\n", ("did you mean cosine?",)),
            ("null", "learning_rate: null\n", ("may not be null",)),
            ("nan", "learning_rate: .nan\n", ("is not a finite number",)),
            ("negative_rate", "learning_rate: -1.0e-4\n", ("must be above 0",)),
            ("no_rank", "lora_rank: 0\n", ("must be at least 1",)),
            ("dropout", "lora_dropout: 1.5\n", ("must lie in [0, 1)",)),
            ("interpolation", "output_dir: ${oc.env:HOME}\n", ("does not resolve interpolations",)),
            ("other_model", "model_name_or_path: other/model\n", ("by factory_configs/exam/experiment.yaml",)),
            ("other_output", "output_dir: /tmp/elsewhere\n", ("output_dir", "write that here")),
            ("other_cutoff", "cutoff_len: 9\n", ("cutoff_len", "it is 300")),
            ("remote_code", "trust_remote_code: true\n", ("trust_remote_code", "it is False")),
            ("space", "output_dir: my adapters\n", ("output_dir: is 'my adapters'",)),
            ("reporter", "report_to: wondb\n", ("is no reporter",)),
            ("val_size", "val_size: 0.1\n", ("splits by row",)),
            ("full", "finetuning_type: full\n", ("needs a LoRA adapter",)),
            ("token", "hub_token: hf_x\n", ("a secret in a file", "HF_TOKEN")),
            ("two_faults", "lora_rank: 0\nlora_ranks: 1\n", ("2 fault(s)",)),
        ]
    ),
    Case("merge_quantized", recipe("quantization_bit: 4\n", "merge_sft"), SFT, ("merge_sft.yaml: quantization_bit",)),
    Case("merge_trains", recipe("learning_rate: 1.0e-4\n", "merge_sft"), SFT, ("`llamafactory-cli export` rejects",)),
    Case("dpo_hinge", recipe("pref_loss: hinge\n", "dpo_judge"), DPO, ("silently trains plain sigmoid",)),
    Case("dpo_smoothing", recipe("dpo_label_smoothing: 0.5\n", "dpo_judge"), DPO, ("must lie in [0, 0.5)",)),
]
TEMPLATES = [
    Case(f"template_{name}", nothing, render(edit), words)
    for name, edit, words in [
        ("missing", Path.unlink, ("the template fails", "restore it from git")),
        ("open_block", lambda f: f.write_text("{% if x %}"), ("the template fails", "sft.yaml.j2 line 1")),
        ("unknown_name", lambda f: f.write_text("a: {{ nothing }}"), ("'nothing' is undefined",)),
        ("insides", lambda f: f.write_text("{{ experiment.__class__.__mro__ }}"), ("the template fails",)),
        ("endless", lambda f: f.write_text("{% for i in range(999999) %}{% endfor %}"), ("the template fails",)),
        ("deep", lambda f: f.write_text("{{ " + "(" * 3000 + ")" * 3000 + " }}"), ("the template fails",)),
        ("not_utf8", lambda f: f.write_bytes(b"\xff"), ("the template fails",)),
        ("foreign_key", lambda f: f.write_text("{{ shared('lora_rank') }}"), ("the template fails: 'lora_rank'",)),
        ("key_twice", lambda f: f.write_text("lora_rank: 1\nlora_rank: 2\n"), ("writes twice: lora_rank",)),
    ]
]
HOSTS = [
    Case(f"host_{name}_{call[0]}", nothing, (*call, "--no-open", "--host", host), words, code=2)
    for call in (("board",), ("watch", "-e", "exam", "--stage", "sft"))
    for name, host, words in [
        ("empty_label", "a..b", ("'a..b' is no address of this machine", "--host 127.0.0.1")),
        ("unknown", "no.such.host.invalid", ("is no address of this machine", "--host 127.0.0.1")),
        ("url", "http://localhost", ("is no address of this machine", "--host 127.0.0.1")),
        ("ipv6", "::1", ("is no address of this machine", "--host 127.0.0.1")),
        ("long_label", "a" * 70, ("is no address of this machine",)),
        ("with_port", "127.0.0.1:80", ("is no address of this machine", "--port")),
    ]
]
WATCH = ("watch", "-e", "exam", "--score", "20", "--json", "--stage")
WATCHES = [
    Case(f"watch_{stage}_has_no_labels", nothing, (*WATCH, stage), (f"{stage} has rewards", "leave --score out"), 2)
    for stage in ("rm", "dpo_reward")
]
NEWS = [
    Case(f"new_{name}", nothing, ("new", *arguments), words, code=2)
    for name, arguments, *words in [
        ("path", ("../x", "--model", "Qwen/Qwen3-8B"), "is not an experiment's name"),
        ("over_another", ("exam", "--model", "google/gemma-2-9b-it"), "exists already", "remedy"),
        ("without_model", ("mine",), "--model"),
        ("unknown", ("mine", "--model", "me/unknown"), "for a hub id, name its chat template with --template"),
        ("bits", ("mine", "--model", "Qwen/Qwen3-8B", "--bits", "2"), "--bits"),
        ("cutoff", ("mine", "--model", "Qwen/Qwen3-8B", "--cutoff", "8"), "--cutoff"),
    ]
]
CASES = [*NEWS, *SYNTAX, *ENCODINGS, *KEYS, *FIRST_VALUES, *PLACES, *PROMPTS, *RECIPES, *TEMPLATES, *HOSTS, *WATCHES]
