"""`qwenport cache`: what is kept on disk so that packages and tokenizers open faster."""

from __future__ import annotations

import time

import click

from qwenport.commands._common import print_json
from qwenport.wording import counted, size

json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object instead of text."
)


@click.group("cache")
def command() -> None:
    """What is kept on disk so that packages and tokenizers open faster.

    The first run of a package writes its lowered model and its tokenizer here, later runs read them. The cache is
    bounded, old entries make room for new ones, and it is safe to delete. It is the folder qwenport in
    $XDG_CACHE_HOME, by default ~/.cache. Beside the entries is the memory of self-tests that passed, which stays.

    \b
    Examples:
      qwenport cache list
      qwenport cache clear
    """


@command.command("list")
@json_option
def list_(as_json: bool) -> None:
    """Show where the cache is and what it holds, the entry that was used last first.

    \b
    Examples:
      qwenport cache list
      qwenport cache list --json
    """
    from qwenport.engines import MOST_CACHE_BYTES, cache_entries, cache_folder, count_passes

    folder, entries, passes = cache_folder(), cache_entries(), count_passes()
    total = sum(entry.bytes for entry in entries)
    if as_json:
        print_json(
            {
                "folder": str(folder),
                "bytes": total,
                "most_bytes": MOST_CACHE_BYTES,
                "self_tests_passed": passes,
                "entries": [
                    {
                        "path": str(entry.path),
                        "kind": entry.kind,
                        "of": entry.of,
                        "bytes": entry.bytes,
                        "used": round(entry.used),
                    }
                    for entry in entries
                ],
            }
        )
        return
    click.echo(f"{folder}: {size(total)} of at most {size(MOST_CACHE_BYTES)}")
    for entry in entries:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
        click.echo(f"{size(entry.bytes):>9}  {used}  {entry.kind:<9}  {entry.of}")
    if passes:
        click.echo(f"and the memory of {counted(passes, 'self-test')} that passed")


@command.command("clear")
@json_option
def clear(as_json: bool) -> None:
    """Remove all entries, except those that another process is writing or opening.

    Sessions that are open keep running, and self-tests that passed stay so.

    \b
    Examples:
      qwenport cache clear
    """
    from qwenport.engines import cache_folder, clear_cache

    count, freed = clear_cache()
    if as_json:
        print_json({"folder": str(cache_folder()), "entries": count, "bytes": freed})
        return
    removed = "1 entry" if count == 1 else f"{count} entries"
    click.echo(f"{cache_folder()}: {removed} removed, {size(freed)}")
