"""Hides secrets in everything that a run writes.

What is hidden is decided by names, places and exact values, never by the look of a text: a path that happens to contain
``sk-`` stays as it is. Hidden are

- the value of an option, key or variable whose name says secret (``db_pass``, ``api_key``, ``HF_TOKEN=...``), be it a text,
  a whole number, or a list or mapping of these,
- the value, of at least 8 characters, of every environment variable whose name says secret, wherever it occurs,
- the value of every such option on the command line, likewise,
- the password of a URL (``https://user:password@host``), and the user of a web address that has no password, or none but
  ``x-oauth-basic``: a token stands there (``https://ghp_...@github.com/x``),
- in the query of a URL, the value of a name that says secret or signature (``?X-Amz-Signature=...``, ``&sig=...``),
- what follows ``Authorization: Bearer`` (or ``Basic``, ``Token`` and so on).

    >>> redact({"data.train": "corpus/task-adaptive/x.txt", "report.webhook": "https://..."})
    {'data.train': 'corpus/task-adaptive/x.txt', 'report.webhook': '<hidden>'}
"""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Final

from lmcore.conventions import HIDDEN

LEAST_CHARACTERS: Final = 8
"""Shorter values are not searched for in texts: they would hide parts of ordinary words and numbers."""


def _words(*lines: str) -> frozenset[str]:
    return frozenset(word for line in lines for word in line.split())


_ALWAYS: Final = _words(
    "password passwd passphrase passcode pwd secret secrets credential credentials creds apikey authtoken accesskey",
    "accesstoken secretkey privatekey webhook authorization dsn pat bearer jwt passwords pw cookie cookies oauth",
)
_ALWAYS_ENDS: Final = ("password", "passwd", "passphrase", "apikey", "secret", "credentials", "pwd")
_SECRET_KEYS: Final = _words(  # "api_key", but not "sort_key"
    "access account admin api app auth client deploy encryption host license master private project secret service",
    "shared signing ssh storage wandb",
)
_NO_SECRET_TOKENS: Final = _words(  # "eos_token", but not "hub_token"
    "additional all audio begin bos boi class cls decoder document end eoi eos every extra fake fim first forced id",
    "image last mask max media min new next num of pad per prefix sep separator special start stop suffix unk",
    "unknown video word",
)
_NO_SECRET_PASSES: Final = _words("backward first forward low high band multi n num one second single two")
_IN_VARIABLES: Final = _words("pass pat pwd token key keys auth dsn private") | _ALWAYS
_NO_SECRET_ENDS: Final = _words(  # "SSH_AUTH_SOCK", "HF_TOKEN_PATH": where it is, not what it is
    "algorithm binary bits column command count dir directory enabled expiry field file files folder format length",
    "limit max method min mode name names parallelism path paths port prefix size sock socket suffix timeout ttl type",
    "user username version",
)
_NO_SECRET_PAIRS: Final = frozenset(
    [
        *((word, "token") for word in _words("bos eos pad unk sep cls mask")),
        *((word, "key") for word in _words("public sort primary foreign partition")),
    ]
)
"""Ends of variables: a tokenizer's, and keys that are no secrets."""
_NO_SECRET_VARIABLES: Final = _words("PWD OLDPWD XAUTHORITY GPG_KEY")
"""The working directory, a file, and the fingerprint by which Docker images of Python were signed."""
_NO_SECRET_WORDS: Final = _words("askpass bypass compass surpass")
_NOTHING: Final = frozenset(("null", "none", "~", "true", "false", "''", '""', "[]", "{}", "", HIDDEN))
"""Values that hold no secret; hidden, a ``null`` of config.yaml would be read back as a value."""

