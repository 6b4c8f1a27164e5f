"""The guards against hostile input: where each stands, what takes it away, and which test must then fail.

    Guard("special tokens are broken up", "texts", "test_a_special_token_in_a_text_is_text", Cut(FILE, OLD, NEW))

`OLD` must stand exactly once in its file; tests/test_guards.py holds the list to that. Several cuts in one guard mean
that either alone would do: `why` says so. What is no text to remove but something that is not done (a secret that is
not put into a command line) is shown by doing it.
"""

from __future__ import annotations

from dataclasses import dataclass

# The kinds of attack, in the order of docs/trust.md.
KINDS = (
    "texts",
    "formulas",
    "screen",
    "pages",
    "templates",
    "YAML",
    "paths",
    "pickles",
    "remote code",
    "secrets",
    "servers",
    "links",
    "size",
)


@dataclass(frozen=True)
class Cut:
    """One edit: `old` stands once in `file` and becomes `new`."""

    file: str
    old: str
    new: str = ""


@dataclass(frozen=True)
class Guard:
    """A guard by name and kind, the test of tests/test_hostile.py that shows it, and what takes it away."""

    name: str
    kind: str
    test: str
    cuts: tuple[Cut, ...]
    why: str = ""


def _guard(name: str, kind: str, test: str, *cuts: tuple[str, str, str], why: str = "") -> Guard:
    return Guard(name, kind, test, tuple(Cut(*cut) for cut in cuts), why)


NEUTRAL, BUDGET, SCREEN = "data_prep/neutral.py", "data_prep/budget.py", "data_prep/screen.py"
EXPERIMENT, WEIGHTS, TABLES = "factory/experiment.py", "factory/weights.py", "data_prep/tables.py"
PAGES, SAFE, PROMPT = "data_prep/parquet_pages.py", "data_prep/safe_template.py", "data_prep/prompt.py"
PROGRESS, EXHIBIT, CHILD = "factory/progress.py", "scoring/exhibit.py", "factory/child.py"
FILES, SOURCE, LOCK = "data_prep/files.py", "data_prep/source.py", "data_prep/lock.py"

