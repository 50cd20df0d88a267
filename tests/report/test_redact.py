"""Secrets are hidden by name and by exact value, in every output; what is no secret stays as it is."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lmcore.config.schema import ReportConfig
from lmcore.report.html import read_run, write_report
from lmcore.report.redact import HIDDEN, is_secret_name, redact, redact_settings, secret_values
from lmcore.report.report import Report
from lmcore.report.trackers import Trackers

CANARY = "cAnArY0123456789abcdef"

SECRET_OPTIONS = [
    "my_password", "report.api_key", "hub.token", "client_secret", "Authorization", "report.webhook",
    "data.config.db_pass", "data.config.github_pat", "data.config.mysql_pwd", "data.config.sentry_dsn",
    "data.config.npm_auth", "data.config.ssh_private", "data.config.aws_secret_access_key", "apiKey", "accessToken",
    "hf_token", "dbPassword", "webhook_url", "aws_access_key_id", "private_key", "data.config.pw", "session_cookie",
]  # fmt: skip
SECRET_VARIABLES = [
    "HF_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY", "PASSWD", "GITHUB_TOKEN", "MY_KEY",
    "DB_PASS", "GITHUB_PAT", "MYSQL_PWD", "SENTRY_DSN", "NPM_AUTH", "SSH_PRIVATE", "PGPASSWORD", "DBPASS",
    "GOOGLE_CREDENTIALS", "TOKEN_OF_MINE", "LMCORE_WEBHOOK", "AWS_ACCESS_KEY_ID", "REDIS_AUTH_TOKEN", "APIKEY",
    "DB_PASS2", "MYSQL_ROOT_PW", "API_TOKEN_1", "X_COOKIE", "PASSWORDS",
]  # fmt: skip
ORDINARY = [
    "eos_token", "pad_token_id", "tokenizer", "tokens", "n_tokens", "data.train", "seed", "keyboard", "monkey",
    "key_size", "sample_tokens", "vocab_size", "text_field", "data.config.sort_key", "model.config.key",
    "data.config.secret_santa", "data.config.id_token", "data.config.query_key", "image_token", "single_pass",
    "WANDB_PROJECT", "WANDB_MODE", "PWD", "OLDPWD", "SSH_AUTH_SOCK", "HF_TOKEN_PATH", "TOKENIZERS_PARALLELISM",
    "GIT_AUTHOR_NAME", "KEYBOARD", "SSH_ASKPASS", "MAX_TOKENS", "TOKEN_COUNT", "PATH", "COMPASS",
    "EOS_TOKEN", "PAD_TOKEN", "PUBLIC_KEY", "SORT_KEY",
]  # fmt: skip


@pytest.mark.parametrize("name", [*SECRET_OPTIONS, *SECRET_VARIABLES])
def test_values_under_secret_names_are_hidden(name: str) -> None:
    assert is_secret_name(name)
    assert redact({name: CANARY}, environ={}) == {name: HIDDEN}
    flag = f"--{name}"
    for words in (["train_lm.py", flag, CANARY], ["train_lm.py", f"{flag}={CANARY}"]):
        assert CANARY not in str(redact(words, environ={}))
        assert CANARY not in redact(" ".join(words), environ={}), "in one text too"
        assert CANARY in secret_values({}, words) or "=" in words[1]
    leaf = name.rpartition(".")[2]
    for text in (f"x {name}={CANARY} y", f"a: 1\n  {leaf}: {CANARY} with words\nb: 2", f'--data.config {{"{leaf}": "{CANARY}"}}',
                 f"{{lr: 1, {leaf}: {CANARY}}}", f'{leaf}="{CANARY} with words"'):  # fmt: skip
        hidden = redact(text, environ={})
        assert CANARY not in hidden
        assert "with words" not in hidden
        assert HIDDEN in hidden
    assert redact(f"a: 1\n  {leaf}: {CANARY}\nb: 2", environ={}) == f"a: 1\n  {leaf}: {HIDDEN}\nb: 2"


@pytest.mark.parametrize("hide", [redact, redact_settings])
def test_numbers_lists_and_mappings_under_secret_names_are_hidden(hide: Callable[[Any], Any]) -> None:
    """``--data.config.api_key 12345678`` is an int when it has been read, ``passwords`` are a list."""
    values = {
        "api_key": 12345678,
        "passwords": ["alpha", ("b", 7)],
        "credentials": {"user": "me", "ttl": [None, True]},
    }
    assert hide({"data": {"config": values}}) == {
        "data": {
            "config": {
                "api_key": HIDDEN,
                "passwords": [HIDDEN, (HIDDEN, HIDDEN)],
                "credentials": {"user": HIDDEN, "ttl": [None, True]},
            }
        }
    }
    metrics = {"loss_token": 2.5, "eos_token": 3, "checkpoint.private": True}
    assert hide(metrics) == metrics, "no secrets"


@pytest.mark.parametrize("name", ORDINARY)
def test_names_that_are_no_secrets(name: str) -> None:
    assert not is_secret_name(name)
    assert redact({name: "value"}, environ={}) == {name: "value"}
    assert redact(f"  {name}: value", environ={}) == f"  {name}: value"
    if name.isupper():
        assert redact(f"{name} {CANARY}", environ={name: CANARY}) == f"{name} {CANARY}"


@pytest.mark.parametrize("name", SECRET_VARIABLES)
def test_values_of_secret_variables_are_hidden_wherever_they_are(name: str) -> None:
    environ = {name: CANARY, "HOME": "/home/someone", "SHORT_KEY": "ab"}
    nested = {"a": [f"url?x={CANARY}", {"b": (CANARY, 1, None, 2.5, True)}], "c": "ab", CANARY: 1}
    hidden = redact(nested, environ=environ)
    assert CANARY not in json.dumps(hidden)
    assert hidden["c"] == "ab"
    assert hidden["a"][1]["b"][1:] == (1, None, 2.5, True)
    assert redact("/home/someone", environ=environ) == "/home/someone"


@pytest.mark.parametrize(
    "text",
    [
        "/mnt/disk-00000000000000001/corpus",
        "corpus/task-adaptive-pretraining-corpus/*.txt",
        "risk-assessment-reports-2024-final",
        "flask-documentation-in-english.txt",
        "hf_transformersdocumentationdataset/x",
        "AKIA0123456789ABCDEF.txt",
        "prompt: Bearer of the ring-and-more-of-it",
        "FLOPs per token: 174.1 k (6 N + 12 L d T)",
        "step 100: loss=2.5, tokens: 1000",
        "runs/demo/checkpoints/step-00000010",
        "a = b",
        "日本語: はい",
        "https://host:8080/x",
        "unexpected token: 'x'",
    ],
)
def test_ordinary_text_stays_as_it_is(text: str) -> None:
    assert redact(text, environ={}) == text
    assert redact({"data.train": [text]}, environ={}) == {"data.train": [text]}


def test_ordinary_values_stay_as_they_are() -> None:
    for value in (["train_lm.py", "--model.config.n_layer", "8"], ["--api_key", "--data.train", "x"],
                  {"optim": {"lr": 0.1, "betas": (0.9, 0.95)}}, {"checkpoint.private": True}):  # fmt: skip
        assert redact(value, environ={}) == value
    assert redact("https://user:hunter2@host/x", environ={}) == f"https://user:{HIDDEN}@host/x"
    assert redact("mysql://user:hun@ter2@host/x", environ={}) == f"mysql://user:{HIDDEN}@host/x"
    here = str(Path(__file__).parent)
    assert redact(here, environ={"GOOGLE_APPLICATION_CREDENTIALS": here}) == here, "a path is no secret"


@pytest.mark.parametrize("hide", [lambda text: redact(text, environ={}), redact_settings])
@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (f"https://{CANARY}@github.com/x", "@github.com/x"),
        (f"git+https://{CANARY}:x-oauth-basic@github.com/x.git", "@github.com/x.git"),
        (f"https://{CANARY}:@host/x", "@host/x"),
        (f"https://b.s3.com/x.txt?X-Amz-Date=1&X-Amz-Signature={CANARY}", "https://b.s3.com/x.txt?X-Amz-Date=1&"),
        (f"https://b.s3.com/x?X-Amz-Credential={CANARY}%2Fs3&X-Amz-Security-Token={CANARY}", "https://b.s3.com/x?"),
        (f"https://a.blob.core.windows.net/c/x.txt?sv=2024&sig={CANARY}%3D#end", "#end"),
        (f"https://storage.googleapis.com/b/x?X-Goog-Signature={CANARY}", "googleapis.com/b/x?X-Goog-Signature="),
        (f"https://host/x.txt?token={CANARY}", "https://host/x.txt?token="),
        (f"no answer: /b/x?a=1&amp;Signature={CANARY}, tried 3 times", " /b/x?a=1"),
        (f"curl -H 'Authorization: Bearer {CANARY}' https://host/x", "' https://host/x"),
        (f"sent authorization: Basic {CANARY}, got 403", ", got 403"),
        (f'{{"Authorization": "Bearer {CANARY}"}}', '"}'),
        (f"headers {{Authorization: token {CANARY}}}", "}"),
        (f"Authorization: AWS4-HMAC-SHA256 Credential=a/b, Signature={CANARY}", "Authorization: "),
    ],
)  # fmt: skip
def test_secrets_in_urls_and_headers_are_hidden(text: str, kept: str, hide: Callable[[Any], Any]) -> None:
    """In every output, config.yaml too, and once hidden it stays as it is: a resume compares settings that were hidden."""
    hidden = hide({"text": f"see {text}"})["text"]
    assert CANARY not in hidden
    assert HIDDEN in hidden
    assert kept in hidden or hide is not redact_settings
    assert hide({"text": hidden})["text"] == hidden


@pytest.mark.parametrize(
    "text",
    [
        "ssh://git@github.com/me/x",
        "abfss://container@account.dfs.core.windows.net/x",
        "https://medium.com/@someone/post",
        "https://host/x.txt?page=2&eos_token=3&design=a",
        "mail me@example.com about https://host/x",
        '["https://a","me@b"]',
        "Authorization: granted to all",
        "is it a secret?signed=yes",
    ],
)
def test_addresses_without_a_secret_stay_as_they_are(text: str) -> None:
    assert redact_settings({"text": text}) == {"text": text}
    if not text.startswith("Authorization"):  # at the start of a line its name hides it
        assert redact(text, environ={}) == text


@pytest.mark.parametrize(
    "line", ["  webhook: null", "api_key: ~", "token=None", 'hf_token: ""', "password: false"]
)
def test_unset_secret_stays_unset(line: str) -> None:
    """Hidden, a `null` of config.yaml would be read back as a value."""
    assert redact(line, environ={}) == line


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # tensorboard's own
def test_no_output_of_a_report_holds_a_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A prompt, a row, a reason, an error and a name that quote the value of a variable; and the command line."""
    secrets = {"HF_TOKEN": f"{CANARY}-1", "DB_PASS": f"{CANARY}-2"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    text = " ".join(secrets.values())
    monkeypatch.setattr("sys.argv", ["train_lm.py", "--data.config.github_pat", f"{CANARY}-3"])
    stream = io.StringIO()
    trackers = Trackers(
        ReportConfig(trackers=["tensorboard"]), tmp_path, hyper_parameters={"x": text}, note=pytest.fail
    )
    with Report(tmp_path, stream=stream) as report:
        report.start([("model", text)])
        report.begin(total_steps=1, trackers=trackers)
        report.event("start", step=0, reason=text)
        sums: dict[str, Any] = {"loss_sum": torch.tensor(2.0), "count": 1, "metrics": {text: 1.0}}
        report.step(step=1, epoch=0.1, tokens=1, position=1, lr=1.0, **sums)
        where: dict[str, Any] = {"step": 1, "epoch": 0.1, "tokens": 1}
        report.evaluation(set=text, **where, loss=1.0, perplexity=2.0, bits_per_byte=None)
        report.samples(1, [(f"say {text}", f"{text} {CANARY}-3"), ("--password", " is an option")])
        report.warn_once(text)
        report.error(text)
        with report.task(text):
            report.end("finished", [("row", text)], commands=[("generate", f"--prompt '{text}'")])
    (tmp_path / "config.yaml").write_text(f"data:\n  config:\n    db_pass: {CANARY}-2\n")
    write_report([read_run(tmp_path)], tmp_path / "report.html")
    captured = capsys.readouterr()
    (tmp_path / "printed").write_text(stream.getvalue() + captured.out + captured.err)
    outputs = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "config.yaml"]
    assert {"metrics.jsonl", "train.log", "report.html", "printed"} < {path.name for path in outputs}
    assert any("tfevents" in path.name for path in outputs)
    for path in outputs:
        assert CANARY.encode() not in path.read_bytes(), path.name
    assert HIDDEN in (tmp_path / "printed").read_text()
    [_, sample] = [
        record
        for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
        if (record := json.loads(line))["kind"] == "sample"
    ]
    assert (sample["prompt"], sample["text"]) == ("--password", " is an option"), "no command line"
    for name in ("train.log", "printed"):
        assert "  | --password is an option\n" in (tmp_path / name).read_text(), name
    [events] = [path for path in outputs if "tfevents" in path.name]
    assert b"--password is an option" in events.read_bytes()


def test_saved_configuration_repeats_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only names of settings, exact values and URLs hide: a prompt with an assignment in it stays."""
    monkeypatch.setenv("DB_PASS", CANARY)
    values: dict[str, Any] = {
        "data": {"train": ["task-adaptive-pretraining/x.txt"], "config": {"sort_key": "length", "db_pass": "short"}},
        "evaluate": {"prompts": ["password = 'x'", "token=abc --api_key abc", f"say {CANARY}"]},
        "report": {"webhook": None, "tags": ("a", "b")},
        "optim": {"lr": 0.1},
    }  # fmt: skip
    kept = redact_settings(values)
    assert kept["data"] == {
        "train": values["data"]["train"],
        "config": {"sort_key": "length", "db_pass": HIDDEN},
    }
    assert kept["evaluate"]["prompts"] == ["password = 'x'", "token=abc --api_key abc", f"say {HIDDEN}"]
    assert kept["report"] == {"webhook": None, "tags": ["a", "b"]}
    assert kept["optim"] == {"lr": 0.1}