_VALUE: Final = r"\"(?:[^\"\\]|\\.)*\"|'[^']*'"
_ASSIGNMENTS: Final = (
    re.compile(rf"(?P<before>(?<![\w.\-])(?P<name>[\w.\-]+)=)(?P<value>{_VALUE}|[^\s,;]+)"),
    re.compile(rf"(?P<before>(?<![\w.\-])(?P<name>--[\w.\-]+)\s+)(?P<value>{_VALUE}|[^\s\-]\S*)"),
    # YAML and JSON: a key begins its line or follows a brace or a comma.
    re.compile(rf"(?P<before>[{{,]\s*[\"']?(?P<name>[\w.\-]+)[\"']?\s*:\s*)(?P<value>{_VALUE}|[^\s,}}\]]+)"),
    re.compile(
        r"(?P<before>^[ \t]*(?:- )?[\"']?(?P<name>[\w.\-]+)[\"']?:[ \t]+)(?P<value>\S[^\n]*)", re.MULTILINE
    ),
)
_URL_PASSWORD: Final = re.compile(r"(?P<before>[A-Za-z][A-Za-z0-9+.\-]*://[^/\s:@]*:)[^/\s]+(?=@)")
# Web addresses only: ssh://git@host is a login, abfss://container@account a place.
_URL_TOKEN: Final = re.compile(
    r"(?P<before>https?://)[^/\s:@\"'<>,;?#]+(?=(?::(?:x-oauth-basic)?)?@)", re.IGNORECASE
)
_QUERY: Final = re.compile(r"(?P<before>[?&](?:amp;)?(?P<name>[\w.\-]+)=)(?P<value>[^&#\s\"'<>]+)")
_SIGNATURES: Final = ("sig", "signature")
"""Last words of names that give away access in a query: ``X-Goog-Signature``, and ``sig`` of Azure."""
_AUTHORIZATION: Final = re.compile(
    r"(?P<before>\bauthorization[\"']?\s*[:=]\s*[\"']?"
    r"(?:(?:bearer|basic|token|apikey|negotiate)\s+|(?=(?:aws4-|digest\s))))"
    r"(?:(?:aws4-|digest\s)[^\n\"']+|[^\s\"',;}\]]+)",
    re.IGNORECASE,
)


