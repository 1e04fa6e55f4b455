"""The commands on the bundled checkpoint: what they print where, and what they leave behind."""

from __future__ import annotations

import inspect
import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from checkpoints import mini, random_tensors, stack_experts, tensor_shapes, write_checkpoint

from qwenport import cli
from qwenport.commands import generate

TINY = Path(__file__).resolve().parent.parent / "examples" / "tiny-qwen2.5"


@dataclass(frozen=True)
class Ran:
    """One command's exit code and output."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """stdout, which must be one JSON object."""
        return json.loads(self.out)


Run = Callable[..., Ran]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command line in this process."""

    def call(*arguments: object) -> Ran:
        code = cli.main([str(argument) for argument in arguments])
        return Ran(code, *capsys.readouterr())

    return call


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled checkpoint, told to have no stop tokens: texts are as long as asked for."""
    path = tmp_path_factory.mktemp("checkpoint") / "tiny"
    shutil.copytree(TINY, path)
    (path / "generation_config.json").write_text('{"eos_token_id": []}')
    return path


@pytest.fixture(scope="module")
def package(checkpoint: Path) -> Path:
    """Its package, weights by reference."""
    path = checkpoint.parent / "tiny.package"
    assert cli.main(["export", str(checkpoint), str(path), "--quiet", "--json"]) == 0
    return path


@pytest.fixture(scope="module")
def engine(package: Path) -> Path:
    """Its TensorRT-RTX engine for two GPUs."""
    path = package.parent / "tiny.engine"
    options = ["--target", "tensorrt-rtx", "--gpu", "sm86,sm120", "--max-seq-len", "200", "--quiet"]
    assert cli.main(["build", str(package), str(path), *options]) == 0
    return path


# help


@pytest.mark.parametrize("name", [*cli.COMMANDS, "plugins build", "cpp install"])
def test_help_has_two_sentences_an_example_and_every_default(name: str, run: Run) -> None:
    command: click.Command | None = cli.cli
    for word in name.split():
        assert isinstance(command, click.Group)
        command = command.get_command(click.Context(command), word)
    assert command is not None and command.help is not None
    description, _, examples = inspect.cleandoc(command.help).partition("\b\nExample")
    assert description.count(". ") + description.count(".\n") >= 2
    assert f"qwenport {name}" in examples
    for option in command.params:
        if isinstance(option, click.Option) and not option.is_flag:
            told = option.required or option.show_default or option.default is not None
            assert told, f"{option.name} does not say its default"
            assert option.help
    shown = run(*name.split(), "--help")
    assert shown.code == 0 and shown.err == ""
    assert "Sentinel" not in shown.out


# export


def test_export_prints_its_result_on_stdout_and_nothing_else(
    checkpoint: Path, tmp_path: Path, run: Run
) -> None:
    result = run("export", checkpoint, tmp_path / "out", "--max-seq-len", 128)
    assert (result.code, result.err) == (0, "")
    assert "128 positions" in result.out and "by reference" in result.out
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_export_json_states_what_was_written_and_the_notes(
    checkpoint: Path, tmp_path: Path, run: Run
) -> None:
    options = ["--rope-scaling", "dynamic:2", "--weights", "copy", "--max-batch", "3", "--json"]
    result = run("export", checkpoint, tmp_path / "out", *options)
    assert result.code == 0
    report = result.json
    assert (report["max_seq_len"], report["max_batch"], report["weights"]) == (1024, 3, "copy")
    assert report["bytes_written"] > report["weight_bytes"]
    assert "1024" in report["notes"][0]
    assert result.err == f"note: {report['notes'][0]}\n"


def test_a_note_is_made_only_of_a_table_that_is_beyond_the_original_length(
    checkpoint: Path, tmp_path: Path, run: Run
) -> None:
    options = ["--rope-scaling", "dynamic:2", "--max-seq-len", "512", "--json"]
    assert run("export", checkpoint, tmp_path / "out", *options).json["notes"] == []


def test_export_pack_writes_the_stacks_of_experts_and_links_the_rest(
    tmp_path: Path, run: Run
) -> None:
    raw = mini("qwen2_moe")
    tensors = random_tensors(tensor_shapes(raw), torch.float32)
    checkpoint = write_checkpoint(tmp_path / "checkpoint", raw, tensors, shards=2)
    linked = run("export", checkpoint, tmp_path / "linked", "--json").json
    packed = run("export", checkpoint, tmp_path / "packed", "--weights", "pack", "--json").json
    experts = sum(t.nbytes for name, t in tensors.items() if ".experts." in name)
    more = packed["bytes_written"] - linked["bytes_written"]
    assert packed["weights"] == "pack" and abs(more - experts) < experts / 4  # graph and header
    assert (
        packed["weight_bytes"] == linked["weight_bytes"] == sum(t.nbytes for t in tensors.values())
    )
    assert run("inspect", tmp_path / "packed", "--json").json["weights"]["tensors"] == len(
        stack_experts(tensors)
    )
    told = run("export", checkpoint, tmp_path / "again", "--weights", "pack").out
    assert "by reference, experts stacked" in told


# inspect


def test_inspect_package_counts_operators_weights_and_cache(package: Path, run: Run) -> None:
    facts = run("inspect", package, "--json").json
    operators = facts["operators"]
    assert operators["layers_alike"] and operators["per_layer"]["Attention"] == 1
    assert operators["total"]["qwenport.RotaryEmbedding"] == 2 * 5
    assert sum(operators["total"].values()) == operators["nodes"]
    # 2 (key, value) x 5 layers x 2 heads x 32 x 2 bytes
    assert facts["kv_cache"] == {"bytes_per_token": 1280, "bytes_per_text": 1280 * 512}
    assert facts["weights"]["tensors"] == 62
    assert facts["bindings"]["outputs"][0]["name"] == "logits"


def test_inspect_prints_tables_and_brief_only_the_first_lines(package: Path, run: Run) -> None:
    full, brief = run("inspect", package), run("inspect", package, "--brief")
    assert full.code == brief.code == 0 and full.err == brief.err == ""
    for text in ("past_key_values.* (10)", "TensorScatter", "RTX 4090", "a decoder layer"):
        assert text in full.out and text not in brief.out
    assert full.out.startswith(brief.out)


def test_inspect_checkpoint_before_any_export(checkpoint: Path, run: Run) -> None:
    facts = run("inspect", checkpoint, "--json").json
    assert facts["kind"] == "checkpoint" and facts["max_seq_len"] == 512
    assert all(gpu["fits"] for gpu in facts["gpus"])


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("qwen2_moe", "2 of 6 a token, each of 24 and a shared one of 28, in 2 of 3 layers"),
        ("qwen3_moe", "3 of 5 a token, each of 20, in 2 of 2 layers"),
    ],
)
def test_inspect_tells_of_experts_before_and_after_the_export(
    family: str, words: str, tmp_path: Path, run: Run
) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", mini(family))
    assert words in run("inspect", checkpoint).out
    run("export", checkpoint, tmp_path / "package")
    assert words in run("inspect", tmp_path / "package").out
    facts = run("inspect", tmp_path / "package", "--json").json["operators"]
    assert facts["layers_alike"] is (family == "qwen3_moe")
    assert (
        facts["per_layer"]["qwenport.MoERouter"] == facts["per_layer"]["qwenport.MoEExperts"] == 1
    )
    assert facts["total"]["qwenport.MoEExperts"] == 2


def test_inspect_engine_shows_its_gpus_ranges_and_bytes(engine: Path, run: Run) -> None:
    facts = run("inspect", engine, "--json").json
    assert facts["architectures"] == ["sm86", "sm120"] and facts["max_seq_len"] == 200
    assert facts["attention"] == {"form": "chunked", "span_multiple": 256, "slots": 256}
    assert facts["kv_cache"]["bytes_per_text"] == 256 * facts["kv_cache"]["bytes_per_token"]
    assert {gpu["max_context"] for gpu in facts["gpus"]} == {200}
    assert facts["plan"]["bytes"] == (engine / "engine.plan").stat().st_size
    assert {gpu["architecture"] for gpu in facts["gpus"]} == {"sm86", "sm120"}
    assert {tuple(gpu["targets"]) for gpu in facts["gpus"]} == {("tensorrt-rtx",)}
    assert "1..8 x 2 x 256 x 32" in run("inspect", engine).out


@pytest.fixture(scope="module")
def cpu_engine(package: Path) -> Path:
    """Its engine for onnxruntime."""
    path = package.parent / "tiny.cpu-engine"
    options = ["--target", "onnxruntime", "--max-seq-len", "256", "--quiet", "--json"]
    assert cli.main(["build", str(package), str(path), *options]) == 0
    return path


def test_build_for_onnxruntime_says_what_runs_it_and_what_it_holds(
    package: Path, tmp_path: Path, run: Run
) -> None:
    result = run("build", package, tmp_path / "engine", "--target", "onnxruntime")
    assert (result.code, result.err) == (0, "")
    assert "onnxruntime 1.26 or newer on the CPU; fp32, 512 positions, batch 8" in result.out
    report = run("build", package, tmp_path / "again", "--target", "onnxruntime", "--json").json
    assert (report["flavour"], report["runtime_version"]) == ("onnxruntime", "1.26")
    assert report["gpus"] == [] and "plan_bytes" not in report
    assert 1.9 < report["engine_weight_bytes"] / report["weight_bytes"] < 2.1


def test_inspect_of_an_engine_for_onnxruntime_shows_memory_and_no_gpus(
    cpu_engine: Path, run: Run
) -> None:
    facts = run("inspect", cpu_engine, "--json").json
    assert facts["kind"] == "engine" and facts["dtype"] == "fp32" and "gpus" not in facts
    assert facts["graph"]["bytes"] == (cpu_engine / "model.onnx").stat().st_size
    cache = facts["kv_cache"]["bytes_per_text"]
    assert cache == 256 * facts["kv_cache"]["bytes_per_token"]
    assert facts["memory_bytes"] == facts["weights"]["bytes"] + cache
    out = run("inspect", cpu_engine).out
    assert "GPUs" not in out and "plugins" not in out
    assert "by onnxruntime 1.26 or newer on the CPU" in out and "memory" in out
    assert "1..8 x 2 x 1..256 x 32" in out


def test_generate_writes_the_same_from_a_package_and_its_engine(
    package: Path, cpu_engine: Path, run: Run
) -> None:
    options = ["--prompt", "The moon", "--max-new-tokens", 24, "--json"]
    options += ["--temperature", 0.8, "--seed", 3]
    first, second = (run("generate", path, *options).json for path in (package, cpu_engine))
    assert first["token_ids"] == second["token_ids"] and len(first["token_ids"]) == 24


# validate


def test_validate_exits_0_where_parity_holds_and_writes_its_report(
    package: Path, checkpoint: Path, tmp_path: Path, run: Run
) -> None:
    result = run("validate", package, "--reference", checkpoint, "--report", tmp_path / "parity")
    assert (result.code, result.err) == (0, "")
    assert result.out.splitlines()[-1].startswith("parity holds: ")
    assert json.loads((tmp_path / "parity" / "report.json").read_text())["passed"] is True


def test_validate_exits_1_where_parity_does_not_hold(
    package: Path, checkpoint: Path, tmp_path: Path, run: Run
) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(package, changed)
    weights = changed / "weights" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-192 * 2 :] = bytes(192 * 2)  # the last tensor's last row; the header stays as it is
    weights.write_bytes(data)
    result = run("validate", changed, "--reference", checkpoint, "--json", "--report", tmp_path)
    assert (result.code, result.err) == (1, "")
    assert result.json["passed"] is False
    assert "Parity does not hold" in (tmp_path / "report.html").read_text()


# generate


def test_generate_streams_piece_by_piece_what_json_has_as_one_text(
    package: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces: list[str] = []
    monkeypatch.setattr(generate, "stream", pieces.append)
    options = ["generate", package, "--prompt", "Once upon a time", "--max-new-tokens", 20]
    streamed = run(*options)
    assert streamed.code == 0 and streamed.out == ""
    assert len(pieces) >= 20
    assert "20 tokens" in streamed.err and "ended by --max-new-tokens" in streamed.err
    report = run(*options, "--json")
    assert report.err == ""
    assert len(report.json["token_ids"]) == 20 and report.json["finish_reason"] == "length"
    assert "".join(pieces) == report.json["text"] + "\n"
    page = (Path(__file__).parents[1] / "docs" / "sessions.md").read_text().split("## Sessions")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == report.json.keys()


def test_generate_quiet_prints_the_text_alone(package: Path, run: Run) -> None:
    result = run("generate", package, "--prompt", "The fox", "--max-new-tokens", 5, "--quiet")
    assert result.code == 0 and result.err == "" and result.out.endswith("\n")


def test_a_seed_repeats_a_drawn_text_and_is_told(package: Path, run: Run) -> None:
    options = ["generate", package, "--prompt", "The fox", "--temperature", 5, "--json"]
    options += ["--max-new-tokens", 12]
    first = run(*options).json
    again = run(*options, "--seed", first["seed"]).json
    assert first["token_ids"] == again["token_ids"]
    assert run(*options).json["token_ids"] != first["token_ids"]


def test_sampling_options_without_temperature_are_said_to_do_nothing(
    package: Path, run: Run
) -> None:
    options = ["generate", package, "--prompt", "The fox", "--max-new-tokens", 2, "--top-k", 3]
    assert "note: --top-k, --top-p and --seed do nothing" in run(*options).err


def test_prompt_from_stdin_is_the_prompt_without_its_last_newline(
    package: Path, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "prompt.txt").write_text("The fox\n")
    options = ["--max-new-tokens", 3, "--json"]
    with (tmp_path / "prompt.txt").open() as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        piped = run("generate", package, "--prompt", "-", *options).json
    typed = run("generate", package, "--prompt", "The fox", *options).json
    assert piped["prompt_token_ids"] == typed["prompt_token_ids"]


def test_chat_puts_the_prompt_into_the_template(package: Path, run: Run) -> None:
    options = ["--chat", "--max-new-tokens", 1, "--json"]
    ids = run("generate", package, "--prompt", "Hello", *options).json["prompt_token_ids"]
    assert ids[0] == 2046 and ids.count(2046) == 2  # <|im_start|>, the user's and the assistant's


def test_the_end_of_the_context_ends_the_text_with_a_note(package: Path, run: Run) -> None:
    prompt = " fox" * 255
    result = run("generate", package, "--prompt", prompt, "--max-new-tokens", 10**6)
    assert result.code == 0
    assert "note: the context of 512 positions is full" in result.err


def test_stop_ids_of_the_generation_config_end_the_text(
    checkpoint: Path, package: Path, run: Run, tmp_path: Path
) -> None:
    options = ["--prompt", "Once upon a time", "--max-new-tokens", 8, "--json"]
    ids = run("generate", package, *options).json["token_ids"]
    source = tmp_path / "stops"
    shutil.copytree(checkpoint, source)
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, ids[3]]}))
    assert run("export", source, tmp_path / "package", "--quiet").code == 0
    stopped = run("generate", tmp_path / "package", *options).json
    assert stopped["token_ids"] == ids[: ids.index(ids[3])]
    assert (stopped["finish_reason"], stopped["stop_id"]) == ("stop", ids[3])


# build


def test_build_json_states_the_engine(package: Path, tmp_path: Path, run: Run) -> None:
    options = ["--target", "tensorrt-rtx", "--gpu", "sm89", "--max-batch", 2, "--json"]
    result = run("build", package, tmp_path / "engine", *options)
    assert (result.code, result.err) == (0, "")
    assert result.json["gpus"] == ["sm89"] and result.json["max_batch"] == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("generate", ["--prompt", "Hello"]),
        ("bench", []),
        ("bench", ["--threads", 2]),
        ("perplexity", [TINY / "config.json"]),
    ],
)
def test_an_engine_without_a_gpu_is_one_line(
    command: str, options: list[object], engine: Path, run: Run
) -> None:
    result = run(command, engine, *options)
    assert result.code == 2 and result.out == ""
    assert result.err.count("\n") == 1 and "GPU" in result.err
