"""The report page in a real browser: 400 pixels wide, light, dark and in print, with links that lead to the texts."""

import pytest
from scored_arena import arena, built

from scoring.report.page import write_page

LONG = "https://example.org/" + "a-very-long-address-without-a-blank/" * 12


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> str:
    """The address of a report with texts for its listed rows."""
    scores, texts, truth = arena(1_000, 3, both_orders=True)
    value = built(scores, texts, truth)[0]
    ids = dict.fromkeys(row["id"] for row in (*value["worst"], *value["most_biased"]))
    turn = {"prompt": f"Look at {LONG}", "response_a": "word " * 400, "response_b": "<b>no</b>\n\n    x = 1"}
    battles = [{"id": id, "verdict": "a", "dropped": 1, "turns": [turn, turn]} for id in ids]
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_page(value, path, battles)
    return path.as_uri()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 400])
def test_it_is_read_at_any_width_in_light_and_dark(tab, report, width, scheme):
    page = tab.page
    page.set_viewport_size({"width": width, "height": 900})
    page.emulate_media(color_scheme=scheme)
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(report)
    assert "beats the class prior" in page.locator("h1").inner_text()
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "nothing hangs over the edge"
    cut = "[...document.querySelectorAll('.scroll')].filter(each => each.scrollWidth > each.clientWidth + 1).length"
    assert page.evaluate(cut) == 0, "no table is wider than its place"
    for drawing in ("#baselines svg.lane circle", "#reliability svg circle.bin", "#training svg polyline"):
        box = page.locator(drawing).first.bounding_box()
        assert box["width"] > 3 and box["height"] > 3, f"{drawing} is drawn"
    back, ink = (page.evaluate(f"getComputedStyle(document.body).{name}") for name in ("backgroundColor", "color"))
    assert (brightness(back) > brightness(ink)) == (scheme == "light")
    tab.picture(f"report_{width}_{scheme}")
    assert [url for url in asked if not url.startswith("file:")] == [], "no network"
    assert tab.errors == []


def brightness(colour: str) -> int:
    return sum(int(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(",")[:3])


@pytest.mark.parametrize("width", [1200, 400])
def test_a_listed_row_leads_to_its_texts_and_back(tab, report, width):
    page = tab.page
    page.set_viewport_size({"width": width, "height": 900})
    page.goto(report)
    link = page.locator("#worst table a").first
    anchor = link.get_attribute("href").removeprefix("#")
    texts = page.locator(f"#{anchor}")
    assert not texts.is_visible(), "a page is not three books long"
    link.click()
    tab.until(texts.is_visible, bool)
    assert "word word" in texts.inner_text() and "<b>no</b>" in texts.inner_text(), "a text is text"
    top = texts.bounding_box()["y"]
    assert 0 <= top < 900, "it is on the screen"
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    texts.get_by_role("link", name="Back to the lists").click()
    tab.until(lambda: page.locator("#worst h2").bounding_box()["y"], lambda y: 0 <= y < 900)
    assert tab.errors == []


def test_it_prints(tab, report):
    tab.page.goto(report)
    tab.page.emulate_media(media="print")
    assert not tab.page.locator("nav").is_visible() and not tab.page.locator("#battles").is_visible()
    assert tab.page.locator("#baselines h2").is_visible()
    pages = tab.page.pdf(format="A4").count(b"/Type /Page\n")
    assert 2 <= pages <= 14
