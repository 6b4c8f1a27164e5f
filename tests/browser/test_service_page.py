"""The page of the judge service, as a person uses it: an example, own texts by keyboard, a phone in the dark."""

import re

from tests.scoring.test_service import served


def widths(tab) -> list[float]:
    return [tab.page.locator(f"#{name}").bounding_box()["width"] for name in ("a", "tie", "b")]


def test_examples_and_own_texts_move_the_bar(browser, tab, chain):
    with served("-e", "demo", "--agree", "0.9", folder=chain) as (_, address):
        tab.page.goto(address)
        tab.page.locator("#model", has_text="log loss").wait_for()
        before = tab.until(lambda: widths(tab), lambda found: all(found))
        tab.page.select_option("#examples", index=1)
        words = tab.page.locator("#words")
        words.get_by_text("First choice").wait_for()
        moved = tab.until(lambda: widths(tab), lambda found: found != before)
        shown = [float(tab.page.locator(f"#p{name}").inner_text().split()[1].rstrip("%")) for name in ("a", "tie", "b")]
        assert abs(sum(shown) - 100) < 0.2 and "exchanging the answers" in words.inner_text()
        tab.page.get_by_text("The API").click()
        assert "POST /v1/judge" in tab.page.locator("#api").inner_text()
        tab.picture("service")
        texts = {"prompt": "How do I cook rice?", "response_a": "Boil it. " * 30, "response_b": "No."}
        for name, text in texts.items():
            tab.page.fill(f"#{name}", text)
        with tab.page.expect_response(re.compile("/v1/judge")) as asked:
            tab.page.keyboard.press("Control+Enter")
        assert asked.value.request.post_data_json["prompt"] == "How do I cook rice?" and asked.value.status == 200
        tab.until(lambda: widths(tab), lambda found: found != moved)
        tab.page.emulate_media(color_scheme="dark")
        tab.page.set_viewport_size({"width": 400, "height": 800})
        assert tab.page.evaluate("document.documentElement.scrollWidth") <= 400
        tab.picture("service_phone_dark")
        dark = tab.page.evaluate("getComputedStyle(document.documentElement).colorScheme")
        assert "dark" in dark and tab.errors == []
