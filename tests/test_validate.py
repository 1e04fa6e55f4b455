"""validate() on real packages: every rope kind and dtype, interruptions, wrong pairs, and what cannot be judged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import Capture, refused
from defects import ends, tables
from defects.tools import seed
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from qwenport import cli
from qwenport.commands import validate as command
from qwenport.exporter import (
    MANIFEST,
    PackageError,
    as_json,
    export,
    load_package,
    parse_config,
    read_config_json,
    write_json,
)
from qwenport.validate import Options, Report, Validation, ValidationError, open_target, validate
from qwenport.validate.prompts import make_prompts
from qwenport.validate.reference import Reference
from qwenport.validate.scenarios import SCENARIOS

EXAMPLES = Path(__file__).parent.parent / "examples"
CHECKPOINT, MIXTURE = EXAMPLES / "tiny-qwen2.5", EXAMPLES / "tiny-qwen2-moe"
HEAD_DIM = 16
WAYS: dict[str, dict[str, Any]] = {
    "package": {},
    "network": {"judged_as": "tensorrt-network"},
    "exact network": {"judged_as": "tensorrt-network", "exact": True},
}
REPORT_KEYS = {
    "schema_version", "passed", "target", "judged_as", "target_dtype", "compute_dtype", "reference",
    "reference_mode", "reference_weights", "layers_judged", "layers", "complete", "prompts",
    "own_rounding", "cache_slots", "max_seq_len", "loosened", "scenarios", "layers_error", "fault",
    "routing", "replayed", "environment", "hashes",
}  # fmt: skip
SCENARIO_KEYS = {
    "name", "summary", "status", "checks", "metrics", "by_position", "reason", "seconds",
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Small matrices gain nothing from threads, and parallel test workers would fight over cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_checkpoint(
    folder: Path,
    rope: dict[str, Any] | None = None,
    *,
    family: type = Qwen2Config,
    positions: int = 64,
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> Path:
    """A random two-layer checkpoint with biases and norms that are not trivial."""
    config = family(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, **(rope or {})},
        bos_token_id=0,
        eos_token_id=1,
        **settings,
    )
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5) if "norm" in name else parameter.normal_(0, 0.3)
            else:
                parameter.mul_(4)
    model.to(dtype).save_pretrained(folder)
    return folder


def status(report: Report) -> dict[str, str]:
    return {scenario.name: scenario.status for scenario in report.scenarios}


def strict_json(text: str) -> Any:
    """JSON without the NaN and Infinity that Python would read."""

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    return json.loads(text, parse_constant=refuse)


@pytest.fixture(scope="module")
def package_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """A bundled checkpoint's package, made once."""
    made: dict[Path, Path] = {}

    def package(checkpoint: Path) -> Path:
        if checkpoint not in made:
            folder = tmp_path_factory.mktemp(checkpoint.name)
            made[checkpoint] = export(checkpoint, folder / "package", weights="copy").path
        return made[checkpoint]

    return package


@pytest.fixture(scope="module")
def package(package_of: Callable[[Path], Path]) -> Path:
    return package_of(CHECKPOINT)


# what is right passes


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("checkpoint", [CHECKPOINT, MIXTURE], ids=lambda path: path.name)
def test_bundled_checkpoint_passes_every_scenario(
    checkpoint: Path, way: str, package_of: Callable[[Path], Path], tmp_path: Path
) -> None:
    package = package_of(checkpoint)
    seen: list[tuple[str, int, int]] = []
    report = validate(package, checkpoint, **WAYS[way], progress=lambda *step: seen.append(step))
    assert report.passed, report.failures
    expected = {s.name: "passed" for s in SCENARIOS} | {"past original context": "not run"}
    expected |= {"rope tables": "passed"}
    expected |= {} if way == "package" else {"parsed network": "passed"}
    expected |= {"routing": "passed"} if checkpoint == MIXTURE else {}
    assert status(report) == expected
    assert report.reference_weights == "fp32" and "text" in report.prompts
    assert report.fault is None and report.complete and not report.loosened
    assert len(report.layers_error) == report.layers + 1 == report.layers_judged + 1
    assert report.compute_dtype == ("bf16" if way == "network" else "fp32")
    assert seen[-1][1] == seen[-1][2]
    _assert_written(report, tmp_path / "new" / "folder", package)


