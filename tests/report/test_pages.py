"""The pages in a real browser: they sort, search, uncover and draw, without network and without console errors."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from ade_harness.cli.main import main
from ade_harness.data.labels import Classes
from ade_harness.report import pages as commands
from ade_harness.report.plots import class_iou_figure, confusion_data
from ade_harness.runs.finished import load_run
from tests.cli.test_cli import FAST, Call

pytestmark = pytest.mark.slow  # the file takes more than a few seconds

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: apt install chromium")
HOSTILE = "</script><img src=x onerror=alert(1)>\"'<b>&{{7*7}}"


@dataclass
class Opened:
    """A page in the browser, and what went wrong in it."""

    page: object
    problems: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two runs of the demo images: the demo network, and label maps of which a part was spoilt; and their pages."""
    root = tmp_path_factory.mktemp("pages")
    overrides = [*FAST, "dataset.images=40", "metrics.resamples=1000", "run.label_maps=all"]
    assert main([*overrides, f"run.dir={root / 'demo'}", "metrics.calibration=true", "run.overlays=2"]) == 0
    shutil.copytree(root / "demo" / "label_maps", root / "spoilt")
    rng = np.random.default_rng(0)
    for path in sorted((root / "spoilt").glob("*.png")):
        labels = np.array(Image.open(path))
        labels[rng.random(labels.shape) < 0.1] = 1
        Image.fromarray(labels).save(path)
    again = [*overrides, "model=predictions", f"model.path={root / 'spoilt'}", f"run.dir={root / 'worse'}"]
    assert main(again) == 0
    # names from files of others: in the configuration, in the manifest and in the notes
    config = yaml.safe_load((root / "worse" / "config.yaml").read_text())
    config["model"]["label"] = HOSTILE
    (root / "worse" / "config.yaml").write_text(yaml.safe_dump(config))
    for name, key in (("manifest.json", "command"), ("metrics.json", "notes")):
        content = json.loads((root / "worse" / name).read_text())
        content[key] = [HOSTILE]
        (root / "worse" / name).write_text(json.dumps(content))
    assert main(["report", str(root / "demo")]) == 0
    assert main(["report", str(root / "worse"), "--output", str(root / "worse.html")]) == 0
    pages = ["--output", str(root / "compared.html"), "--resamples", "500"]
    assert main(["compare", str(root / "demo"), str(root / "worse"), *pages]) == 0
    named = [root / f"20260102-030405_mask2former_swin_l_fapn_a1b2c3{i}{'x' * 60 * i}" for i in range(2)]
    for source, folder in zip((root / "demo", root / "worse"), named, strict=True):
        shutil.copytree(source, folder)
    assert main(["compare", *map(str, named), "--output", str(root / "named.html"), "--resamples", "500"]) == 0
    return {
        "named": root / "named.html", "demo": root / "demo" / "report.html", "worse": root / "worse.html", "compared": root / "compared.html",
        "run": root / "demo", "other": root / "worse",
    }  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


def visit(browser, path: Path, **options) -> Opened:  # type: ignore[no-untyped-def]
    page = browser.new_page(**{"viewport": {"width": 1200, "height": 900}, **options})
    opened = Opened(page)
    page.on(
        "console",
        lambda message: opened.problems.append(message.text) if message.type in ("error", "warning") else None,
    )
    page.on("pageerror", lambda error: opened.problems.append(str(error)))
    page.on("dialog", lambda dialog: opened.problems.append(f"dialog {dialog.message}"))
    page.on(
        "request", lambda r: None if r.url.startswith(("file:", "data:", "blob:")) else opened.problems.append(r.url)
    )
    page.goto(f"file://{path}")
    page.wait_for_function("document.documentElement.dataset.ready === 'yes'")
    return opened


def column(page, table: str, index: int) -> list[str]:  # type: ignore[no-untyped-def]
    return page.eval_on_selector_all(
        f"{table} tbody tr:not([hidden])", f"rows => rows.map(r => r.cells[{index}].textContent)"
    )


