"""What MkDocs is told beside mkdocs.yml: pages and files that lie outside docs/, and what may not be undocumented.

The home page is README.md; the headers and the results that pages link to are copied into the site. A link to a file of
the repository leads to its copy. A public name, method or field that no docstring describes fails the build.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    "examples.md": "examples/README.md",
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "security.md": "SECURITY.md",
}
HEADERS = {
    "reference/cpp.md": ("The C++ header", "engines/cpp/include/qwenport/qwenport.hpp", "cpp"),
    "reference/cpp-tokenizer.md": (
        "The tokenizer's C++ header",
        "engines/cpp/include/qwenport/tokenizer.hpp",
        "cpp",
    ),
    "reference/c-tokenizer.md": (
        "The tokenizer's C header",
        "engines/cpp/include/qwenport/tokenizer.h",
        "c",
    ),
    "reference/cpp-chat.md": (
        "The chat's C++ header",
        "engines/cpp/include/qwenport/chat.hpp",
        "cpp",
    ),
    "reference/c-chat.md": ("The chat's C header", "engines/cpp/include/qwenport/chat.h", "c"),
    "reference/c.md": ("The C header", "engines/cpp/include/qwenport/qwenport.h", "c"),
}
CLI = """# Command line

Exit codes: 0 done, 1 parity does not hold, 2 an error that the message explains, 70 a bug in Qwenport, 129 the terminal
hung up, 130 interrupted, 141 the program that reads the output has ended, 143 terminated. Results go to stdout;
progress, notes and errors to stderr.
"""
COLUMNS = 78  # what click's help takes of a terminal of 80
COMPONENTS = ("qwenport", "qwenport.exporter", "qwenport.engines", "qwenport.validate")
MEMBERS = re.compile(
    r"^::: (\S+)\n    options:\n      members: \[(.*?)\]", re.MULTILINE | re.DOTALL
)
LINK = re.compile(r"\]\(([^)#:]+)((?:#[^)]*)?)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages, and every file of the repository that a page links to."""
    for place, name in PAGES.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, place, content=_moved(text, (ROOT / name).parent)))
    for place, (title, name, language) in HEADERS.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        page = f"# {title}\n\n`{name}`\n\n```{language}\n{text}```\n"
        files.append(File.generated(config, place, content=page))
    files.append(File.generated(config, "reference/cli.md", content=_command_line()))
    wanted = set()
    for page in [*(ROOT / "docs").rglob("*.md"), *(ROOT / name for name in PAGES.values())]:
        for target, _ in LINK.findall(page.read_text(encoding="utf-8")):
            found = (page.parent / target).resolve()
            if found.is_file() and found.suffix != ".md":
                wanted.add(found.relative_to(ROOT).as_posix())
    for name in sorted(wanted):
        if files.get_file_from_path(name) is None:
            files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links from a page in docs/ to the repository lead to the copies."""
    if page.file.src_uri in PAGES or "/" in page.file.src_uri:
        return markdown
    return _moved(markdown, ROOT / "docs")


def on_pre_build(config: Any) -> None:
    """A public name, method or field that no docstring describes fails the build."""
    import griffe

    loader = griffe.GriffeLoader(search_paths=[ROOT])
    package = loader.load("qwenport")
    loader.resolve_aliases(implicit=True)
    undocumented, exported = [], set()
    for component in COMPONENTS:
        module = (
            package if component == "qwenport" else package[component.removeprefix("qwenport.")]
        )
        for name in (str(export).strip("'") for export in module.exports or ()):
            exported.add(f"{component}.{name}")
            if not name.startswith("__"):
                undocumented += _undocumented(module.members[name], f"{component}.{name}")
    if undocumented:
        raise PluginError(f"public names without a docstring: {', '.join(undocumented)}")
    page = (ROOT / "docs" / "reference" / "python.md").read_text(encoding="utf-8")
    listed = {
        f"{c}.{name}" for c, names in MEMBERS.findall(page) for name in re.findall(r"\w+", names)
    }
    if absent := listed - exported:
        raise PluginError(f"reference/python.md has what no package exports: {', '.join(absent)}")


def _undocumented(member: Any, name: str) -> Iterator[str]:
    """The names of a public member, and of what is public in a class, that no docstring describes.

    A field may instead be described by its class's docstring or that of __init__: in backticks, or before a colon.
    """
    if not member.has_docstring:
        yield name
    if not member.is_class:
        return
    member = member.final_target if member.is_alias else member  # an alias's members are aliases
    texts = [member, member.members.get("__init__")]
    described = "\n".join(text.docstring.value for text in texts if text and text.docstring)
    for inner, value in member.members.items():
        if inner.startswith("_") or value.has_docstring or value.is_alias:
            continue
        is_field = value.is_attribute and "property" not in value.labels
        named = rf"`{inner}`|^\s*([\w, ]+, )?{inner}(, [\w, ]+)?:"
        if not (is_field and re.search(named, described, re.MULTILINE)):
            yield f"{name}.{inner}"


def _command_line() -> str:
    """Every command's --help, as the program prints it."""
    import click

    from qwenport.cli import cli

    def pages(command: click.Command, name: str, parent: click.Context | None) -> Iterator[str]:
        context = command.make_context(
            name, [], parent, resilient_parsing=True, terminal_width=COLUMNS
        )
        path = context.command_path
        yield f"{'#' * (path.count(' ') + 2)} {path}\n\n```text\n{command.get_help(context)}\n```\n"
        if isinstance(command, click.Group):
            for inner in command.list_commands(context):
                found = command.get_command(context, inner)
                assert found is not None
                yield from pages(found, inner, context)

    return "\n".join([CLI, *pages(cli, "qwenport", None)])


def _moved(text: str, folder: Path) -> str:
    """A page whose links start from `folder`, as if it lay at the root of the site."""

    def change(match: re.Match[str]) -> str:
        found = (folder / match[1]).resolve()
        if not found.is_relative_to(ROOT):
            return match[0]
        name = found.relative_to(ROOT).as_posix()
        name = next((page for page, other in PAGES.items() if name == other), name)
        return f"]({name.removeprefix('docs/')}{match[2]})"

    return LINK.sub(change, text)
