"""Properties of recipes: whatever value experiment.yaml gives is rendered to YAML that reads back as that value."""

from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import ArenaError
from common.experiment import parse_experiment, read_yaml
from common.llamafactory_schema import arguments
from factory.recipes import as_yaml, is_as_rendered, render_recipe

KEYS = {"model": "models/none", "template": "qwen3_nothink", "cutoff_len": 512}
# YAML 1.1 has no lone surrogates, and OmegaConf takes ${ for an interpolation.
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20).filter(lambda text: "${" not in text)
PLAIN = TEXTS | st.integers(-(10**12), 10**12) | st.booleans() | st.none()
PLAIN |= st.floats(allow_nan=False, allow_infinity=False)


@given(value=PLAIN | st.lists(PLAIN, max_size=4))
@settings(deadline=None, max_examples=200)
def test_any_value_is_read_back_as_it_was(value, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "value.yaml"
    path.write_text(f"key: {as_yaml(value)}\n", encoding="utf-8")
    assert read_yaml(path) == {"key": value}


@given(
    first=st.dictionaries(st.sampled_from(sorted(arguments())) | TEXTS, PLAIN | st.lists(PLAIN, max_size=2), max_size=3)
)
@settings(deadline=None, max_examples=60)
def test_first_values_are_placed_or_refused(first, tmp_path_factory):
    experiment = parse_experiment({**KEYS, "recipes": {"sft": first}}, "exam", where="experiment.yaml")
    try:
        text = render_recipe(experiment, "sft")
    except ArenaError as error:
        assert error.where and error.remedy
        return
    path = tmp_path_factory.getbasetemp() / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    content = read_yaml(path)
    assert {key: content[key] for key in first} == first and is_as_rendered(text)
