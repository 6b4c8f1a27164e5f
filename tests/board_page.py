"""LLaMA Board's real page, for the tests of what it starts: its functions, and what a button gives them."""


def function_named(page, name):
    return next(each for each in page.fns.values() if each.name == name)


def pressed(page, runner, button: str, values: dict) -> dict:
    """Return what a button's function gets: every element's own value, replaced by those given by id."""
    chosen = {runner.manager.get_elem_by_id(key): value for key, value in values.items()}
    inputs = function_named(page, button).inputs
    assert chosen.keys() <= set(inputs), (
        f"{button} does not read {[key.elem_id for key in chosen.keys() - set(inputs)]}"
    )
    return {element: chosen.get(element, element.value) for element in inputs}
