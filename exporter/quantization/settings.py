"""Strict reading of the objects within a `quantization_config`: a key is honoured, known to be neutral, or refused."""

from __future__ import annotations

import re
from typing import Any

from qwenport.exporter.errors import ConfigError
from qwenport.exporter.keys import short

PATTERN = "re:"
"""Begins a name that is a pattern."""


class Settings:
    """One object of a `quantization_config`; every key must be asked for before `finish`."""

    def __init__(self, where: str, given: Any) -> None:
        """Take an object.

        Args:
            where: put before its keys in messages, e.g. "config_groups.group_0.".
            given: the object.

        Raises:
            ConfigError: it is no object.
        """
        if not isinstance(given, dict):
            raise ConfigError(
                f"quantization_config: {where.rstrip('.')} must be an object, found {short(given)}"
            )
        self._where, self._given = where, dict(given)

    def take(self, key: str, default: Any = None) -> Any:
        """A value of any kind."""
        return self._given.pop(key, default)

    def only(self, key: str, *allowed: Any) -> Any:
        """A value that must be one of `allowed`; the first of them if the key is absent.

        Raises:
            ConfigError: it is another.
        """
        value = self._given.pop(key, allowed[0])
        if not any(type(value) is type(other) and value == other for other in allowed):
            raise refused(f"{self._where}{key}", value)
        return value

    def required(self, key: str, *allowed: Any) -> Any:
        """As `only`, and it must be there.

        Raises:
            ConfigError: it is absent, or another.
        """
        if key not in self._given:
            raise ConfigError(f"quantization_config: {self._where}{key} is missing")
        return self.only(key, *allowed)

    def names(self, key: str) -> tuple[str, ...]:
        """A list of names and patterns; none if the key is absent or null.

        Raises:
            ConfigError: it is no list of names, or a pattern in it is no regular expression.
        """
        found = self._given.pop(key, None) or []
        if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
            raise refused(f"{self._where}{key}", found)
        for name in found:
            if name.startswith(PATTERN):
                check_pattern(f"{self._where}{key}", name.removeprefix(PATTERN))
        return tuple(found)

    def neutral(self, *keys: str) -> None:
        """Keys that change nothing."""
        for key in keys:
            self._given.pop(key, None)

    def refused(self) -> ConfigError:
        """The error for an object that is not supported, whatever is in it."""
        return refused(self._where.rstrip("."), self._given)

    def finish(self) -> None:
        """Refuse what nobody asked for.

        Raises:
            ConfigError: a key is unknown.
        """
        for key, value in self._given.items():
            raise refused(f"{self._where}{key}", value)


def check_pattern(key: str, pattern: str) -> None:
    """Refuse what is no regular expression.

    Raises:
        ConfigError: names the key.
    """
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(
            f"quantization_config: {key} has {short(pattern)}, which is no regular expression: {error}"
        ) from error


def refused(key: str, value: Any) -> ConfigError:
    """The error for a value that is not supported."""
    return ConfigError(f"quantization_config: {key} {short(value)} is not supported")