def _assert_written(report: Report, folder: Path, package: Path) -> None:
    report.write(folder)
    data = strict_json((folder / "report.json").read_text(encoding="utf-8"))
    assert data.keys() == REPORT_KEYS
    assert (data["schema_version"], data["passed"]) == (2, True)
    for scenario in data["scenarios"]:
        assert scenario.keys() == SCENARIO_KEYS
        assert all(check["passed"] for check in scenario["checks"])
        if scenario["metrics"] is not None:
            count = scenario["metrics"]["positions"]
            assert [len(scenario["by_position"][name]) for name in ("rel_l2", "kl")] == [count] * 2
            worst = scenario["metrics"]["worst_position"]
            assert scenario["by_position"]["rel_l2"][worst] == scenario["metrics"]["worst_rel_l2"]
    source = load_package(package).manifest["source"]
    assert data["hashes"]["source config.json"] == source["config_sha256"]
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "Parity holds" in page and str(package) in page


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_other_dtypes_of_the_bundled_checkpoint_pass(dtype: str, tmp_path: Path) -> None:
    made = export(CHECKPOINT, tmp_path / "package", dtype=dtype)
    report = validate(made.path, CHECKPOINT)
    assert report.passed, report.failures
    assert report.reference_weights == f"fp32, weights rounded to {dtype} first"
    report = validate(made.path, CHECKPOINT, judged_as="tensorrt-network")
    assert report.passed, report.failures
    assert report.compute_dtype == dtype


def test_a_target_of_nan_is_a_strict_report(package: Path, tmp_path: Path) -> None:
    report = validate(seed(package, tmp_path / "nan", ends.one_nan), CHECKPOINT)
    report.write(tmp_path / "report")
    data = strict_json((tmp_path / "report" / "report.json").read_text(encoding="utf-8"))
    assert data["passed"] is False
    (first,) = [s for s in data["scenarios"] if s["name"] == "prefill"]
    assert first["metrics"]["rel_l2"] == "NaN" and first["metrics"]["nonfinite"] == 64
    assert first["by_position"]["kl"] == ["NaN"] * 64
    assert "NaN" in (tmp_path / "report" / "report.html").read_text(encoding="utf-8")


