"""The report in a real browser: it fits a phone, draws its charts, plays its film and logs no error."""

import numpy as np
import pytest
from PIL import Image

from pi_rl.hub.report import write_report
from pi_rl.hub.run_record import read_run
from tests.hub.browser import measure, screenshot
from tests.hub.runs import CONFIG, full_history, write_run

PHONE, DESKTOP = 390, 1200
LONG = "a-task-with-a-name-that-is-much-longer-than-any-telephone-is-wide-" * 3


@pytest.fixture
def page(make_results, tmp_path):
    """A run with long names, many settings and a film."""
    config = f"{CONFIG}{LONG}: {LONG}\nlearning_rate: 0.0002\n"
    history = [{**entry, f"eval_success_rate/{LONG}": 0.4} for entry in full_history()]
    results = make_results()
    results.rl.per_task[LONG] = results.rl.per_task["press"]
    return write_report(
        read_run(write_run(tmp_path / "run", results=results, history=history, config=config, video=True))
    )


@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_the_page_is_no_wider_than_the_screen_and_logs_no_error(page, width):
    found = measure(page, width)
    assert found["inner"] == width
    assert found["scroll"] <= width
    assert found["outside"] == []
    assert found["videos"] == [None]
    assert found["console"] == ""


@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_a_picture_of_the_page_shows_its_curves(page, tmp_path, width):
    picture = tmp_path / "page.png"
    assert screenshot(page, picture, width, 1700) == ""  # with the page's own policy in force
    pixels = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    assert pixels.shape == (1700, width, 3)
    assert pixels.std() > 10
    for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)):  # training episodes, evaluations
        assert (np.abs(pixels - colour).max(-1) < 12).sum() > 100


def test_a_comparison_fits_a_phone(make_results, tmp_path):
    records = [
        read_run(
            write_run(tmp_path / f"{LONG}{seed}", results=make_results(seed), config=f"{CONFIG}x: {LONG}{seed}\n")
        )
        for seed in range(3)
    ]
    found = measure(write_report(records, tmp_path / "page.html"), PHONE)
    assert (found["inner"], found["scroll"], found["outside"]) == (PHONE, PHONE, [])
