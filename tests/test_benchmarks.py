"""The benchmarks run from end to end on a tiny shape, and measure what they say."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
KEYS = {
    "schema",
    "benchmark",
    "date",
    "quick",
    "settings",
    "machine",
    "versions",
    "runs",
    "summary",
    "bars",
}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("benchmarks")


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import a module of the benchmarks, which are scripts and no package."""
    monkeypatch.syspath_prepend(BENCHMARKS)

    def module(name: str) -> ModuleType:
        return importlib.import_module(name)

    return module


def run_quick(name: str, work: Path, *options: str) -> dict[str, Any]:
    """Run a benchmark's smoke test; its JSON."""
    output = work / f"{name}.json"
    command = [sys.executable, BENCHMARKS / f"{name}.py", "--quick", *options]
    run = subprocess.run(
        [*command, "--work", work / "work", "--output", output],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    text = output.read_text(encoding="utf-8")
    assert str(BENCHMARKS.parent) not in text
    data: dict[str, Any] = json.loads(text)
    assert data.keys() >= KEYS
    assert (data["benchmark"], data["quick"], data["bars"]) == (name, True, [])
    return data


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "measured"),
    [
        ("export", ("seconds", "peak_rss_bytes", "written_bytes")),
        ("build", ("seconds", "plan_bytes", "layers")),
        ("decode", ("decode_tokens_per_second", "prefill_tokens_per_second")),
    ],
)
def test_quick_run_writes_its_json(name: str, measured: tuple[str, ...], work: Path) -> None:
    data = run_quick(name, work)
    (ours,) = data["summary"]
    assert ours["error"] is None
    assert all(ours[key] > 0 for key in measured)


@pytest.mark.slow
def test_quick_run_of_few_bits_measures_every_engine(work: Path) -> None:
    data = run_quick("few_bits", work)
    assert {row["contender"] for row in data["summary"]} == {
        "qwenport fp32",
        "qwenport int8",
        "qwenport int4",
    }
    for row in data["summary"]:
        assert row["error"] is None and row["decode_cpu_seconds"] > 0 and row["weight_bytes"] > 0


@pytest.mark.slow
def test_quick_run_of_experts_measures_both_parts_and_checks_every_output(work: Path) -> None:
    data = run_quick("experts", work)
    assert [row["contender"] for row in data["summary"] if row["error"]] == []
    rows = {
        part: [row for row in data["summary"] if row["part"] == part]
        for part in ("layer", "stacking")
    }
    assert len(rows["layer"]) == 6
    keys = ("decode_median_seconds", "prefill_median_seconds", "of_the_bound", "peak_rss_bytes")
    assert all(row[key] > 0 for row in rows["layer"] for key in keys)
    assert all(row["rel_l2"] <= 1e-5 for row in rows["layer"])
    assert len({row["rel_l2"] for row in rows["layer"]}) > 2  # each is its own computation
    by_name = {row["contender"]: row for row in rows["stacking"]}
    assert all(row["seconds"] > 0 and row["peak_rss_bytes"] > 0 for row in by_name.values())
    written = [by_name[f"export, {weights}"]["written_bytes"] for weights in ("link", "pack")]
    stacks = 2 * 6 * 3 * 48 * 128 * 2  # bytes; the graph is smaller, and blocks are whole
    assert written[1] - written[0] > 0.9 * stacks
    assert by_name["build, link"]["plan_to_weights"] > 1


@pytest.mark.slow
def test_quick_run_of_sensitivity_counts_by_family_and_form(work: Path) -> None:
    data = run_quick("sensitivity", work, "--families", "norms", "--models", "1")
    assert {run["family"] for run in data["runs"]} == {"norms"}
    forms = {"package", "network, exact", "network"}
    assert {run["form"] for run in data["runs"]} <= forms
    assert all(run["caught"] and run["error"] is None for run in data["runs"])
    assert sum(row["defects"] for row in data["by_family"]) == len(data["runs"]) == 2
    assert all(row["caught"] == row["caught_by_numbers"] for row in data["by_family"])
    assert {record["form"] for record in data["healthy"]} == forms
    assert [row["false_alarms"] for row in data["false_alarms"]] == [0, 0, 0]


def test_sensitivity_goes_on_where_a_run_was_killed(load: Any, tmp_path: Path) -> None:
    """Half a line is judged again; whole ones are not."""
    journal = load("sensitivity").Journal(tmp_path / "new" / "commit.jsonl")
    assert journal.known() == {}
    journal.add("a", {"caught": True})
    with journal.path.open("a") as stream:
        stream.write('{"task": "b", "res')
    assert journal.known() == {"a": {"caught": True}}
    journal.add("b", [2])
    assert journal.known() == {"a": {"caught": True}, "b": [2]}


