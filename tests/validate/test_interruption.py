"""Ctrl-C: what was judged before is told, is marked as incomplete, and is no verdict."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from command_line import Capture
from random_model import make_checkpoint

from qwenport import cli
from qwenport.commands import validate as command
from qwenport.exporter import export
from qwenport.validate import Options, Sources, Validation, open_target
from qwenport.validate.scenarios import SCENARIOS

from .bundled import strict_json

ALWAYS = [scenario.name for scenario in SCENARIOS]
NAMES = [*ALWAYS, "cache of 64"]  # known when the sizes of the target are
NOT_APPLICABLE = {"past original context", "middle of context"}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(package, checkpoint) of two layers."""
    folder = tmp_path_factory.mktemp("interrupted")
    checkpoint = make_checkpoint(folder / "checkpoint", positions=128)
    return export(checkpoint, folder / "package", max_batch=2).path, checkpoint


def interrupting(at: str) -> Callable[[str, int, int], None]:
    """A progress callback in which Ctrl-C is pressed when `at` is under way."""

    def progress(what: str, done: int, total: int) -> None:
        if what == at:
            raise KeyboardInterrupt

    return progress


# where, whether a layer is loaded at a time -> the scenarios that have no result by then
INTERRUPTIONS = {
    ("hashing weights", False): set(ALWAYS),
    ("loading the reference", False): set(NAMES),
    ("embedding every id", False): set(NAMES),
    ("prefill", False): set(NAMES),
    ("chunked prefill", False): set(NAMES[NAMES.index("chunked prefill") :]),
    ("greedy", False): {"greedy", "cache of 64"},
    ("distance of layer 0", False): set(),
    ("looking inside", False): set(),
    ("running the target layer by layer", True): set(NAMES),
    ("logits", True): set(NAMES) - NOT_APPLICABLE,
}


@pytest.mark.parametrize(("at", "streamed"), INTERRUPTIONS)
def test_what_was_judged_before_an_interruption_is_told_and_does_not_pass(
    at: str, streamed: bool, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    package, checkpoint = pair
    options = Options(streamed, budget="quick")
    validation = Validation(
        open_target(package), Sources(checkpoint), options, progress=interrupting(at)
    )
    with pytest.raises(KeyboardInterrupt):
        validation.run()
    report = validation.report()
    assert (report.complete, report.passed) == (False, False)
    left = {s.name for s in report.scenarios if s.reason == "interrupted"}
    assert left == INTERRUPTIONS[at, streamed]
    assert {s.name for s in report.scenarios} >= set(ALWAYS)
    for scenario in report.scenarios:
        if scenario.name in left:
            assert (scenario.status, scenario.metrics) == ("not run", None)
        else:
            wanted = "not run" if scenario.name in NOT_APPLICABLE else "passed"
            assert scenario.status == wanted, scenario.name
    assert report.verdict.startswith("interrupted, no verdict: ") and "; judged: " in report.verdict
    assert "holds" not in report.verdict
    report.write(tmp_path)
    data = strict_json((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert (data["complete"], data["passed"]) == (False, False)
    assert "Interrupted: no verdict" in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("at", ["loading the reference", "decode"])
def test_ctrl_c_at_the_command_line_leaves_a_marked_report(
    at: str,
    pair: tuple[Path, Path],
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    @contextmanager
    def bar(opening: str, quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
        yield interrupting(at)

    monkeypatch.setattr(command, "progress_bar", bar)
    package, checkpoint = pair
    arguments = ["validate", str(package), "--reference", str(checkpoint), "--budget", "quick"]
    assert cli.main([*arguments, "--report", str(tmp_path / "report")]) == cli.EXIT_INTERRUPTED
    assert capsys.readouterr() == ("", "error: interrupted\n")
    data = strict_json((tmp_path / "report" / "report.json").read_text(encoding="utf-8"))
    assert (data["complete"], data["passed"]) == (False, False)
    assert "Interrupted" in (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert cli.main(arguments) == cli.EXIT_INTERRUPTED
    assert [path.name for path in tmp_path.iterdir()] == ["report"]
