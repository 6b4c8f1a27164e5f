"""The watch page while a run of the command line is at work, on a phone and a desk, then the real LLaMA Board.

In this order: whatever comes first starts the one training that all of them look at.
"""

import contextlib
import json
import re
import shutil

import psutil
from chain import run_py


def see(tab, name: str) -> None:
    """Look at a page on a phone and on a desk, in the light and in the dark: nothing hangs over the edge."""
    for width, scheme in ((400, "light"), (400, "dark"), (1280, "dark"), (1280, "light")):
        tab.page.set_viewport_size({"width": width, "height": 900})
        tab.page.emulate_media(color_scheme=scheme)
        tab.picture(f"{name}_{width}_{scheme}")
        assert tab.page.evaluate("document.documentElement.scrollWidth") <= width


@contextlib.contextmanager
def paused(process):
    """Hold a process and its children where they are, and let them go on whatever happens meanwhile."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for each in family:
        each.suspend()
    try:
        yield
    finally:
        for each in family:
            each.resume()


def test_a_run_is_watched_while_it_runs(tab, servers, training, place):
    words, bar = tab.page.locator("#now"), tab.page.get_by_role("progressbar")
    line = tab.page.locator("#losses polyline").first

    def step() -> int:
        return int(bar.evaluate("each => each.value")) if bar.count() else 0

    log = place / "saves" / "arena-tiny" / "lora" / "demo_sft" / "trainer_log.jsonl"
    tab.until(lambda: log.exists() and log.read_text(), bool, pause=0.02)
    # On a busy machine the whole training takes less than the page's first look.
    with paused(training):
        tab.page.goto(servers["watch"].url)
        words.get_by_text("training").first.wait_for()
        first = tab.until(step, lambda n: n > 0)
        assert len(re.findall(r"\d+/40", words.inner_text())) == 1, "the step is said in one place"
        before = tab.until(lambda: line.get_attribute("points") if line.count() else "", bool)
        tab.page.get_by_role("button", name="Log loss of the newest checkpoint").click()
    later = tab.until(step, lambda n: n > first)
    tab.until(lambda: line.get_attribute("points"), lambda now: now != before)
    text = tab.until(words.inner_text, lambda text: "of the verdict of at most" in text and "Class prior" in text)
    assert later > first and re.search(r"training loss \d\.\d{4}", text) and not tab.page.locator("button").count()
    see(tab, "watch_running")
    tab.page.set_viewport_size({"width": 400, "height": 900})
    # in one look: the page replaces its parts every two seconds
    places = "['losses', 'ladder'].map(name => document.getElementById(name).getBoundingClientRect().toJSON())"
    upper, lower = tab.page.evaluate(places)
    assert upper["bottom"] <= lower["top"] and lower["x"] == upper["x"], "plots below each other"
    tab.until(words.inner_text, lambda text: "Trained on" in text and "checkpoint 40: log loss" in text)
    found = re.search(r"checkpoint 40: log loss of the verdict (\d\.\d{4}) on \d+ validation", words.inner_text())
    assert 0.3 < float(found[1]) < 3
    assert "next: python run.py sft -e demo" in words.inner_text()
    see(tab, "watch_finished")
    assert training.wait(60) == 0
    assert tab.errors == []


def choose(tab, label: str, value: str) -> None:
    """Choose an entry of a dropdown by typing its name, and close its list, which may cover what comes next."""
    box = tab.page.get_by_label(label).locator("visible=true").first
    box.click()
    box.fill(value)
    tab.page.get_by_role("option", name=value, exact=True).first.click()
    box.blur()


def press(tab, name: str) -> None:
    tab.page.get_by_role("button", name=name, exact=True).locator("visible=true").first.click()


def chart(tab) -> str:
    """Return the loss chart's picture, empty while none is drawn."""
    picture = tab.page.locator("img[src^='data:image']:visible")
    return picture.first.get_attribute("src") if picture.count() else ""


def open_board(tab, url: str) -> None:
    tab.page.goto(url)
    name = tab.page.get_by_label("Model name")
    name.wait_for()
    tab.until(lambda: (name.input_value(), model_path(tab)), lambda seen: seen == ("arena-tiny", "models/arena-tiny"))


def model_path(tab) -> str:
    return tab.page.get_by_label("Model path").input_value()


def load(tab, config: str) -> None:
    choose(tab, "Config path", config)
    press(tab, "Load arguments")
    tab.page.get_by_text("Arguments have been restored").first.wait_for()


def data_sets(tab) -> list[str]:
    return [each.inner_text().strip() for each in tab.page.locator(".token:visible").all()]


def test_an_experiment_is_loaded_started_and_becomes_its_stage(tab, servers, trained):
    adapters, own = trained / "saves" / "arena-tiny" / "lora", trained / "outputs" / "demo"
    shutil.rmtree(adapters / "demo_sft")  # a stage that `run.py` trained stays what it is
    shutil.rmtree(own)
    open_board(tab, servers["board"].url)
    see(tab, "board")
    load(tab, "demo_sft.yaml")
    tab.until(lambda: data_sets(tab), lambda seen: seen == ["demo_sft_train"])
    tab.until(tab.page.get_by_label("Learning rate").input_value, lambda rate: rate == "0.003")
    press(tab, "Preview dataset")
    tab.page.get_by_text("Which assistant do people prefer?").first.wait_for()
    press(tab, "Close")
    press(tab, "Start")
    progress = tab.page.get_by_text(re.compile(r"Running \d+/40"))
    progress.first.wait_for()
    first, before = progress.first.inner_text(), tab.until(lambda: chart(tab), bool)
    see(tab, "board_running")
    tab.until(lambda: progress.first.inner_text() if progress.count() else "gone", lambda now: now != first)
    tab.until(lambda: chart(tab), lambda now: now and now != before)
    tab.page.get_by_text("Finished.").first.wait_for()
    see(tab, "board_finished")
    (made,) = adapters.glob("train_*")
    assert (adapters / "demo_sft").resolve() == made.resolve()
    job = (own / "sft" / "train.log").read_text()
    assert "Running training" in job and "Num examples = 1,260" in job.replace("1260", "1,260")
    found = json.loads(run_py(trained, "status", "-e", "demo", "--json").stdout)["experiments"][0]["stages"][0]
    assert (found["state"], found["next"]) == ("trained", "python run.py sft -e demo")
    merged = run_py(trained, "sft", "-e", "demo", "--until", "merge")
    assert merged.returncode == 0 and "training kept" in merged.stderr, merged.stderr
    assert tab.errors == []