@needs_browser
def test_the_report_works_in_a_browser(runs, browser) -> None:  # type: ignore[no-untyped-def]
    opened = visit(browser, runs["demo"])
    page = opened.page
    run = load_run(runs["run"])
    assert page.locator(".headline h2").inner_text().startswith(f"{100 * run.metrics['mIoU']:.2f}")
    assert "DEMO" in page.locator(".mark").first.inner_text()
    # sort by IoU with the keyboard alone: best first, then worst first, classes without IoU last in both
    button = page.locator("#class-table thead button", has_text=re.compile("^IoU"))
    button.focus()
    page.keyboard.press("Enter")
    values = column(page, "#class-table", 2)
    numbers = [float(v) for v in values if v != "–"]
    assert len(values) == 150
    assert numbers == sorted(numbers, reverse=True)
    assert values[: len(numbers)] == [f"{v:.2f}" for v in numbers]
    assert page.locator("#class-table th[aria-sort=descending]").count() == 1
    page.keyboard.press("Enter")
    numbers = [float(v) for v in column(page, "#class-table", 2) if v != "–"]
    assert numbers == sorted(numbers)
    # search
    page.fill("#search", "chair")
    names = column(page, "#class-table", 1)
    assert 1 < len(names) < 10
    assert all("chair" in name for name in names)
    assert page.locator("#search-count").inner_text() == f"{len(names)} of 150"
    page.fill("#search", "")
    assert len(column(page, "#class-table", 1)) == 150
    # pictures: choose a layer, uncover it with the keyboard
    example = page.locator(".example").first
    example.locator("select").select_option("0")
    assert example.locator(".layer:visible").count() == 1
    example.locator("input").focus()
    page.keyboard.press("Home")
    assert example.locator(".layer:visible").evaluate("l => l.style.clipPath") == "inset(0px 0px 0px 100%)"
    page.keyboard.press("End")
    assert example.locator(".layer:visible").evaluate("l => l.style.clipPath") == "inset(0px 0px 0px 0%)"
    assert page.locator(".example").count() == 24
    # the matrix: three normalisations, zoom by dragging
    page.select_option("#matrix-classes", "all")
    cells = "document.getElementById('matrix').data[0].z.flat().filter(v => v !== null)"
    assert page.evaluate(f"{cells}.length") == int((run.matrix > 0).sum())
    rows = page.evaluate(
        "document.getElementById('matrix').data[0].z.map(r => r.reduce((s, v) => s + (v === null ? 0 : 10 ** v), 0))"
    )
    assert all(abs(total - 1) < 1e-9 or total == 0 for total in rows)
    page.select_option("#matrix-mode", "pixels")
    total = page.evaluate(f"{cells}.reduce((s, v) => s + Math.round(10 ** v), 0)")
    assert total == int(run.matrix.sum())
    page.locator("#matrix").scroll_into_view_if_needed()
    box = page.locator("#matrix .nsewdrag").bounding_box()
    page.mouse.move(box["x"] + 50, box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] + 200, box["y"] + 200, steps=5)
    page.mouse.up()
    span = page.evaluate("(([a, b]) => Math.abs(b - a))(document.getElementById('matrix').layout.xaxis.range)")
    assert span < 100
    # figures are drawn, in dark too
    for name in ("classes", "images", "stages", "ranks", "reliability", "bands"):
        assert page.locator(f"#{name} .main-svg").count() > 0, name
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.click("#theme")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != light
    page.emulate_media(media="print")
    assert page.locator("#theme").is_hidden()
    assert opened.problems == []
    page.close()


@needs_browser
def test_the_comparison_works_in_a_browser(runs, browser) -> None:  # type: ignore[no-untyped-def]
    opened = visit(browser, runs["compared"], color_scheme="dark")
    page = opened.page
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    assert page.locator("text=they differ").count() > 0
    points = page.evaluate("document.getElementById('scatter').data[1].x.length")
    assert points > 100
    assert page.locator("#bars .main-svg").count() > 0
    assert page.locator(".example").count() > 0
    layers = page.locator(".example").first.locator("option").all_inner_texts()
    assert len(layers) == 5  # truth, and prediction and errors of both
    assert opened.problems == []
    page.close()


@needs_browser
def test_hostile_names_are_text(runs, browser) -> None:  # type: ignore[no-untyped-def]
    for name in ("worse", "compared"):
        opened = visit(browser, runs[name])
        assert opened.page.locator("body").inner_text().count("onerror=alert(1)") >= 1
        assert opened.page.locator("img[src=x]").count() == 0
        opened.page.evaluate("Promise.resolve()")
        assert opened.problems == [], name
        opened.page.close()
    assert "49" not in re.findall(r"&amp;(.{0,12})", runs["worse"].read_text())[0]