_SECTION = "test_a_text_cannot_hold_a_section_of_the_prompt_or_a_verdict"
_TEXTS = [
    _guard(
        "special tokens are broken up",
        "texts",
        "test_a_special_token_in_a_text_is_text",
        (NEUTRAL, "self._pattern.sub(lambda match: match[0][0] + BREAK + match[0][1:], text)", "text"),
    ),
    _guard(
        "special tokens are broken up in pairs too",
        "texts",
        "test_a_special_token_in_a_pair_is_text",
        ("data_prep/pair_budget.py", "return self._neutral.battle(battle)", "return battle"),
    ),
    _guard(
        "LLaMA-Factory's placeholders are broken up",
        "texts",
        "test_what_llamafactory_fills_in_is_text",
        (NEUTRAL, '("<image>", "<video>", "<audio>", "{{idx}}", "{{content}}")', '("<never>",)'),
    ),
    _guard(
        "lines of the judge prompt are broken up", "texts", _SECTION, (NEUTRAL, "if self._line is not None:", "if 0:")
    ),
    _guard(
        "… in any case",
        "texts",
        _SECTION,
        (NEUTRAL, r"(?=(?i:{'|'.join(kinds)}))", r"(?={'|'.join(kinds)})"),
    ),
    _guard(
        "… at any level of heading",
        "texts",
        _SECTION,
        (NEUTRAL, r'rf"\#{{1,6}}{_SPACE}*{spelled}"', r'rf"\#{{{len(words[0])}}}{_SPACE}*{spelled}"'),
    ),
    _guard(
        "… behind every sign at which a line may begin",
        "texts",
        _SECTION,
        (NEUTRAL, r'_ENDS = "\n\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029"', r'_ENDS = "\n"'),
    ),
    _guard(
        "… and where the cut of a long text makes one",
        "texts",
        "test_a_cut_makes_no_section_of_what_was_within_a_line",
        (BUDGET, "texts[field] = self._neutral(kept)", "texts[field] = kept"),
    ),
    _guard(
        "texts are joined to the rendered pieces, never rendered",
        "texts",
        "test_jinja_in_a_vote_is_text",
        (
            PROMPT,
            "return self.skeleton(battle.turns, dropped).fill(texts_of(battle))",
            "text = self.skeleton(battle.turns, dropped).fill(texts_of(battle))\n"
            "        return sandbox().from_string(text).render(labels=0)",
        ),
    ),
]
_FORMULAS = [
    _guard(
        "prepare warns of ids that a spreadsheet would run",
        "formulas",
        "test_ids_like_formulas_stay_as_they_are_and_are_warned_of",
        ("data_prep/readers.py", "self.formulas += is_formula(battle.id)", "pass"),
    ),
    _guard(
        "score --input warns of them",
        "formulas",
        "test_ids_like_formulas_are_warned_of_where_they_are_scored",
        ("scoring/stage.py", "formulas = sum(map(is_formula, job.ids()))", "formulas = 0"),
    ),
]
_ON_SCREEN = [
    _guard(
        "errors show control characters as signs",
        "screen",
        "test_errors_cannot_steer_a_terminal",
        ("data_prep/errors.py", "return printable(", "return ("),
    ),
    _guard(
        "so do notes",
        "screen",
        "test_notes_and_live_lines_cannot_steer_a_terminal",
        (PROGRESS, "print(printable(text), file=self.stream, flush=True)", "print(text, file=self.stream)"),
    ),
    _guard(
        "so do live lines",
        "screen",
        "test_notes_and_live_lines_cannot_steer_a_terminal",
        (PROGRESS, "print(printable(text), file=self.show.stream, flush=True)", "print(text, file=self.show.stream)"),
    ),
    _guard(
        "so does the bar's label",
        "screen",
        "test_a_bar_cannot_steer_a_terminal",
        (PROGRESS, "show, printable(label), start_step", "show, label, start_step"),
    ),
    _guard(
        "so do notes above a bar",
        "screen",
        "test_a_bar_cannot_steer_a_terminal",
        (PROGRESS, "self._bar.console.print(printable(text), ", "self._bar.console.print(text, "),
    ),
    _guard(
        "so does the head of a shown battle",
        "screen",
        "test_a_battle_that_is_shown_cannot_steer_a_terminal",
        (EXHIBIT, "Text(visible(head), ", "Text(head, "),
    ),
    _guard(
        "so do its facts",
        "screen",
        "test_a_battle_that_is_shown_cannot_steer_a_terminal",
        (EXHIBIT, "Text(visible(line))", "Text(line)"),
    ),
    _guard(
        "so does its prompt",
        "screen",
        "test_a_battle_that_is_shown_cannot_steer_a_terminal",
        (EXHIBIT, "_lit(visible(shown.prompts[name]))", "_lit(shown.prompts[name])"),
    ),
    _guard(
        "ids in errors are quoted and shortened",
        "screen",
        "test_an_id_cannot_forge_a_line_of_an_error",
        (SCREEN, 'return ascii(text if len(text) <= _LONGEST_NAME else f"{text[:_LONGEST_NAME]}…")', "return text"),
    ),
    _guard(
        "an id that stands twice is quoted",
        "screen",
        "test_a_hostile_id_in_a_real_run",
        ("data_prep/readers.py", "{identity[:80]!a} stands in", "'{identity}' stands in"),
    ),
]
_ON_PAGES = [
    _guard(
        "the pages escape everything",
        "pages",
        "test_html_in_ids_and_flags_is_escaped_in_the_report",
        ("scoring/page.py", "autoescape=True", "autoescape=False"),
    ),
]
_STRANGER = "test_a_strangers_judge_prompt_cannot_reach_out_or_run_on"
_RENDERED = [
    _guard(
        "a judge prompt holds nothing but what places texts",
        "templates",
        _STRANGER,
        (PROMPT, "unsafe = faults(environment.parse(source))", "unsafe = []"),
    ),
    _guard(
        "a judge prompt reaches no Python",
        "templates",
        f"{_STRANGER}[{{{{ cycler.__init__.__globals__.os.system('touch pwned') }}}}]",
        (PROMPT, "unsafe = faults(environment.parse(source))", "unsafe = []"),
        (SAFE, "from jinja2.sandbox import ImmutableSandboxedEnvironment\n", "from jinja2 import Environment\n"),
        (SAFE, "environment = ImmutableSandboxedEnvironment(", "environment = Environment("),
        (SAFE, "    environment.globals.clear()  # range, lipsum, cycler, …\n", ""),
        why="what a template may hold, Jinja's sandbox and the missing globals each stop it alone",
    ),
    _guard(
        "a value that is set does not grow",
        "templates",
        _STRANGER,
        (SAFE, '_GROWING = ("Concat", "Add")', "_GROWING = ()"),
    ),
    _guard(
        "one loop, over turns",
        "templates",
        _STRANGER,
        (SAFE, "(in_loop or node.recursive or not _over_turns(node.iter))", "False"),
    ),
    _guard(
        "a model's chat template is rendered in the sandbox",
        "templates",
        "test_a_models_chat_template_cannot_reach_out",
        (
            "factory/model_table.py",
            "from jinja2.sandbox import ImmutableSandboxedEnvironment",
            "from jinja2 import Environment",
        ),
        ("factory/model_table.py", "environment = ImmutableSandboxedEnvironment(", "environment = Environment("),
    ),
    _guard(
        "recipe templates are rendered in the sandbox",
        "templates",
        "test_a_recipe_template_cannot_reach_out",
        (
            "factory/recipe.py",
            "from jinja2.sandbox import ImmutableSandboxedEnvironment",
            "from jinja2 import Environment",
        ),
        ("factory/recipe.py", "environment = ImmutableSandboxedEnvironment(", "environment = Environment("),
    ),
]
_LOADED = "content = OmegaConf.to_container(OmegaConf.load(StringIO(text)))"
_BOMBS = "test_yaml_bombs_are_refused_at_once"
_CONFIGURED = [
    _guard(
        "YAML makes plain values",
        "YAML",
        "test_yaml_makes_no_objects",
        (EXPERIMENT, _LOADED, "import yaml; content = yaml.unsafe_load(text)"),
    ),
    _guard(
        "${…} in YAML stays text",
        "YAML",
        "test_yaml_reads_no_environment",
        (EXPERIMENT, _LOADED, "content = OmegaConf.to_container(OmegaConf.load(StringIO(text)), resolve=True)"),
    ),
    _guard(
        "aliases of aliases are counted before they are written out",
        "YAML",
        f"{_BOMBS}[aliases]",
        (EXPERIMENT, "        if total > _MOST_VALUES:\n", "        if False:\n"),
    ),
    _guard(
        "YAML nests 32 levels at most",
        "YAML",
        f"{_BOMBS}[deep]",
        (EXPERIMENT, "if len(open_nodes) > _DEEPEST:", "if False:"),
    ),
    _guard("YAML is a page or two", "YAML", f"{_BOMBS}[long]", (EXPERIMENT, "if len(text) > _LARGEST:", "if False:")),
]
_LED_OUT = [
    _guard(
        "an experiment's name is no path",
        "paths",
        "test_an_experiments_name_is_no_path",
        (EXPERIMENT, 'if not _NAME.fullmatch(name) or ".." in name:', "if False:"),
    ),
    _guard(
        "a data set's file lies in the data folder",
        "paths",
        "test_a_data_sets_file_lies_in_its_folder",
        ("factory/inputs.py", 'if Path(file).is_absolute() or ".." in Path(file).parts:', "if False:"),
    ),
    _guard(
        "of an archive the tables alone are unpacked, under their bare names",
        "paths",
        "test_an_archives_paths_mean_nothing",
        (SOURCE, 'PurePosixPath(m.filename.replace("\\\\", "/")).name) for m', "m.filename) for m"),
        (SOURCE, '(folder / name).open("wb")', '_made(folder / name).open("wb")'),
        (
            SOURCE,
            "def _tables_in(",
            "def _made(path):\n    path.parent.mkdir(parents=True, exist_ok=True)\n    return path\n\n\n"
            "def _tables_in(",
        ),
        (SOURCE, 'and name[0] not in "._"]\n    names', "]\n    names"),
        why="the rule about hidden files would leave out a path that begins with dots",
    ),
    _guard(
        "other archives are not opened",
        "paths",
        "test_no_archive_is_unpacked",
        (TABLES, "for magic, (what, remedy) in _OTHER_MAGIC.items():", "for magic, (what, remedy) in ():"),
    ),
]
_CODE_IN_WEIGHTS = [
    _guard(
        "a folder of pickles is refused",
        "pickles",
        "test_pickled_weights_are_refused",
        (WEIGHTS, "    if pickles:\n", "    if False:\n"),
    ),
    _guard(
        "… before a training starts",
        "pickles",
        "test_a_base_of_pickles_stops_a_training_before_it_starts",
        ("factory/steps.py", "    refuse_pickles(recipe)\n    adapter, folder", "    adapter, folder"),
    ),
    _guard(
        "scoring reads safetensors alone",
        "pickles",
        "test_scoring_asks_for_safetensors_and_runs_no_code_of_the_folder",
        ("scoring/engine.py", "            use_safetensors=True,\n", ""),
    ),
    _guard(
        "so do rewards",
        "pickles",
        "test_scoring_asks_for_safetensors_and_runs_no_code_of_the_folder",
        ("scoring/rewards.py", "dtype=dtype, use_safetensors=True, **options", "dtype=dtype, **options"),
    ),
    _guard(
        "so does the dequantised base",
        "pickles",
        "test_scoring_asks_for_safetensors_and_runs_no_code_of_the_folder",
        ("factory/dequantised.py", "            use_safetensors=True,\n", ""),
    ),
    _guard(
        "an adapter is safetensors",
        "pickles",
        "test_an_adapter_of_pickles_is_not_opened",
        (
            "scoring/rewards.py",
            '    missing = [name for name in ("adapter_config.json", "adapter_model.safetensors") if',
            "    missing = [name for name in () if",
        ),
    ),
]
_REMOTE = [
    _guard(
        "scoring runs no code of the model's folder",
        "remote code",
        "test_scoring_asks_for_safetensors_and_runs_no_code_of_the_folder",
        ("scoring/engine.py", "            trust_remote_code=False,\n", ""),
    ),
    _guard(
        "trust_remote_code is true or false, nothing that is like it",
        "remote code",
        "test_remote_code_is_trusted_only_in_words",
        (EXPERIMENT, "trust_remote_code: StrictBool = False", "trust_remote_code: bool = False"),
    ),
    _guard(
        "every command warns of it",
        "remote code",
        "test_remote_code_is_warned_of",
        (EXPERIMENT, "if not self.trust_remote_code:", "if True:"),
    ),
    _guard(
        "a recipe cannot switch it on",
        "remote code",
        "test_a_recipe_cannot_trust_remote_code_by_itself",
        ("factory/recipe.py", '"trust_remote_code"', '"cutoff_len"'),
    ),
]
_KEPT_SECRET = [
    _guard(
        "errors and notes show a secret's name",
        "secrets",
        "test_no_secret_in_errors_or_notes",
        (SCREEN, "return visible(hide_secrets(text))", "return visible(text)"),
    ),
    _guard(
        "so do the logs of children that ended",
        "secrets",
        "test_no_secret_in_a_childs_log_or_command_line",
        (CHILD, "                _hide_secrets(log)\n", "                pass\n"),
    ),
    _guard(
        "a command line gets no secret",
        "secrets",
        "test_no_secret_in_a_childs_log_or_command_line",
        (
            CHILD,
            "                    command,\n                    stdin",
            "                    [*command, *secrets().values()],\n                    stdin",
        ),
    ),
    _guard(
        "a recipe with a token is refused",
        "secrets",
        "test_a_token_in_a_recipe_is_refused",
        ("factory/arguments.py", "if key in _SECRETS:", "if False:"),
    ),
    _guard(
        "provenance names what it names, not the environment",
        "secrets",
        "test_provenance_holds_no_secret",
        ("scoring/provenance.py", '"hardware": hardware(),', '"hardware": {**hardware(), **os.environ},'),
    ),
]
_EVERYWHERE = ".".join("0000")  # not written out: a test looks for it in all of our code
_SERVED = [
    _guard(
        "LLaMA-Factory's servers listen to this machine",
        "servers",
        "test_servers_listen_to_this_machine_only",
        ("factory/launcher.py", "    _serve_this_machine_only()\n", ""),
    ),
    _guard(
        "so does what run.py serves",
        "servers",
        "test_every_page_of_ours_is_served_to_this_machine_only",
        ("run.py", '"--host", default="127.0.0.1"', f'"--host", default="{_EVERYWHERE}"'),
    ),
    _guard(
        "so does the board by itself",
        "servers",
        "test_every_page_of_ours_is_served_to_this_machine_only",
        ("factory/webui.py", '"--host", default="127.0.0.1"', '"--host", default=None'),
    ),
    _guard(
        "so does the watch page by itself",
        "servers",
        "test_every_page_of_ours_is_served_to_this_machine_only",
        ("scoring/watch_page.py", '"--host", default="127.0.0.1"', '"--host", default=None'),
    ),
    _guard(
        "no page is shared through Gradio's tunnel",
        "servers",
        "test_every_page_of_ours_is_served_to_this_machine_only",
        ("factory/webui.py", "share=False", "share=True"),
    ),
    _guard(
        "another address is warned of",
        "servers",
        "test_every_page_of_ours_is_served_to_this_machine_only",
        ("factory/board.py", "    if host in LOOPBACK:\n", "    if host:\n"),
    ),
    _guard(
        "no address for every network in our code",
        "servers",
        "test_no_code_of_ours_binds_to_every_network",
        ("factory/webui.py", '"--host", default="127.0.0.1"', f'"--host", default="{_EVERYWHERE}"'),
    ),
]
_LINKED = [
    _guard(
        "a link out of outputs/ is refused",
        "links",
        "test_a_link_out_of_outputs_is_not_followed",
        (LOCK, "if not link.resolve().is_relative_to(root.resolve()):", "if False:"),
    ),
    _guard(
        "of a replaced link the link alone is removed",
        "links",
        "test_what_a_replaced_link_leads_to_survives",
        (FILES, "        folder.unlink()\n    else:", "        shutil.rmtree(folder.resolve())\n    else:"),
    ),
    _guard(
        "a file takes a link's place instead of being written through it",
        "links",
        "test_what_a_replaced_link_leads_to_survives",
        (FILES, "        temporary.replace(path)\n", "        shutil.copyfile(temporary, path)\n"),
    ),
]
_CELLS = "test_a_cell_of_two_gigabytes_costs_its_row_and_no_memory"
_UNPACKED = "test_a_small_parquet_file_does_not_unpack_to_gigabytes"
_SIZED = [
    _guard(
        "a line of a CSV is read to 128 Mi characters",
        "size",
        f"{_CELLS}[one line]",
        (TABLES, "line = self._text.readline(_LARGEST_LINE)", "line = self._text.readline()"),
    ),
    _guard(
        "a cell of a CSV has 64 Mi characters at most",
        "size",
        f"{_CELLS}[many lines]",
        (TABLES, "csv.field_size_limit(max(csv.field_size_limit(), _LARGEST_CELL))", "csv.field_size_limit(1 << 40)"),
    ),
    _guard(
        "a cell of a parquet file has 64 MiB at most",
        "size",
        f"{_UNPACKED}[cells-]",
        (TABLES, "if any(batch.column(name).nbytes > _LARGEST_CELL for name in names):", "if False:"),
    ),
    _guard(
        "rows of a parquet file are read as many at a time as fit",
        "size",
        f"{_UNPACKED}[rows-]",
        (PAGES, "if sum(each.bytes_of(n) for each in columns.values()) <= LARGEST_BATCH", "if True"),
    ),
    _guard(
        "… whose pages count together",
        "size",
        f"{_UNPACKED}[pages-]",
        (PAGES, "return _widest(self.pieces, rows) + rows * self.entry", "return rows * self.entry"),
    ),
    _guard(
        "a page of a parquet file unpacks to 128 MiB at most",
        "size",
        f"{_UNPACKED}[page-]",
        (PAGES, "if chunk.largest > LARGEST_PAGE:", "if False:"),
    ),
    _guard(
        "lists of a parquet file are counted before they are unpacked",
        "size",
        f"{_UNPACKED}[lists-]",
        (
            PAGES,
            '        raise _refused(path, f"the lists of {where} may take',
            '        return 0\n        raise _refused(path, f"the lists of {where} may take',
        ),
    ),
    _guard(
        "a zip archive's unpacked size is looked at first",
        "size",
        "test_an_archive_that_unpacks_without_end_is_refused_before",
        (SOURCE, "if (size := sum(member.file_size for member, _ in found)) > _LARGEST:", "if (size := 0):"),
    ),
    _guard(
        "a cell that nests too deeply costs its row",
        "size",
        "test_a_cell_that_nests_a_hundred_thousand_deep_costs_its_row",
        ("data_prep/cells.py", "except (ValueError, RecursionError) as error:", "except ValueError as error:"),
    ),
    _guard(
        "JSON that nests too deeply is damage",
        "size",
        "test_json_that_nests_too_deeply_is_damage",
        (
            FILES,
            '    except RecursionError:\n        raise ValueError("nested too deeply") from None\n',
            "    except RecursionError:\n        return {}\n",
        ),
    ),
    _guard(
        "the turns to drop are searched for by halving",
        "size",
        "test_ten_thousand_turns_are_fitted_in_time",
        (
            BUDGET,
            "bisect_left(range(turns), True, lo=1, key=lambda d: not too_long(d))",
            "next((d for d in range(1, turns) if not too_long(d)), turns)",
        ),
    ),
]
GUARDS = (
    *_TEXTS,
    *_FORMULAS,
    *_ON_SCREEN,
    *_ON_PAGES,
    *_RENDERED,
    *_CONFIGURED,
    *_LED_OUT,
    *_CODE_IN_WEIGHTS,
    *_REMOTE,
    *_KEPT_SECRET,
    *_SERVED,
    *_LINKED,
    *_SIZED,
)
