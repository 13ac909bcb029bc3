import json
import re
from html.parser import HTMLParser

import pytest

from pi_rl.hub.report import render_report, run_names, summary_of_run, write_report
from pi_rl.hub.report_charts import Layer, chart, thinned, ticks
from pi_rl.hub.report_notes import notes_of
from pi_rl.hub.run_record import read_run
from tests.hub.runs import CONFIG, full_history, iteration_entry, write_run

HOSTILE = '<script>alert(1)</script>"><img src=x onerror=alert(1)>'


class Page(HTMLParser):
    """Tags with attributes, and the text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def named(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture
def finished(results, tmp_path):
    return read_run(write_run(tmp_path / "run", results=results, video=True))


def page_of(record, folder=None):
    return Page(render_report([record], folder or record.folder))


def test_the_page_shows_result_curves_tasks_film_settings_times_and_versions(finished):
    page = page_of(finished)
    for part in (
        "50.0 %",
        "80.0 %",
        "+30.0",
        "65 – 90 %",
        "45,210",
        "KL of the update",
        "press",
        "demonstrations",
        "flow_sde",
        "lerobot",
        "pi-rl eval --policy",
        "250",  # environment steps per second: 1000 in 3 + 1 s
    ):
        assert part in page.text, part
    assert [video["src"] for video in page.named("video")] == ["before_after.mp4"]
    assert page.text.count("Not finished") == 0


def test_the_page_needs_nothing_from_elsewhere(finished):
    text = render_report([finished], finished.folder)
    page = Page(text)
    assert page.named("script") == page.named("link") == page.named("img") == page.named("iframe") == []
    assert not re.search(r"https?:|url\(|@import", text)
    assert {attrs["name"] for attrs in page.named("meta") if "name" in attrs} == {"viewport"}


def test_charts_have_a_mark_for_every_evaluation(finished):
    page = page_of(finished)
    dots = [attrs for attrs in page.named("path") if attrs.get("class") == "dot"]
    assert len(dots) == 3  # before, in the middle, after
    assert "evaluation: 60 % [50 %, 70 %] after 3,000 environment steps" in page.text


def test_a_run_that_goes_on_or_was_killed_says_how_far_it_is_and_how_to_continue(tmp_path):
    folder = write_run(tmp_path / "run", history=full_history(4))
    page = page_of(read_run(folder))
    assert "Not finished: 4 of 6 iterations so far" in page.text
    assert "success so far" in page.text
    assert f"pi-rl train --resume {folder}" in page.text
    assert "press-v3" in page.text


def test_a_trainers_folder_gets_no_commands_of_a_recipe(tmp_path):
    folder = write_run(tmp_path / "run", history=full_history(4))
    (folder / "checkpoint-16").mkdir()
    (folder / "pi_rl_config.yaml").rename(folder / "checkpoint-16" / "pi_rl_config.yaml")
    state = json.dumps({"global_step": 16, "log_history": full_history(4)})
    (folder / "checkpoint-16" / "trainer_state.json").write_text(state)
    (folder / "metrics.jsonl").unlink()
    page = page_of(read_run(folder))
    assert "flow_sde" in page.text  # the settings are found
    assert "pi-rl train" not in page.text


def test_a_run_that_has_only_begun_has_a_page(tmp_path):
    page = page_of(read_run(write_run(tmp_path / "run", history=[])))
    assert "No evaluation yet" in page.text
    assert page.named("svg") == []


def test_text_from_a_run_cannot_become_markup(make_results, tmp_path):
    from pi_rl.rollout.summary import summarize_episodes

    rl = summarize_episodes([HOSTILE, "b"], [True, False], [1.0, 1.0], [1.0, 0.0])
    config = f"env: 'toy:{HOSTILE}'\nnoise: '{HOSTILE}'\nseed: '{HOSTILE}'\n" + CONFIG.partition("seed")[2].join("##")
    results = make_results(sft=rl, rl=rl, versions={HOSTILE: HOSTILE}, minutes={HOSTILE: 1.0}, noise=HOSTILE)
    folder = write_run(tmp_path / "run", results=results, config=config.replace("{", "{{").replace("}", "}}"))
    (folder / "videos").mkdir()
    (folder / "videos" / '"><script>alert(1)<.mp4').write_bytes(b"x")
    text = render_report([read_run(folder)], folder)
    page = Page(text)
    assert page.named("script") == page.named("img") == []
    assert HOSTILE not in text
    assert "&lt;script&gt;" in text
    assert all(
        set(attrs) <= {"controls", "muted", "loop", "playsinline", "preload", "src"} for attrs in page.named("video")
    )
    assert "onerror" not in {name for _, attrs in page.tags for name in attrs}


def test_a_policy_forbids_scripts_even_if_one_got_in(finished):
    policy = [attrs["content"] for attrs in page_of(finished).named("meta") if "http-equiv" in attrs]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; media-src 'self' data: file:"]


def test_tokens_never_reach_the_page(tmp_path, monkeypatch):
    token, secret = "hf_" + "c3" * 17, "correct-horse-battery"
    monkeypatch.setenv("MY_API_KEY", secret)
    folder = write_run(tmp_path / "run", config=f"{CONFIG}hub_token: {token}\nrun_name: {secret}\nenv_x: {token}\n")
    text = render_report([read_run(folder)], folder)
    assert token not in text
    assert secret not in text
    assert "hf_***" in text


def test_breakdowns_and_odd_figures_are_warned_of(tmp_path):
    history = [iteration_entry(i, **{"rollout/failed_episodes": 1.0, "policy/approx_kl": 0.4}) for i in range(1, 9)]
    history[2] = iteration_entry(3, loss=float("nan"), **{"policy/ratio_error_first": 0.2})
    record = read_run(write_run(tmp_path / "run", history=history))
    warnings = [note.text for note in notes_of(record) if note.level == "warning"]
    assert len(warnings) == 4
    for part in (
        "7 training episode(s) were lost",
        "not finite in 1",
        "off by 0.2",
        "KL was above 0.1 in 2 of the last 2",
    ):
        assert sum(part in text for text in warnings) == 1, part
    assert page_of(record).text.count("7 training episode(s) were lost") == 1


def test_a_gain_within_the_intervals_is_called_so(make_results, tmp_path):
    near = read_run(write_run(tmp_path / "near", results=make_results(before=0.5, after=0.6)))
    far = read_run(write_run(tmp_path / "far", results=make_results(before=0.2, after=0.9)))
    worse = read_run(write_run(tmp_path / "worse", results=make_results(before=0.9, after=0.2)))
    texts = ["".join(note.text for note in notes_of(record)) for record in (near, far, worse)]
    assert ["may be chance" in text for text in texts] == [True, False, False]
    assert "did not rise" in texts[2]


def test_several_runs_are_compared(make_results, tmp_path):
    records = [
        read_run(
            write_run(
                tmp_path / name,
                results=make_results(seed, after=after),
                config=CONFIG.replace("seed: 1\n", f"seed: {seed}\nlearning_rate: {seed}e-5\n"),
            )
        )
        for name, seed, after in (("a", 1, 0.7), ("b", 2, 0.9))
    ]
    page = Page(write_report(records, tmp_path / "both.html").read_text())
    for part in ("2 runs compared", "70.0 %", "90.0 %", "Settings that differ", "learning_rate"):
        assert part in page.text, part
    assert len([attrs for attrs in page.named("path") if attrs.get("class") == "line"]) >= 8
    with pytest.raises(ValueError, match="got 2 runs"):
        write_report(records)
    with pytest.raises(ValueError, match="got 0 runs"):
        write_report([], tmp_path / "none.html")


def test_names_tell_runs_apart(tmp_path):
    folders = [write_run(tmp_path / parent / "run") for parent in ("a", "b")]
    assert run_names([read_run(folder) for folder in folders]) == ["a/run", "b/run"]
    assert run_names([read_run(folders[0])] * 2)[0].endswith("(1)")


def test_films_are_linked_from_where_the_page_lies_or_held_by_it(finished, tmp_path):
    there = tmp_path / "pages"
    page = Page(write_report(finished, there / "page.html").read_text())
    assert [video["src"] for video in page.named("video")] == ["../run/before_after.mp4"]
    held = Page(write_report(finished, there / "held.html", embed=True).read_text())
    assert held.named("video")[0]["src"].startswith("data:video/mp4;base64,AAAA")
    assert [file.name for file in sorted(there.iterdir())] == ["held.html", "page.html"]


def test_films_that_are_too_large_are_not_embedded(finished):
    with (finished.folder / "before_after.mp4").open("r+b") as file:
        file.truncate(41_000_000)
    with pytest.raises(ValueError, match="take 41 MB; up to 40 MB"):
        write_report(finished, embed=True)
    assert not (finished.folder / "report.html").exists()


def test_figures_for_programs(finished):
    figures = summary_of_run(finished)
    assert figures["before"]["success_rate"] == 0.5
    assert figures["after"] == {"success_rate": 0.8, "ci95": list(finished.after.ci95), "n_episodes": 40}
    assert (figures["complete"], figures["iterations"], figures["env_steps"]) == (True, 6, 45210)


@pytest.mark.parametrize(
    ("low", "high", "wanted", "expected"),
    [
        (0, 1, 5, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0, 169403, 5, [0, 50000, 100000, 150000, 200000]),
        (-0.3, 1, 3, [-0.5, 0, 0.5, 1.0]),
        (0, 0, 3, [0, 0.5, 1.0]),
    ],
)
def test_ticks_are_round_and_cover(low, high, wanted, expected):
    assert ticks(low, high, wanted) == pytest.approx(expected)


def test_long_runs_are_thinned_to_means_that_keep_the_end():
    points = [(float(i), float(i % 2)) for i in range(1001)]
    few = thinned(points, 100)
    assert len(few) <= 100
    assert few[-1][0] == 1000.0
    assert all(0.3 < y < 0.7 for _, y in few[:-1])
    assert thinned(points[:50], 100) == points[:50]


def test_a_chart_places_points_by_their_values():
    text = chart([Layer(points=[(0.0, 0.0), (50.0, 1.0), (100.0, 0.5)])], name="x", y_range=(0.0, 1.0))
    assert '<path class="line" d="M0.0 1000.0L500.0 0.0L1000.0 500.0"' in text
    with pytest.raises(ValueError, match="no points"):
        chart([Layer(points=[])], name="x")