@functools.lru_cache(maxsize=4096)
def is_secret_name(name: str) -> bool:
    """Whether an option, key or variable of this name holds a secret.

    Names in capitals are environment variables, where any word counts (``GITHUB_PAT``, ``TOKEN_OF_X``); of other names
    the last word after the last dot does (``data.config.db_pass``; not ``sort_key``, not ``eos_token``).
    """
    name = name.lstrip("-").rpartition(".")[2]
    if name.isupper():
        return _is_secret_variable(name)
    words = [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+", name)]
    if not words:
        return False
    last, before = words[-1], words[-2] if len(words) > 1 else ""
    if last == "key":
        return before in _SECRET_KEYS
    if last == "token":
        return before not in _NO_SECRET_TOKENS
    if last == "pass":
        return before not in _NO_SECRET_PASSES
    if last in ("auth", "private"):
        return last == "auth" or bool(before)
    if last in ("url", "id"):
        return before in ("webhook", "key") and (before == "webhook" or words[-3:-2] == ["access"])
    return last in _ALWAYS or last.endswith(_ALWAYS_ENDS)


@functools.cache  # asked at every record that is written
def _is_secret_variable(name: str) -> bool:
    # DB_PASS2 is one as well
    words = [word.rstrip("0123456789") or word for word in re.split(r"[^a-z0-9]+", name.lower()) if word]
    if name.upper() in _NO_SECRET_VARIABLES or not words or words[-1] in _NO_SECRET_ENDS:
        return False
    if tuple(words[-2:]) in _NO_SECRET_PAIRS:
        return False
    return any(
        word in _IN_VARIABLES
        or (word.endswith((*_ALWAYS_ENDS, "pass", "token")) and word not in _NO_SECRET_WORDS)
        for word in words
    )


def secret_values(environ: Mapping[str, str] | None = None, argv: Sequence[str] | None = None) -> list[str]:
    """What :func:`redact` searches for in texts: values of variables and options whose name says secret."""
    environ = os.environ if environ is None else environ
    found = {value for name, value in environ.items() if _is_secret_variable(name) and not _is_path(value)}
    words = sys.argv if argv is None else argv
    for word, following in zip(words, [*words[1:], ""]):
        name, equals, value = word.partition("=")
        if name.startswith("--") and is_secret_name(name):
            found.add(value if equals else following)
    long = {value for value in found if len(value) >= LEAST_CHARACTERS and not value.startswith("--")}
    return sorted(long - _NOTHING, key=len, reverse=True)


def _is_path(value: str) -> bool:
    return value.startswith("/") and "\0" not in value and os.path.exists(value)


def redact(value: Any, *, environ: Mapping[str, str] | None = None) -> Any:
    """The same mapping, argument list or text without its secrets; structure and everything else unchanged.

    Args:
        environ: variables whose values are searched for; by default those of this process, and its command line.
    """
    return _redact(value, secret_values(environ, None if environ is None else ()))


def redact_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings without their secrets: by the names of the settings, by exact values, in URLs and in headers.

    Unlike :func:`redact` it does not search texts for assignments: a prompt that reads ``token=x`` stays as it is, so
    that the settings repeat the run.
    """
    secrets = secret_values()

    def leaf(text: str) -> str:
        for secret in secrets:
            text = text.replace(secret, HIDDEN)
        return _hide_places(text)

    def walk(value: Any) -> Any:
        if isinstance(value, str):
            return leaf(value)
        if isinstance(value, Mapping):
            return {
                key: _hidden(item) if _names_secret(key, item) else walk(item) for key, item in value.items()
            }
        return [walk(item) for item in value] if isinstance(value, (list, tuple)) else value

    return walk(values)


def hide_values(text: str) -> str:
    """``text`` without the values of secret variables and options; names in it decide nothing."""
    for secret in secret_values():
        text = text.replace(secret, HIDDEN)
    return text


def _redact(value: Any, secrets: list[str]) -> Any:
    if isinstance(value, str):
        return _redact_text(value, secrets)
    if isinstance(value, Mapping):
        return {
            _redact_text(key, secrets) if isinstance(key, str) else key: _hidden(item)
            if _names_secret(key, item)
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


def _names_secret(key: Any, item: Any) -> bool:
    return (
        isinstance(key, str)
        and (_is_value(item) or isinstance(item, Mapping | list | tuple))
        and is_secret_name(key)
    )


def _hidden(item: Any) -> Any:
    """What stands under the name of a secret, hidden: all values of a list or a mapping."""
    if isinstance(item, Mapping):
        return {key: _hidden(inner) for key, inner in item.items()}
    if isinstance(item, list | tuple):
        return type(item)(map(_hidden, item))
    return HIDDEN if _is_value(item) else item


def _is_value(item: Any) -> bool:
    """Whether ``item`` can be a secret: a text, or a number that was typed (a PIN is read as an int). No secret is a switch,
    or a fraction, as the user's own metrics are."""
    if isinstance(item, str):
        return item.lower() not in _NOTHING
    return type(item) is int


def _redact_text(text: str, secrets: list[str]) -> str:
    for secret in secrets:
        text = text.replace(secret, HIDDEN)
    text = _hide_places(text)
    for assignment in _ASSIGNMENTS:
        text = assignment.sub(_hide_value, text)
    return text


def _hide_places(text: str) -> str:
    """``text`` without what stands in the place of a secret: in a URL, or in a header that grants access."""
    if "://" in text:
        text = _URL_TOKEN.sub(rf"\g<before>{HIDDEN}", text)
        text = _URL_PASSWORD.sub(rf"\g<before>{HIDDEN}", text)
    return _AUTHORIZATION.sub(rf"\g<before>{HIDDEN}", _QUERY.sub(_hide_query, text))


def _hide_query(found: re.Match[str]) -> str:
    last = re.split(r"[._\-]", found["name"].lower())[-1]
    return f"{found['before']}{HIDDEN}" if last in _SIGNATURES else _hide_value(found)


def _hide_value(found: re.Match[str]) -> str:
    if found["value"].lower() in _NOTHING or not is_secret_name(found["name"]):
        return found[0]
    return f"{found['before']}{HIDDEN}"
