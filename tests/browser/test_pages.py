"""The watch page while a run of the command line is at work, then the real LLaMA Board on what it trained.

In this order: whatever comes first starts the one training that all of them look at.
"""

import re


def drawn(tab, name) -> str:
    """Return the source of a chart's picture, empty while none is drawn."""
    picture = tab.page.locator(f"#{name} img")
    if picture.count() == 0 or picture.first.evaluate("each => each.naturalWidth") < 200:
        return ""
    return picture.first.get_attribute("src")


def test_a_run_is_watched_while_it_runs(tab, servers, training):
    tab.page.goto(servers["watch"].url)
    words = tab.page.locator("#words")

    def step() -> int:
        found = re.search(r"step (\d+)/40", words.inner_text())
        return int(found[1]) if found else 0

    words.get_by_text("training").first.wait_for()
    first = tab.until(step, lambda n: n > 0)
    before = tab.until(lambda: drawn(tab, "losses"), bool)
    tab.picture("watch_running")
    # LLaMA-Factory's own bar: Gradio fetches the script of what is first shown now, so it may come after the chart.
    tab.page.get_by_text(re.compile(r"Running \d+/40")).wait_for()
    later = tab.until(step, lambda n: n > first)
    tab.until(lambda: drawn(tab, "losses"), lambda now: now and now != before)
    text = tab.until(words.inner_text, lambda text: "so a log loss of at most" in text and "Class prior" in text)
    assert later > first and re.search(r"loss \d\.\d{4}", text)
    assert drawn(tab, "ladder")
    tab.until(words.inner_text, lambda text: "demo sft: trained" in text and "checkpoint 40: log loss" in text)
    found = re.search(r"checkpoint 40: log loss (\d\.\d{4}) on 30 validation battles", words.inner_text())
    assert 0.3 < float(found[1]) < 3
    assert "next: python run.py sft -e demo" in words.inner_text()
    tab.picture("watch_finished")
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


def test_an_experiment_is_loaded_started_and_its_chart_moves(tab, servers, trained):
    open_board(tab, servers["board"].url)
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
    tab.picture("board_running")
    tab.until(lambda: progress.first.inner_text() if progress.count() else "gone", lambda now: now != first)
    tab.until(lambda: chart(tab), lambda now: now and now != before)
    tab.page.get_by_text("Finished.").first.wait_for()
    tab.picture("board_finished")
    adapters = {folder.name for folder in (trained / "saves" / "arena-tiny" / "lora").iterdir()}
    made = [name for name in adapters if name.startswith("train_")]
    assert len(made) == 1 and "demo_sft" in adapters
    job = (trained / "saves" / "arena-tiny" / "lora" / made[0] / "board_job.log").read_text()
    assert "Running training" in job and "Num examples = 1,260" in job.replace("1260", "1,260")
    assert tab.errors == []
