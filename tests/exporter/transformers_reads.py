"""Which keys of a config.json does the installed transformers read? Its source is walked, none of it is run.

A read is `config.x`, `self.config.x` or `any_config.x`, `getattr` and `hasattr` with a literal name, a literal key that
a config's constructor takes out of its keywords, and every field that a config class declares. Where a name is a
variable, every name that the function lists counts.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path

import transformers
from transformers import CONFIG_MAPPING

ROOT = Path(transformers.__file__).parent
SHARED = (
    "masking_utils.py",
    "modeling_rope_utils.py",
    "modeling_layers.py",
    "modeling_utils.py",
    "cache_utils.py",
    "configuration_utils.py",
    "integrations/sdpa_attention.py",
    "integrations/moe.py",
)
CONFIG = re.compile(r"(^|_)config$")
OTHER_OBJECTS = "load_config generation_config distributed_config quantization_config kernel_config"
OTHER_CLASSES = ("LoadStateDictConfig",)
CONSTRUCTORS = ("__init__", "__post_init__", "convert_rope_params_to_dict")


def keys_read(model_type: str) -> set[str]:
    """Names that transformers' modelling, mask, rope, cache and configuration code for a family reads."""
    own = ROOT / "models" / model_type
    files = [own / f"modeling_{model_type}.py", own / f"configuration_{model_type}.py"]
    found = set().union(*(_reads(file) for file in (*files, *(ROOT / name for name in SHARED))))
    # a leading underscore is a Python object's own business
    return {name for name in found if not name.startswith("_")} - names_of_class(model_type)


def names_of_class(model_type: str) -> set[str]:
    """Methods, and what a family's config class states once and for all. A key of such a name takes its place."""
    kind = CONFIG_MAPPING[model_type]
    names = {name for name in dir(kind) if not name.startswith("__")}
    return names - {field.name for field in fields(kind)}


@cache
def _reads(file: Path) -> frozenset[str]:
    found: set[str] = set()
    for statement in ast.parse(file.read_text(encoding="utf-8")).body:
        name = statement.name if isinstance(statement, ast.ClassDef) else ""
        of_config = name.endswith(("Config", "ConfigMixin")) and name not in OTHER_CLASSES
        found.update(_in(statement, of_config))
    return frozenset(found)


def _in(tree: ast.stmt, configuration: bool) -> Iterator[str]:
    """The reads below a statement; `configuration`: it is the class of configs, where `self` is one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            if _is_config(node.value, configuration):
                yield node.attr
        elif isinstance(node, ast.Call) and _name(node.func) in ("getattr", "hasattr"):
            name = _literal(node.args[1])
            if name and _is_config(node.args[0], configuration):
                yield name
        elif isinstance(node, ast.FunctionDef):
            if configuration and node.name in CONSTRUCTORS:
                yield from _taken_out_of_keywords(node)
            yield from _by_variable(node, configuration)
        elif configuration and isinstance(node, ast.ClassDef):
            yield from _fields(node)


def _by_variable(function: ast.FunctionDef, configuration: bool) -> Iterator[str]:
    """Where a config is asked for a name that is a variable: all names that the function lists."""
    asks = any(
        isinstance(node, ast.Call)
        and _name(node.func) in ("getattr", "hasattr")
        and len(node.args) > 1
        and isinstance(node.args[1], ast.Name)
        and _is_config(node.args[0], configuration)
        for node in ast.walk(function)
    )
    for node in ast.walk(function) if asks else ():
        listed = node.value if isinstance(node, ast.Assign) else getattr(node, "iter", None)
        if isinstance(listed, ast.Tuple | ast.List | ast.Set):
            yield from (name for name in map(_literal, listed.elts) if name and name.isidentifier())


def _taken_out_of_keywords(function: ast.FunctionDef) -> Iterator[str]:
    for node in ast.walk(function):
        is_call = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args
        if not is_call or node.func.attr not in ("pop", "get"):
            continue
        name = _literal(node.args[0])
        if name and _name(node.func.value) == "kwargs":
            yield name


def _is_config(node: ast.expr, configuration: bool) -> bool:
    name = _name(node)
    if configuration and name == "self":
        return True
    return bool(CONFIG.search(name)) and name not in OTHER_OBJECTS.split()


def _name(node: ast.expr) -> str:
    """The last word of `a.b.c`, or "" if it is something else."""
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def _literal(node: ast.expr) -> str | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def _fields(node: ast.ClassDef) -> Iterator[str]:
    """Annotated fields, but for ClassVars."""
    for statement in node.body:
        is_field = isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
        if is_field and "ClassVar" not in ast.unparse(statement.annotation):
            yield statement.target.id