LONGROPE = {
    "rope_type": "longrope",
    "factor": 2.0,
    "original_max_position_embeddings": 64,
    "short_factor": [1.0 + 0.01 * i for i in range(HEAD_DIM // 2)],
    "long_factor": [1.5 + 0.3 * i for i in range(HEAD_DIM // 2)],
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("rope", "checkpoint", "request_"),
    [
        pytest.param({"rope_type": "linear", "factor": 2.0}, {}, {}, id="linear"),
        pytest.param({"rope_type": "dynamic", "factor": 2.0}, {}, {}, id="dynamic"),
        pytest.param(YARN, {}, {}, id="yarn-from-the-model-card"),
        pytest.param(LLAMA3, {"family": LlamaConfig}, {"max_batch": 1}, id="llama3"),
        pytest.param(LONGROPE, {"positions": 128}, {}, id="longrope-long"),
        pytest.param(
            LONGROPE, {"positions": 128}, {"max_seq_len": 64}, id="longrope-short", marks=slow
        ),
        pytest.param(None, {}, {"rope_scaling": "linear:2"}, id="ask-linear", marks=slow),
        pytest.param(None, {}, {"rope_scaling": "dynamic:2"}, id="ask-dynamic", marks=slow),
        pytest.param(
            None,
            {"family": LlamaConfig},
            {"rope_scaling": "yarn:4"},
            id="ask-yarn-llama",
            marks=slow,
        ),
        pytest.param(
            None,
            {"family": LlamaConfig, "attention_bias": True, "mlp_bias": True},
            {"max_seq_len": 1},
            id="llama-with-biases-and-one-slot",
            marks=slow,
        ),
    ],
)
def test_rope_kind_passes(
    rope: dict[str, Any] | None,
    checkpoint: dict[str, Any],
    request_: dict[str, Any],
    tmp_path: Path,
) -> None:
    source = make_checkpoint(tmp_path / "checkpoint", rope, **checkpoint)
    made = export(source, tmp_path / "package", **request_)
    report = validate(made.path, source)
    assert report.passed, report.failures
    if made.max_batch == 1:
        assert status(report)["ragged batch"] == "not run"
        (ragged,) = [s for s in report.scenarios if s.name == "ragged batch"]
        assert ragged.reason is not None and "one row" in ragged.reason
    if made.config.rope.depends_on_length and made.max_seq_len > 64:
        _assert_pinning_matters(made.path, source)


def _assert_pinning_matters(path: Path, source: Path) -> None:
    """Without the pin, transformers would use the frequencies of a short text here."""
    target = open_target(path)
    pinned = Reference(target, source).rope_tables(0, 8)
    other = Reference(replace(target, rope_length=8), source).rope_tables(0, 8)
    assert np.abs(pinned[0] - other[0]).max() > 1e-3


def test_yarn_asked_for_on_a_plain_checkpoint_passes_beyond_the_cache_that_is_filled(
    tmp_path: Path,
) -> None:
    """Positions 512 to 2047 exist by the request alone; only the rope check reaches the last of them."""
    source = make_checkpoint(tmp_path / "checkpoint", positions=512)
    made = export(source, tmp_path / "package", rope_scaling="yarn:4", weights="copy")
    report = validate(made.path, source)
    assert report.passed, report.failures
    assert report.max_seq_len == 2048 > report.cache_slots

    assert status(report)["past original context"] == "passed"
    wrong_end = validate(seed(made.path, tmp_path / "end", tables.wrong_last_rope_row), source)
    failed = [s.name for s in wrong_end.scenarios if s.status == "failed"]
    assert failed == ["rope tables", "end of context"]
    assert "2047" in wrong_end.failures[0]

    manifest = json.loads((made.path / MANIFEST).read_text(encoding="utf-8"))
    claims = as_json(asdict(parse_config(read_config_json(made.path), "yarn:5")))
    write_json(made.path / MANIFEST, {**manifest, "rope_scaling": "yarn:5", "model": claims})
    other_factor = validate(made.path, source)
    assert not other_factor.passed
    assert status(other_factor)["rope tables"] == status(other_factor)["prefill"] == "failed"


def test_weights_rounded_by_the_export_are_rounded_in_the_oracle(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "checkpoint", tie_word_embeddings=True)
    made = export(source, tmp_path / "package", dtype="bf16")
    report = validate(made.path, source)
    assert report.passed, report.failures
    assert report.reference_weights == "fp32, weights rounded to bf16 first"
    assert "random token ids" in report.prompts

    shutil.rmtree(made.path)
    exact = export(source, tmp_path / "package", weights="copy")
    assert validate(exact.path, source).passed
    for name in load_package(exact.path).manifest["weights"]["files"]:
        _change_one_weight(exact.path / name)
    changed = validate(exact.path, source)
    assert not changed.passed, "other values under the same header"


def _change_one_weight(file: Path) -> None:
    tensors = load_file(file)
    before = file.stat().st_size
    tensors["model.layers.1.mlp.down_proj.weight"][3] *= 1.01
    save_file(tensors, file, metadata={"format": "pt"})
    assert file.stat().st_size == before


# an interruption


def interrupting(at: str) -> Callable[[str, int, int], None]:
    """A progress callback in which Ctrl-C is pressed when `at` is under way."""

    def progress(what: str, done: int, total: int) -> None:
        if what == at:
            raise KeyboardInterrupt

    return progress


INTERRUPTIONS = {
    ("loading the reference", False): {s.name for s in SCENARIOS},
    ("prefill", False): {s.name for s in SCENARIOS},
    ("chunked prefill", False): {s.name for s in SCENARIOS[3:]},
    ("greedy", False): {"greedy"},
    ("looking inside", False): set(),
    ("running the target layer by layer", True): {s.name for s in SCENARIOS},
    ("logits", True): {s.name for s in SCENARIOS},
    ("after reset", True): {"after reset", "greedy"},
}


@pytest.mark.parametrize(("at", "streamed"), INTERRUPTIONS)
def test_what_was_judged_before_an_interruption_is_told_and_does_not_pass(
    at: str, streamed: bool, package: Path, tmp_path: Path
) -> None:
    validation = Validation(
        open_target(package), CHECKPOINT, Options(streamed), progress=interrupting(at)
    )
    with pytest.raises(KeyboardInterrupt):
        validation.run()
    report = validation.report()
    assert (report.complete, report.passed) == (False, False)
    left = {s.name for s in report.scenarios if s.reason == "interrupted"}
    assert left == INTERRUPTIONS[at, streamed]
    assert {s.name for s in report.scenarios} >= {s.name for s in SCENARIOS}
    for scenario in report.scenarios:
        if scenario.name in left:
            assert (scenario.status, scenario.metrics) == ("not run", None)
        elif scenario.name != "past original context":
            assert scenario.status == "passed"
    report.write(tmp_path)
    data = strict_json((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert (data["complete"], data["passed"]) == (False, False)
    assert "Interrupted: no verdict" in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("at", ["loading the reference", "decode"])
def test_ctrl_c_at_the_command_line_leaves_a_marked_report(
    at: str, package: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def bar(opening: str, quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
        yield interrupting(at)

    monkeypatch.setattr(command, "progress_bar", bar)
    arguments = ["validate", str(package), "--reference", str(CHECKPOINT)]
    assert cli.main([*arguments, "--report", str(tmp_path / "report")]) == cli.EXIT_INTERRUPTED
    assert capsys.readouterr() == ("", "error: interrupted\n")
    data = strict_json((tmp_path / "report" / "report.json").read_text(encoding="utf-8"))
    assert (data["complete"], data["passed"]) == (False, False)
    assert "Interrupted" in (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert cli.main(arguments) == cli.EXIT_INTERRUPTED
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


# what cannot be judged


def test_another_checkpoint_is_refused(package: Path, tmp_path: Path, capsys: Capture) -> None:
    other = make_checkpoint(tmp_path / "other")
    with pytest.raises(ValidationError, match=r"not made from .*: config.json differs"):
        validate(package, other)
    assert "config.json differs" in refused(capsys, "validate", package, "--reference", other)

    renamed = tmp_path / "renamed"
    shutil.copytree(CHECKPOINT, renamed)
    file = renamed / "model.safetensors"
    save_file(load_file(file), file, metadata={"other": "header"})
    with pytest.raises(ValidationError, match=r"model.safetensors has another header or size"):
        validate(package, renamed)


def test_what_is_no_target_is_refused(tmp_path: Path) -> None:
    refusals = {
        tmp_path / "absent": (PackageError, "no such directory"),
        tmp_path: (PackageError, "neither a package nor an engine"),
        CHECKPOINT: (ValidationError, "neither a package nor an engine"),
    }
    for nothing, (error, words) in refusals.items():
        for how in WAYS.values():
            with pytest.raises(error, match=words):
                validate(nothing, CHECKPOINT, **how)


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"exact": True}, "exact arithmetic is for judging as tensorrt-network"),
        ({"judged_as": "engine"}, "a package cannot be judged as engine"),
        ({"judged_as": "onnx"}, "a package cannot be judged as onnx"),
        ({"layers": 0}, r"layers 0 is outside 1\.\.5"),
        ({"layers": 6}, r"layers 6 is outside 1\.\.5"),
        ({"layers": 2, "streamed": False}, "fewer layers are for streamed validation"),
        ({"streamed": True, "device": "cuda"}, "only what runs on the CPU can be streamed"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(
    request_: dict[str, Any], words: str, package: Path
) -> None:
    with pytest.raises(ValidationError, match=words):
        validate(package, CHECKPOINT, **request_)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--exact"], ("exact", "tensorrt-network")),
        (["--as", "package"], ("--as", "tensorrt-network")),
        (["--layers", "0"], ("--layers", "x>=1")),
        (["--layers", "6"], ("layers 6", "1..5")),
        (["--prompts", "absent.txt"], ("--prompts", "absent.txt", "does not exist")),
        (["--prompts", "."], ("--prompts", "directory")),
        (["--threshold", "rel_l3=1"], ("rel_l3=1", "rel_l2")),
        (["--threshold", "rel_l2=much"], ("rel_l2", "much", "not a number")),
    ],
)
def test_options_that_make_no_sense_are_one_line(
    options: list[str], words: tuple[str, ...], package: Path, capsys: Capture
) -> None:
    line = refused(capsys, "validate", package, "--reference", CHECKPOINT, *options)
    assert all(word in line for word in words), line


def test_an_engine_is_not_judged_as_a_network(tmp_path: Path, capsys: Capture) -> None:
    """Its manifest alone says that it is one."""
    engine = tmp_path / "engine"
    engine.mkdir()
    write_json(engine / MANIFEST, {"format": "qwenport-engine", "format_version": 2})
    with pytest.raises(ValidationError, match="an engine holds no network; judge its package"):
        open_target(engine, judged_as="tensorrt-network")
    options = ["--reference", CHECKPOINT, "--as", "tensorrt-network"]
    assert "an engine holds no network" in refused(capsys, "validate", engine, *options)


# prompts


def test_prompts_of_a_file_are_what_is_run(package: Path, tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("Der Uhrmacher zählt 1, 2, 3. 時計職人。\n" * 3, encoding="utf-8")
    ids = make_prompts(CHECKPOINT, 2048, file).ids
    assert ids != make_prompts(CHECKPOINT, 2048).ids[: len(ids)]
    arguments = ["validate", str(package), "--reference", str(CHECKPOINT), "--json"]
    plain = (cli.main(arguments), json.loads(capsys.readouterr().out))
    given = (cli.main([*arguments, "--prompts", str(file)]), json.loads(capsys.readouterr().out))
    assert (plain[0], given[0]) == (0, 0)
    assert given[1]["prompts"].startswith(f"prompts.txt, {len(ids)} tokens, SHA-256 ")
    rows = [
        [s["by_position"]["rel_l2"] for s in report["scenarios"] if s["name"] == "prefill"]
        for _, report in (plain, given)
    ]
    assert rows[0] != rows[1], "the same tokens were run"


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "empty"), (b"caf\xe9", "codec can't decode"), (None, "No such file")],
)
def test_prompts_that_cannot_be_read_are_refused(
    content: bytes | None, words: str, package: Path, tmp_path: Path, capsys: Capture
) -> None:
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
        options = ["--reference", CHECKPOINT, "--prompts", file]
        assert words in refused(capsys, "validate", package, *options)
    with pytest.raises(ValidationError, match=words):
        validate(package, CHECKPOINT, prompts=file)


def test_prompts_without_a_tokenizer_are_refused(
    package: Path, tmp_path: Path, capsys: Capture
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(CHECKPOINT / name, bare)
    file = tmp_path / "prompts.txt"
    file.write_text("Hello")
    line = refused(capsys, "validate", package, "--reference", bare, "--prompts", file)
    assert "has no tokenizer to encode them" in line
    with pytest.raises(ValidationError, match="does not fit the vocabulary of 20"):
        make_prompts(CHECKPOINT, 20, file)


def test_prompts_are_random_where_no_tokenizer_fits(tmp_path: Path) -> None:
    assert "text" in make_prompts(CHECKPOINT, 2048).description
    too_small = make_prompts(CHECKPOINT, 100)
    assert "does not fit" in too_small.description and max(too_small.ids) < 100
    (tmp_path / "tokenizer.json").write_text("{", encoding="utf-8")
    broken = make_prompts(tmp_path, 50)
    assert "does not load" in broken.description
    assert broken.take(3000) == make_prompts(tmp_path, 50).take(3000)
