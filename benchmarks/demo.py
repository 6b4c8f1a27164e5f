"""What a run of the demo ends with, as a picture of its report, and how long it takes, for README.md.

python benchmarks/demo.py --work FOLDER [--seed 1] [--write]

Needs Chromium and `make extra-browser`. A FOLDER that holds a run already is not timed: only the picture is made.
"""

from __future__ import annotations

from pathlib import Path

from figures import ROOT, options, put
from PIL import Image
from workbench import Workbench

PICTURE = Path("docs") / "report.png"
SESSION = """![The top of a report: the judge beside simple methods on the same battles]({picture})

The top of the report that `make demo` ends with: {seconds:.0f} s on two cores without a GPU, the installation done."""
WIDTH = 900


def main() -> None:
    from playwright.sync_api import sync_playwright

    asked = options(__doc__, "work", seed="1").parse_args()
    bench = Workbench(asked.work)
    seconds = None if bench.has("demo", "sft") else bench.run("demo", "--seed", asked.seed)
    to = ROOT / PICTURE if asked.write else bench.folder / PICTURE.name
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": WIDTH, "height": 900}, color_scheme="light")
        tab.goto((bench.output("demo", "sft") / "report.html").as_uri())
        tab.add_style_tag(content=".flag, nav, details { display: none }")  # the picture shows one thing
        box = tab.locator("#baselines").bounding_box()  # the page's top, down to the chart of the baselines
        clip = {"x": 0, "y": 0, "width": WIDTH, "height": box["y"] + box["height"] + 16}
        tab.screenshot(path=to, full_page=True, clip=clip)
        browser.close()
    with Image.open(to) as picture:
        picture.convert("RGB").quantize(64).save(to, optimize=True)
    print(f"{to}: {to.stat().st_size:,} bytes")
    if seconds:
        session = SESSION.format(picture=PICTURE, seconds=seconds)
        print(session)
        if asked.write:
            put("session", session)


if __name__ == "__main__":
    main()