def test_names_of_classes_in_figures_are_no_markup() -> None:
    classes = Classes("mine", ("<a href='https://a.b'>tree</a>", "R&D &lt;"), ((1, 2, 3), (4, 5, 6)))
    assert confusion_data(np.eye(2, 3, dtype=np.int64), classes)["names"] == [
        "&lt;a href='https://a.b'>tree&lt;/a>", "R&amp;D &amp;lt;",
    ]  # fmt: skip
    row = {"class": 0, "name": "a <b>bold</b>", "IoU": 0.5, "low": None, "high": None}
    assert class_iou_figure([row])["data"][0]["x"] == ["a &lt;b>bold&lt;/b> (0)"]


def test_a_page_is_one_small_file_that_names_no_server(runs: dict[str, Path]) -> None:
    for name in ("demo", "worse", "compared"):
        text = runs[name].read_text()
        assert len(text) < 10_000_000
        assert not re.search(r"<(?:script|link|img|iframe)[^>]*\s(?:src|href)=[\"']?(?:https?:|//)", text)
        policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
        assert policy is not None
        assert "default-src 'none'" in policy[1]
        assert "unsafe-inline" not in policy[1].partition("script-src")[2]


def test_a_report_without_its_images_says_so(runs: dict[str, Path], tmp_path: Path, call: Call) -> None:
    run = Path(shutil.copytree(runs["run"], tmp_path / "moved"))
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["dataset"] |= {"kind": "ade20k", "root": str(tmp_path / "gone"), "name": "ade20k"}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    scenes = tmp_path / "scenes.txt"
    scenes.write_text(
        "".join(f"{row.image_id} {'kitchen' if i % 2 else 'street'}\n" for i, row in enumerate(load_run(run).rows))
    )
    done = call("report", run, "--scenes", scenes)
    assert done.code == 0, done.err
    text = (run / "report.html").read_text()
    assert "No pictures: the data set cannot be opened" in text
    assert 'class="overlay"' in text  # those that the run itself has drawn
    assert "kitchen" in text
    scenes.write_text("one\n")
    assert "expected lines of `image_id scene`" in call("report", run, "--scenes", scenes).err


def test_mistakes_are_one_message(runs: dict[str, Path], call: Call, tmp_path: Path) -> None:
    for overrides, message in (
        (["report"], "report: the following arguments are required: RUN"),
        (["report", "nothing"], "nothing: no such folder"),
        (["report", runs["run"], "--nothing"], "unrecognized arguments: --nothing"),
        (["report", runs["run"], "--output"], "argument --output: expected one argument"),
        (["report", runs["run"], "--output", "/proc/no/where.html"], "/proc/no: the folder cannot be made"),
        (["report", runs["run"], "--output", "page.md"], "--output page.md: the page is HTML"),
        (["compare", runs["run"], runs["other"], "--output", "c.csv"], "--output c.csv: the page is HTML"),
        (["compare", runs["run"]], "compare needs 2 to 8 run directories"),
        (["compare", runs["run"], runs["other"], "--resamples", "x"], "argument --resamples: invalid int value: 'x'"),
    ):
        done = call(*overrides)
        assert done.code == 2, overrides
        assert message in done.err
        assert "Traceback" not in done.err


def test_the_terminal_says_who_is_better(runs: dict[str, Path], call: Call, tmp_path: Path) -> None:
    done = call("compare", runs["run"], runs["other"], "--resamples", "300")
    assert done.code == 0
    assert "they differ" in done.out
    assert "(corrected for" in done.out
    assert f"page:           {commands.COMPARISON_PAGE}" in done.out
    again = shutil.copytree(runs["run"], tmp_path / "again" / runs["run"].name)
    same = call("compare", runs["run"], again, "--resamples", "300")
    assert "no significant difference" in same.out
    assert "(1)" in same.out
    (tmp_path / "link").symlink_to(again)
    twice = call("compare", runs["run"], again, tmp_path / "link")
    assert twice.code == 2
    assert f"link: given twice ({again} is the same directory)" in twice.err


@pytest.mark.parametrize("overrides", [["dataset.limit=1"], ["metrics.resamples=0"]])
def test_runs_without_intervals_have_a_page(overrides: list[str], tmp_path: Path, call: Call) -> None:
    """One image, everybody's first try, and no resampling: nothing to resample, so no interval is shown."""
    for name in ("a", "b"):
        done = call(*FAST, "dataset.images=3", "run.report=true", f"run.dir={name}", *overrides)
        assert done.code == 0, done.err
        page = (tmp_path / name / "report.html").read_text()
        assert "% interval" not in page
        assert re.search(r"<h2 id=\"h-score\">\d+\.\d\d", page)
    done = call("compare", "a", "b", "--resamples", "100")
    assert done.code == 0, done.err


