"""Secrets are hidden in everything that a run writes."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

HIDDEN: Final = "<hidden>"
_SECRET_NAME: Final = re.compile(
    r"(?:^|[_.\-])(?:api|access|secret|private|ssh|auth|account|license|encryption|signing)[_\-]?key$"
    r"|(?:^|[_.\-])key$|(?:^|[_.\-])(?:hf|hub|api|auth|access|bearer|refresh|github|gitlab|wandb|id|session)[_\-]?token$"
    r"|(?:^|\.)token$|secret|passw(?:or)?d|passphrase|credential|^wandb_(?!mode$|project$|entity$|dir$|disabled$|silent$)"
    r"|^authorization$|(?:^|\.)webhook$|webhook_url$",
    re.IGNORECASE,
)
_SECRET_VARIABLE: Final = re.compile(r"(?:^|_)(?:KEY|TOKEN)$|^KEY_|^TOKEN_")
"""Environment style, so in capitals only: ``eos_token`` of a tokenizer is no secret, ``HF_TOKEN`` is."""
_SECRET_TEXT: Final = re.compile(
    r"hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_\-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|glpat-[A-Za-z0-9_\-]{16,}"
    r"|AKIA[0-9A-Z]{16}|xox[abpr]-[A-Za-z0-9\-]{10,}|https://hooks\.slack\.com/\S+"
    r"|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)|(?<=[Bb]earer )[A-Za-z0-9._\-]{16,}"
)
_NOTHING: Final = frozenset(("null", "none", "~", "true", "false", "''", '""', "[]", "{}"))
"""What a text may say of a secret that is not there; hidden, it would look like a value."""
_ASSIGNMENT: Final = re.compile(r"(?P<name>[A-Za-z0-9_.\-]+)(?P<sign>\s*[=:]\s*)(?P<value>[^\s,;]+)")


def is_secret_name(name: str) -> bool:
    """Whether a variable, key or option of this name holds a secret (``HF_TOKEN``, ``wandb.api_key``,
    ...).
    """
    name = name.lstrip("-")
    return bool(_SECRET_NAME.search(name) or _SECRET_VARIABLE.search(name))


def redact(value: Any, *, environ: Mapping[str, str] | None = None) -> Any:
    """The same mapping, argument list or text without its secrets.

    Hidden are: values under a secret name (in a mapping, as ``--name value``, ``--name=value`` or
    ``NAME=value``), everything that looks like a well-known kind of key, and every occurrence of the value
    of a secret environment variable of this process. Everything else is returned as it is, structure
    included.
    """
    environ = os.environ if environ is None else environ
    values = sorted(
        {v for k, v in environ.items() if is_secret_name(k) and len(v) >= 8}, key=len, reverse=True
    )
    return _redact(value, values)


def _redact(value: Any, secrets: list[str]) -> Any:
    if isinstance(value, str):
        return _redact_text(value, secrets)
    if isinstance(value, Mapping):
        return {
            _redact_text(key, secrets) if isinstance(key, str) else key: HIDDEN
            if isinstance(key, str) and is_secret_name(key) and isinstance(item, str) and item
            else _redact(item, secrets)
            for key, item in value.items()
        }
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        items: list[Any] = []
        hide_next = False
        for item in value:
            option = isinstance(item, str) and item.startswith("-")
            items.append(HIDDEN if hide_next and not option else _redact(item, secrets))
            hide_next = option and "=" not in item and is_secret_name(item)
        return tuple(items) if isinstance(value, tuple) else items
    return value


def _redact_text(text: str, secrets: list[str]) -> str:
    for secret in secrets:
        text = text.replace(secret, HIDDEN)
    text = _SECRET_TEXT.sub(HIDDEN, text)
    return _ASSIGNMENT.sub(
        lambda found: (
            f"{found['name']}{found['sign']}{HIDDEN}"
            if is_secret_name(found["name"]) and found["value"].lower() not in _NOTHING
            else found[0]
        ),
        text,
    )