def test_sensitivity_knows_its_families(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sensitivity = load("sensitivity")
    from click.testing import CliRunner

    result = CliRunner().invoke(sensitivity.main, ["--families", "norms,colours"])
    assert result.exit_code == 2 and "no family 'colours'; there are norms, " in result.output
    assert "window_of_256" in sensitivity._names("distance, rope")
    assert sensitivity.HEALTHY_MODELS >= 300


@pytest.mark.slow
def test_quick_run_of_false_alarms_judges_one_text_in_both_forms(work: Path) -> None:
    data = run_quick("false_alarms", work)
    assert [row["contender"] for row in data["summary"]] == ["bf16, package", "bf16, network"]
    assert all(row["false_alarms"] == 0 and row["error"] is None for row in data["summary"])
    package, network = data["runs"]
    assert package["passed"] and network["passed"] and network["cpu_seconds"] > 1
    ratio = network["ratios"]["in bf16"]
    assert 0 < ratio["low"] < ratio["ratio"] < ratio["high"]
    assert network["worst_rounding"]["times_own"] > 0 and package["worst_rounding"] is None


def test_prompt_files_differ(load: Any, tmp_path: Path) -> None:
    files = load("false_alarms").write_prompts(tmp_path, 10)
    texts = {file.read_text(encoding="utf-8") for file in files}
    assert len(texts) == 10 and min(map(len, texts)) > 1000


@pytest.mark.parametrize(
    "name",
    "export build decode experts plugins embedded sensitivity false_alarms validation tokenizer shapes smollm2 "
    "peers".split(),
)
def test_help_says_what_a_script_does(name: str) -> None:
    run = subprocess.run(
        [sys.executable, BENCHMARKS / f"{name}.py", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    usage, what, *_ = run.stdout.split("\n\n")
    assert usage.startswith(f"Usage: {name}.py ")
    assert len(what.split()) > 5


@pytest.mark.parametrize(
    ("shape", "files", "parameters"),
    [
        ("qwen2.5-0.5b-instruct", 1, 494_032_768),
        ("qwen2.5-7b-instruct", 4, 7_615_616_512),
        ("qwen2.5-72b-instruct", 37, 72_706_203_648),
        ("llama-3.1-8b-instruct", 4, 8_030_261_248),
        ("llama-3.1-405b-instruct", 191, 405_853_388_800),
    ],
)
def test_sparse_checkpoints_have_the_published_size_and_shards(
    shape: str, files: int, parameters: int, load: Any, tmp_path: Path
) -> None:
    directory = load("shapes").make_checkpoint(shape, tmp_path / shape, sparse=True)
    shards = [path.stat() for path in directory.glob("*.safetensors")]
    assert len(shards) == files
    assert 0 < sum(shard.st_size for shard in shards) - 2 * parameters < 1e6  # the headers
    assert sum(shard.st_blocks * 512 for shard in shards) < 1e7


def test_tiny_checkpoint_is_one_that_we_export(load: Any, tmp_path: Path) -> None:
    from qwenport.exporter import open_checkpoint

    directory = load("shapes").make_checkpoint("tiny", tmp_path / "tiny", sparse=False)
    assert open_checkpoint(directory).dtype == "bf16"


def test_moe_shapes_have_single_experts_of_the_published_sizes(load: Any) -> None:
    shapes = load("shapes")
    for shape, layers, experts, inner, hidden in (
        ("qwen1.5-moe-1-layer", 1, 60, 1408, 2048),
        ("qwen2-57b-a14b-instruct", 28, 64, 2560, 3584),
    ):
        tensors = shapes.tensors_of(shapes.config_of(shape))
        gates = [key for key in tensors if ".experts." in key and "gate_proj" in key]
        assert len(gates) == layers * experts
        assert {tensors[key] for key in gates} == {(inner, hidden)}


def test_ratio_pairs_the_times_of_a_turn(load: Any) -> None:
    experts, report = load("experts"), load("report").Report("experts", True, {})
    layer, key = experts.TINY, "decode_median_seconds"
    for turn, (ours, one, other) in enumerate(
        [(1.0, 4.0, 2.0), (2.0, 10.0, 30.0), (1.0, 9.0, 9.0)]
    ):
        for name, seconds in (("a", ours), ("b", one), ("c", other)):
            report.add_run(experts.title(layer, name), turn=turn, error=None, **{key: seconds})
    assert experts.ratio(report, layer, key, ["b", "c"], ["a"]) == 5.0  # of 2, 5 and 9
    report.add_run(experts.title(layer, "b"), turn=3, error="no such luck", **{key: None})
    assert experts.ratio(report, layer, key, ["b", "c"], ["a"]) == 9.0  # of 2, 15 and 9
    assert experts.ratio(report, layer, key, ["b"], ["a"]) is None


def test_measure_reports_memory_time_result_and_error(load: Any, tmp_path: Path) -> None:
    measure = load("measure").measure
    hold = "import time; x = bytearray(200 << 20); time.sleep(0.2); print('{\"x\": 1}')"
    run = measure([sys.executable, "-c", hold], tmp_path / "hold.log")
    assert (run.code, run.error, run.result) == (0, None, {"x": 1})
    assert run.seconds > 0.2
    assert 200 << 20 < run.peak_rss < 2000 << 20
    failed = measure([sys.executable, "-c", "raise SystemExit('no such luck')"], tmp_path / "log")
    assert (failed.code, failed.error, failed.result) == (1, "no such luck", {})


def test_links_to_the_checkpoint_are_not_counted_as_written(load: Any, tmp_path: Path) -> None:
    source, output = tmp_path / "checkpoint", tmp_path / "package"
    (source / "deep").mkdir(parents=True)
    (output / "weights").mkdir(parents=True)
    (source / "model.safetensors").write_bytes(bytes(1 << 20))
    os.link(source / "model.safetensors", output / "weights" / "model.safetensors")
    (output / "model.onnx").write_bytes(bytes(1 << 16))
    assert load("measure").written_bytes(output, source) == 1 << 16


def test_bars_hold_on_their_side_of_the_bound(load: Any) -> None:
    bar = load("report").Bar
    assert bar("x", 1.0, 1.0, "at most", "GB").holds
    assert bar("x", 1.1, 1.0, "at most", "GB").holds is False
    assert bar("x", 1.1, 1.0, "at least", "x").holds
    assert bar("x", None, 1.0, "at least", "x").holds is None


ROWS = [
    {"contender": "ours", "seconds": 2.0, "error": None},
    {"contender": "theirs", "seconds": None, "error": None},
    {"contender": "broken", "seconds": 3.0, "error": "no such luck"},
]


def test_table_leaves_out_what_is_missing_or_failed(load: Any) -> None:
    report = load("report")
    columns = {
        "contender": report.figure("contender"),
        "wall": report.figure("seconds", "{:.1f} ms", 1e-3),
    }
    made = report.table("Medians", columns, ROWS)
    cells = [list(column.cells) for column in made.columns]
    assert cells == [["ours", "theirs", "broken"], ["2000.0 ms", "", "failed"]]


@pytest.mark.parametrize(
    ("own", "bars_must_hold", "said"),
    [
        (["ours"], False, ""),
        (["ours", "broken"], False, "Error: broken failed"),
        (["ours"], True, "Error: does not hold: speed"),
    ],
)
def test_exit_code_is_1_if_our_own_fails_or_a_strict_bar_does_not_hold(
    own: list[str], bars_must_hold: bool, said: str, load: Any, tmp_path: Path
) -> None:
    from click.testing import CliRunner

    shared = load("report")

    @shared.benchmark("made-up", repeats=2, bars_must_hold=bars_must_hold)
    def main(report: Any) -> Any:
        seen = [report.settings["repeats"], report.peers, list(report.turns())]
        assert seen == [2, False, [1, 2]]
        bars = [shared.Bar("speed", 1.0, 2.0, "at least", "x")]
        return shared.Result([], ROWS, bars, own)

    output = tmp_path / "new" / "made-up.json"
    options = ["--no-peers", "--work", str(tmp_path), "--output", str(output)]
    result = CliRunner().invoke(main, options)
    assert (result.exit_code, said in result.output) == (1 if said else 0, True)
    data = json.loads(output.read_text(encoding="utf-8"))
    assert data["settings"] == {"repeats": 2, "peers": False}
    assert (data["summary"], data["bars"][0]["holds"]) == (ROWS, False)


@pytest.mark.parametrize("peers", [True, False])
def test_plugins_end_in_three_minutes_and_leave_out_peers_only(
    peers: bool, load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock that we move: 0.8 s for a contender of ours, 25 s for one that is compiled."""
    plugins, report = load("plugins"), load("report").Report("plugins", False, {"peers": peers})
    now = [0.0]
    who = {"plugin": 0.8, "plugin, as for many tokens": 0.8, "torch": 1.0, "torch.compile": 25.0}

    def seconds_of(setup: Any, call: float, inputs: Any, *, capture: bool) -> float:
        now[0] += call
        return call

    def cases(setup: Any, layers: Any, tokens: Any) -> Any:
        for number in range(3 * len(layers) * len(tokens)):
            contenders = {name: (seconds, True) for name, seconds in who.items()}
            yield plugins.Case(f"case {number}, 8 tokens", [], contenders, 1)

    monkeypatch.setattr(plugins, "seconds_of", seconds_of)
    monkeypatch.setattr(plugins, "cases", cases)
    plugins.measure_all(None, plugins.LAYERS, plugins.TOKENS, report, lambda: now[0])
    assert now[0] <= 180
    rows = plugins.summarise(report)
    timed = {
        name: [r for r in rows if r["contender"] == name and r["microseconds"]] for name in who
    }
    assert len(timed["plugin"]) == len(timed["plugin, as for many tokens"]) == 72
    assert 0 < len(timed["torch.compile"]) < 72 if peers else not timed["torch.compile"]
    assert len(rows) == 72 * (4 if peers else 2) and not any(row["error"] for row in rows)


def test_requirements_pin_everything_and_name_no_index() -> None:
    for file in (BENCHMARKS / "requirements").glob("*.txt"):
        lines = [line for line in file.read_text().splitlines() if not line.startswith("#")]
        assert lines
        assert all(line.count("==") == 1 and "/" not in line for line in lines), file.name
