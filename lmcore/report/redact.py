"""Hides secrets in everything that a run writes.

What is hidden depends on names, positions and exact values, never on what a text looks like: a path that happens to contain
``sk-`` stays as it is. The following is hidden:

- the value of an option, key or variable with the name of a secret (``db_pass``, ``api_key``, ``HF_TOKEN=...``): text, an
  integer, or a list or mapping of these,
- the value, if it has at least 8 characters, of every environment variable with the name of a secret, wherever it occurs,
- likewise, the value of every such option on the command line,
- the password in a URL (``https://user:password@host``), and the user of a web address without a password, or with the
  password ``x-oauth-basic``, because it is a token (``https://ghp_...@github.com/x``),
- in the query of a URL, the value of a name of a secret or signature (``?X-Amz-Signature=...``, ``&sig=...``),
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
"""Shorter values are not searched for in texts, because this would hide parts of ordinary words and numbers."""


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
_NO_SECRET_ENDS: Final = _words(  # "SSH_AUTH_SOCK", "HF_TOKEN_PATH": the place of a secret, not its value
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
"""Last words of variables that are not secrets: of a tokenizer, and certain keys."""
_NO_SECRET_VARIABLES: Final = _words("PWD OLDPWD XAUTHORITY GPG_KEY")
"""The working directory, the name of a file, and the fingerprint of the key that signed Python in Docker images."""
_NO_SECRET_WORDS: Final = _words("askpass bypass compass surpass")
_NOTHING: Final = frozenset(("null", "none", "~", "true", "false", "''", '""', "[]", "{}", "", HIDDEN))
"""Values that are not secrets; if ``null`` in config.yaml were hidden, it would be read back as a value."""

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
# Web addresses only: in ssh://git@host it is a login name, in abfss://container@account a container.
_URL_TOKEN: Final = re.compile(
    r"(?P<before>https?://)[^/\s:@\"'<>,;?#]+(?=(?::(?:x-oauth-basic)?)?@)", re.IGNORECASE
)
_QUERY: Final = re.compile(r"(?P<before>[?&](?:amp;)?(?P<name>[\w.\-]+)=)(?P<value>[^&#\s\"'<>]+)")
_SIGNATURES: Final = ("sig", "signature")
"""Last words of query parameters that grant access: ``X-Goog-Signature``, and Azure's ``sig``."""
_AUTHORIZATION: Final = re.compile(
    r"(?P<before>\bauthorization[\"']?\s*[:=]\s*[\"']?"
    r"(?:(?:bearer|basic|token|apikey|negotiate)\s+|(?=(?:aws4-|digest\s))))"
    r"(?:(?:aws4-|digest\s)[^\n\"']+|[^\s\"',;}\]]+)",
    re.IGNORECASE,
)


@functools.lru_cache(maxsize=4096)
def is_secret_name(name: str) -> bool:
    """Whether an option, key or variable of this name holds a secret.

    Names in capitals are environment variables, in which any word counts (``GITHUB_PAT``, ``TOKEN_OF_X``). In other names only
    the last word after the last dot counts (``data.config.db_pass``; not ``sort_key`` or ``eos_token``).
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


@functools.cache  # called for every record that is written
def _is_secret_variable(name: str) -> bool:
    # Ignore digits at the end: DB_PASS2 is a secret as well.
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
    """The values that :func:`redact` searches for in texts: those of variables and options with the name of a secret."""
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
    """The same mapping, argument list or text without its secrets; structure and everything else are unchanged.

    Args:
        environ: variables whose values are searched for; default: those of this process, and its command line.
    """
    return _redact(value, secret_values(environ, None if environ is None else ()))


def redact_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings without their secrets: by the names of the settings, by exact values, in URLs and in headers.

    Unlike :func:`redact` it does not search texts for assignments: a prompt ``token=x`` is unchanged, so that the settings
    repeat the run.
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
    """``text`` without the values of secret variables and options; names inside the text have no effect."""
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
    """The value of a secret, hidden; in a list or mapping, all values are hidden."""
    if isinstance(item, Mapping):
        return {key: _hidden(inner) for key, inner in item.items()}
    if isinstance(item, list | tuple):
        return type(item)(map(_hidden, item))
    return HIDDEN if _is_value(item) else item


def _is_value(item: Any) -> bool:
    """Whether ``item`` can be a secret: text, or an integer (a PIN is parsed as an int). Not a bool, and not a float, because the
    user's own metrics are floats."""
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
    """``text`` without what is in the position of a secret: in a URL, or in a header that grants access."""
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