@needs_browser
@pytest.mark.parametrize("name", ["demo", "compared", "named"])
def test_pages_fit_a_phone_a_tablet_a_desk_and_paper(runs, browser, name: str) -> None:  # type: ignore[no-untyped-def]
    opened = visit(browser, runs[name], viewport={"width": 375, "height": 800})
    page = opened.page
    outside = """[...document.querySelectorAll("body *")].filter((element) =>
        element.getBoundingClientRect().right > innerWidth + 1 && !element.closest(".scroll, .box, pre, .plot, .skip"))
        .map((element) => element.outerHTML.slice(0, 80))"""
    cards = """[...document.querySelectorAll(".example select, .example input")].filter((element) =>
        element.getBoundingClientRect().right > element.closest("figure").getBoundingClientRect().right + 0.5).length"""
    for width in (375, 768, 1280):  # figures follow the window
        resize(page, width)
        assert page.evaluate("document.scrollingElement.scrollWidth") <= width  # nothing to scroll sideways
        assert page.evaluate(outside) == []
        assert page.evaluate(cards) == 0
    resize(page, 718)  # A4 between margins
    page.emulate_media(media="print")
    assert page.evaluate("document.scrollingElement.scrollWidth") <= 718
    cut = """[...document.querySelectorAll("table")].filter((table) => table.getClientRects().length &&
        table.getBoundingClientRect().right > innerWidth + 1).map((table) => table.id || table.outerHTML.slice(0, 80))"""
    assert page.evaluate(cut) == []
    hidden = """[...document.querySelectorAll(".box, .scroll")].filter((box) => box.scrollWidth > box.clientWidth + 1 &&
        getComputedStyle(box).overflowX !== "visible").length"""
    assert page.evaluate(hidden) == 0
    assert opened.problems == []
    page.close()


def resize(page, width: int) -> None:  # type: ignore[no-untyped-def]
    """Make the window so wide, and wait until its figures have followed."""
    page.set_viewport_size({"width": width, "height": 800})
    late = """[...document.querySelectorAll(".js-plotly-plot")].filter((plot) => plot.clientWidth &&
        Math.abs(plot.clientWidth - plot._fullLayout.width) > 1).map((plot) => plot.id)"""
    for _ in range(200):
        left = page.evaluate(late)
        if not left:
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"{left}: not as wide as their boxes at {width} px")


@needs_browser
def test_confusions_and_pictures_can_be_narrowed(runs, browser) -> None:  # type: ignore[no-untyped-def]
    page = visit(browser, runs["demo"]).page
    shape = """(() => { const d = document.getElementById("matrix").data[0]; return [d.z.length, d.z[0].length]; })()"""
    assert page.evaluate(shape) == [25, 27]  # others, and none
    page.select_option("#matrix-mode", "pixels")
    few = page.evaluate(
        """document.getElementById("matrix").data[0].z.flat().filter((v) => v !== null).map((v) => 10 ** v)"""
    )
    page.select_option("#matrix-classes", "all")
    assert page.evaluate(shape) == [150, 151]
    every = page.evaluate(
        """document.getElementById("matrix").data[0].z.flat().filter((v) => v !== null).map((v) => 10 ** v)"""
    )
    expected = load_run(runs["run"]).matrix
    assert round(sum(every)) == int(expected.sum())
    wrong = expected[:, :150] - np.diag(np.diag(expected[:, :150]))
    totals = wrong.sum(0) + expected.sum(1) - np.diag(expected[:, :150])
    chosen = sorted(sorted(range(150), key=lambda c: (-totals[c], c))[:25])
    assert round(sum(few)) == int(expected[chosen].sum())
    figures = page.locator(".example")
    first = json.loads(figures.first.get_attribute("data-classes"))[0]
    page.select_option("#image-class", first)
    with_it = [first in json.loads(f.get_attribute("data-classes")) for f in figures.all()]
    assert [f.is_visible() for f in figures.all()] == with_it
    assert page.inner_text("#image-count") == f"{sum(with_it)} of {len(with_it)} pictures"
