"""Sources: which files the entries of data.train name, and what is refused."""

from __future__ import annotations

import contextlib
import errno
import gzip
import os
import re
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lmcore.config.parse import parse
from lmcore.data.text import listing
from lmcore.data.text.documents import parts, resolve_sources
from lmcore.data.text.sources import without_run_files
from lmcore.errors import RequestError
from tests.support.texts import read_all, write_parquet


def make(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("text\n")


def test_files_of_folders_and_globs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "b.txt", "a/z.txt", "a/y.md", "a/.hidden.txt", ".git/x.txt", "a/image.png", "c.txt.gz")
    [source] = resolve_sources([str(tmp_path)])
    assert source.relative_paths == ("a/y.md", "a/z.txt", "b.txt", "c.txt.gz")
    assert source.ignored == 1
    assert source.name == re.sub(r"[^\w.-]+", "-", tmp_path.name)
    monkeypatch.chdir(tmp_path)
    [one, deep] = resolve_sources(["*.txt", "a/**"])
    assert (one.relative_paths, one.name) == (("b.txt",), Path(tmp_path).name)
    assert (deep.relative_paths, deep.name) == (("image.png", "y.md", "z.txt"), "a")
    assert all(os.path.isabs(path) for path in deep.paths)
    [named] = resolve_sources(
        [{"paths": ["b.txt", "a/z.txt"], "name": "books", "weight": 2, "encoding": "cp932", "unit": "file"}]
    )
    assert (named.name, named.weight, named.encoding, named.unit) == ("books", 2.0, "cp932", "file")
    assert [s.name for s in resolve_sources(["a/z.txt", "b.txt", {"path": "a/y.md", "name": "z-2"}])] == [
        "z",
        "b",
        "z-2",
    ]
    assert resolve_sources(["hf://owner/name"])[0].paths == ("hf://owner/name",)
    assert resolve_sources("b.txt")[0].paths == (str(tmp_path / "b.txt"),)


@pytest.mark.parametrize("start", [contextlib.nullcontext, listing.remembered])
def test_duplicate_file_raises(tmp_path: Path, start: Callable[[], Any]) -> None:
    """Also in a start, which walks a folder once: the same words twice gave the same answer, and were two sources."""
    make(tmp_path, "a.txt", "sub/b.txt")
    (tmp_path / "sub/link.txt").symlink_to(tmp_path / "a.txt")
    (tmp_path / "folder").symlink_to(tmp_path / "sub")
    for entries in (
        ["a.txt", "a.txt"],
        ["a.txt", "./*.txt"],
        ["a.txt", "sub/link.txt"],
        ["sub/b.txt", "folder/b.txt"],
        ["sub/b*.txt", "sub/b*.txt"],
        ["sub", "sub"],
        ["."],
    ):
        with start(), pytest.raises(RequestError, match="twice"):
            resolve_sources([str(tmp_path / entry) for entry in entries])


@pytest.mark.parametrize("pattern", ["*", "*.txt", "**/*.txt", "**"])
def test_glob_of_a_folder_that_may_not_be_listed_says_so(
    tmp_path: Path, pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was "no file matches": glob takes it for an empty folder."""
    make(tmp_path, "closed/a.txt")
    scandir = os.scandir

    def refuse(path: Any = ".") -> Any:
        if os.fspath(path) == str(tmp_path / "closed"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(RequestError, match=r"closed.* cannot be read[: (]+Permission denied"):
        resolve_sources([f"{tmp_path}/closed/{pattern}"])
    with pytest.raises(RequestError, match="no file matches"):
        resolve_sources([f"{tmp_path}/none/{pattern}"])


def test_symlink_loops_end_and_each_folder_is_walked_once(tmp_path: Path) -> None:
    make(tmp_path, "sub/b.txt", "z/c.txt")
    for name in ("up", "latest", "current"):
        (tmp_path / "sub" / name).symlink_to(tmp_path)
        (tmp_path / name).symlink_to(".")
    (tmp_path / "a-link").symlink_to("z")  # its own name wins, whatever comes first in the alphabet
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "broken").symlink_to("nothing")
    for entry in (str(tmp_path), f"{tmp_path}/**", f"{tmp_path}/**/*.txt"):
        assert resolve_sources([entry])[0].relative_paths == ("sub/b.txt", "z/c.txt"), entry
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "in").symlink_to(tmp_path / "z")
    assert resolve_sources([str(elsewhere)])[0].relative_paths == ("in/c.txt",)


def test_deep_folders_are_walked(tmp_path: Path) -> None:
    folders = [os.path.join(tmp_path, *"d" * depth) for depth in range(1, 1200)]
    for folder in folders:
        os.mkdir(folder)
    file = os.path.join(folders[-1], "a.txt")
    with open(file, "w") as opened:
        opened.write("text")
    found = resolve_sources([str(tmp_path)])[0].paths
    os.unlink(file)
    for folder in reversed(folders):  # pytest's own clean-up is recursive
        os.rmdir(folder)
    assert found == (file,)


def test_folders_of_the_system_are_not_walked(tmp_path: Path) -> None:
    make(tmp_path, "a.txt")
    (tmp_path / "everything").symlink_to("/proc")
    (tmp_path / "devices").symlink_to("/dev")
    os.mkfifo(tmp_path / "pipe.txt")
    for entry in (str(tmp_path), f"{tmp_path}/**"):
        [source] = resolve_sources([entry])
        assert source.relative_paths == ("a.txt",)
        assert [note.rpartition("/")[2] for note in source.notes] == [
            "devices, a folder of the system",
            "everything, a folder of the system",
        ]


def test_run_folder_inside_the_data_is_not_read(tmp_path: Path) -> None:
    make(tmp_path, "a.txt", "own/manifest.json", "own/b.jsonl")
    (tmp_path / "own" / "b.jsonl").write_text('{"text": "b"}')
    (tmp_path / "own" / "manifest.json").write_text('{"text": "c"}')
    written = [
        *(
            "runs/x/status.json",
            "runs/x/metrics.jsonl",
            "runs/x/train.log",
            "runs/x/config.yaml",
            "runs/x/notes.txt",
        ),
        *("runs/prepared/stores.json", "runs/prepared/tokenizer/tokenizer_config.json"),
        "runs/x/comparison.html",
        *("runs/x/stores.json", "runs/x/wandb/run-1/files/requirements.txt"),
        *(f"token_stores/split-{'0a' * 8}.json",),
        *("runs/x/tokenizer/tokenizer.json", "runs/x/checkpoints/step-00000001/manifest.json"),
        *("token_stores/a-0123/manifest.json", "token_stores/a-0123/part-000000.bin"),
        *("token_stores/b-0123/plan.json", "token_stores/b-0123/part-000000.json"),
        *("kept/manifest.json", "kept/state.json", "kept/model.safetensors"),
        *("tok/tokenizer.json", "tok/tokenizer_config.json"),
        *("export/config.json", "export/model.safetensors"),
    ]
    make(tmp_path, *written)
    wanted = ("a.txt", "own/b.jsonl", "own/manifest.json", "runs/x/notes.txt")
    for entry in (str(tmp_path), f"{tmp_path}/**"):
        [source] = resolve_sources([entry])
        assert source.relative_paths == wanted
        assert {note.rpartition(", ")[2] for note in source.notes} == {
            "the files of a run",
            "a token store",
            "the splits of data.valid_fraction",
            "a checkpoint",
            "a tokenizer or a model",
        }
    with pytest.raises(RequestError, match=r"no file of a known kind.*left out: .*/kept, a checkpoint"):
        resolve_sources([str(tmp_path / "kept")])


def test_files_of_a_run_in_the_folder_of_its_text_are_not_read(tmp_path: Path) -> None:
    """Everything in one folder, as in a notebook: the second start reads the same text as the first."""
    make(tmp_path, "a.txt", "b.txt")
    wanted = ("a.txt", "b.txt")
    expanded = [str(tmp_path / name) for name in wanted]
    [first] = resolve_sources(expanded, join_files=True)
    run = (
        "status.json",
        "metrics.jsonl",
        "config.yaml",
        "train.log",
        "report.html",
        f"split-{'0a' * 8}.json",
    )
    make(tmp_path, *run)
    expanded += [str(tmp_path / name) for name in run]
    for entries in ([f"{tmp_path}/*"], expanded, [str(tmp_path)], [f"{tmp_path}/**"]):
        [source] = resolve_sources(entries, join_files=True)
        assert source.relative_paths == first.relative_paths == wanted
        assert source.name == first.name
    assert resolve_sources([f"{tmp_path}/*"])[0].notes == (f"left out: {tmp_path}, the files of a run",)
    named = [str(tmp_path / "metrics.jsonl"), str(tmp_path / "config.yaml")]
    assert len(resolve_sources(named, join_files=True)[0].paths) == 2, "on purpose"
    [alone] = resolve_sources([str(tmp_path / "a.txt"), *named], join_files=True)
    assert (alone.name, alone.relative_paths) == ("a", ("a.txt",))


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (
            ("data/train-00000-of-00002.parquet", "data/validation-00000-of-00001.parquet"),
            "data/validation-00000",
        ),
        (("train/a.jsonl", "train/b.jsonl", "test/a.jsonl"), "test/a.jsonl like train/a.jsonl"),
        (("Stories-train.txt", "Stories-valid.txt"), "Stories-valid.txt"),
        (("wiki.Train.txt.gz", "wiki.dev.txt.gz"), "wiki.dev.txt.gz"),
        (("train-00000.jsonl", "train-00001.jsonl"), None),
        (("train.py", "test.py", "trains.txt", "tests.txt"), None),
        (("train.txt", "test_of_time.txt"), None),
    ],
)
def test_splits_of_a_dataset_in_one_source_are_said(
    tmp_path: Path, names: tuple[str, ...], said: str | None
) -> None:
    """The folder of a dataset of the Hub: its validation and test text was trained on without a word."""
    make(tmp_path, *names)
    for entry in (str(tmp_path), f"{tmp_path}/**"):
        [source] = resolve_sources([entry])
        assert len(source.paths) == len(names)  # said, and read all the same
        assert len(source.notes) == (said is not None)
        assert (said or "") in "".join(source.notes)
    if said and "train/" not in names[0]:
        assert resolve_sources([f"{tmp_path}/**/*[Tt]rain*"])[0].notes == ()


@pytest.mark.parametrize("names", [("a.txt",), ("a.txt", "b.txt")])
def test_folders_of_a_run_in_the_folder_of_its_text_are_not_read(
    tmp_path: Path, names: tuple[str, ...]
) -> None:
    """A shell expands folder/* to them, and the same command must go on with the run."""
    make(tmp_path, *names)
    [first] = resolve_sources([str(tmp_path / name) for name in names], join_files=True)
    make(
        tmp_path,
        *("stores.json", "metrics.jsonl", "tokenizer/tokenizer_config.json", "logs/rank-1.log"),
        *("checkpoints/step-00000001/manifest.json", "checkpoints/step-00000001/state.json"),
        *("token_stores/a-0123/manifest.json", "token_stores/a-0123/part-000000.bin"),
        *("runs/x/status.json", "runs/x/metrics.jsonl"),
    )
    expanded = sorted(map(str, tmp_path.iterdir()))
    [again] = resolve_sources(expanded, join_files=True)
    assert (again.name, again.paths, again.relative_paths) == (first.name, first.paths, first.relative_paths)
    assert again.notes == (
        f"left out: {tmp_path}, the files of a run",
        f"left out: {tmp_path}/runs, nothing but what a training has written",
        f"left out: {tmp_path}/token_stores, nothing but what a training has written",
    )
    words = ["--data.train", *expanded]
    begun = parse(["--data.train", *(str(tmp_path / name) for name in names)])
    noted: list[str] = []
    assert parse(words, note=noted.append, own_entries=without_run_files) == begun
    assert [note for note in noted if "left out" in note] == [f"data.train: {note}" for note in again.notes]
    (tmp_path / "runs" / "own.txt").write_text("text")
    assert len(resolve_sources(expanded, join_files=True)) == 2


@pytest.mark.parametrize("option", ["data.train", "data.valid", "data.test"])
def test_expanded_glob_of_the_text_leaves_out_runs_and_stores_beside_it(tmp_path: Path, option: str) -> None:
    """What the run wrote into the folder of the text is in the same unquoted glob the next time."""
    make(tmp_path, "a.txt", "b.txt")
    own = [f"--{option}", str(tmp_path / "a.txt"), str(tmp_path / "b.txt"), "--run_dir", str(tmp_path)]
    if option != "data.train":
        make(tmp_path / "other", "train.txt")
        own += ["--data.train", str(tmp_path / "other" / "train.txt")]
    begun = parse([*own, "--data.store_dir", str(tmp_path)])
    make(tmp_path, "status.json", "metrics.jsonl", "split-0123456789abcdef.json")
    make(tmp_path / "text-0123456789abcdef", "manifest.json", "part-00000.bin", "part-00000.ends")
    expanded = [str(path) for path in sorted(tmp_path.glob("*")) if path.name != "other"]
    words = [f"--{option}", *expanded, *own[3:]]
    noted: list[str] = []
    again = parse(
        [*words, "--data.store_dir", str(tmp_path)], note=noted.append, own_entries=without_run_files
    )
    assert again == begun
    assert any("a token store of data.store_dir" in line for line in noted)
    # A recipe may say where the stores are; elsewhere a store beside text was named because its tokens are wanted.
    recipe = tmp_path.parent / f"{tmp_path.name}.yaml"
    recipe.write_text(f"data: {{store_dir: {tmp_path}}}\n")
    assert parse(["--config", str(recipe), *words], own_entries=without_run_files).data == begun.data
    kept = getattr(parse(words, own_entries=without_run_files).data, option.split(".")[1])
    assert str(tmp_path / "text-0123456789abcdef") in kept


def test_expanded_glob_is_the_same_source(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    make(
        folder,
        *(f"part-{n}.jsonl.gz" for n in range(3)),
        "other.jsonl.gz",
        "a.txt",
        "b.txt",
        "deep/x.txt",
        "deep/y.txt",
        "other/z.txt",
        "c.md",
    )
    for pattern in ("*.txt", "part-*.jsonl.gz", "*/*.txt"):
        expanded = sorted(str(path) for path in folder.glob(pattern))
        quoted, unquoted = (
            resolve_sources([f"{folder}/{pattern}"]),
            resolve_sources(expanded, join_files=True),
        )
        assert quoted == unquoted, pattern
    # No glob gives these files: still one source, which is named after their folder.
    [source] = resolve_sources([f"{folder}/a.txt", f"{folder}/deep/x.txt", f"{folder}/c.md"], join_files=True)
    assert (source.name, source.relative_paths) == ("corpus", ("a.txt", "c.md", "deep/x.txt"))
    # A folder, a mapping and a file of tokens are sources of their own.
    (folder / "t.bin").write_bytes(b"\0\0")
    entries = [
        f"{folder}/a.txt",
        f"{folder}/deep",
        {"path": f"{folder}/c.md"},
        f"{folder}/b.txt",
        f"{folder}/t.bin",
    ]
    assert [len(source.paths) for source in resolve_sources(entries, join_files=True)] == [2, 2, 1, 1]
    with pytest.raises(RequestError, match="twice"):
        resolve_sources([f"{folder}/a.txt", f"{folder}/a.txt"], join_files=True)


@pytest.mark.parametrize("name", ["[D] set", "q?", "a*b", "{x}", "null", "[a]"])
def test_names_with_glob_characters(tmp_path: Path, name: str) -> None:
    make(tmp_path, f"{name}/{name}.txt", "other/other.txt")
    for entry in (
        tmp_path / name,
        tmp_path / name / f"{name}.txt",
        tmp_path / name / "*.txt",
        tmp_path / name / "**",
    ):
        [source] = resolve_sources([str(entry)])
        assert source.relative_paths == (f"{name}.txt",)


def test_long_and_undecodable_file_names(tmp_path: Path) -> None:
    names = [
        b"n" * 240 + b".txt",
        "日本語のとても長い名前".encode() * 7 + b".txt",
        b"caf\xe9.txt",
        b"a\x1b[2J.txt",
    ]
    for name in names:
        with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:
            file.write(b"text\n\0bad\n")
    for path in (os.fsdecode(os.path.join(os.fsencode(tmp_path), name)) for name in names):
        [source] = resolve_sources([path], unit="line")
        assert len(f"{source.name}-valid-{16 * 'f'}".encode()) <= 255
        documents, bad, _ = read_all(source)
        assert [document.text for document in documents] == ["text"]
        assert str(bad[0]).encode()
        assert "\x1b" not in str(bad[0])
        "".join(source.relative_paths).encode()
    assert len(resolve_sources([str(tmp_path)])[0].paths) == 4


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("corpus.tx", r"no such file or folder: .*corpus\.tx; did you mean 'corpus\.txt'\?"),
        ("other.txt", r"no such file or folder: .*other\.txt$"),
        ("*.nothing", r"no file matches '.*\*\.nothing'"),
        ("fold*", r"no file matches .*only folders: folder.*\*\*"),
        ("folder", r"no file of a known kind.*wiki_00.*/\*\*'"),
        ("https://host/a", "unknown scheme https"),
        ("pipe", "not a regular file.*write its text to a file"),
        ("-", "standard input.*write it to a file"),
        ({"path": "corpus.txt", "wieght": 1}, r"unknown option 'wieght' .*; did you mean 'weight'\?"),
        ({"weight": 1}, "without a path"),
        ({"paths": []}, "without a path"),
        ({"paths": 5}, "a path must be a text, not 5"),
        ({"path": ["corpus.txt", None]}, "a path must be a text, not None"),
        ({"path": "corpus.txt", "encoding": 5}, "encoding 5 is not known"),
        ({"path": "corpus.txt", "weight": True}, "positive"),
        ({"path": "corpus.txt", "weight": float("nan")}, "positive"),
        (None, "a source is a path.*not None"),
        (7, "a source is a path.*not 7"),
        ({"path": "corpus.txt", "weight": 0}, "positive"),
        ({"path": "corpus.txt", "unit": "lines"}, r"unknown unit 'lines'; .*; did you mean 'line'\?"),
        ({"path": "corpus.txt", "encoding": "shift-jiss"}, "encoding 'shift-jiss' is not known"),
        ({"path": "corpus.txt", "encoding": "rot13"}, "encoding 'rot13' is not known"),
        ({"path": "corpus.txt", "encoding": "punycode"}, "encoding 'punycode' is not known"),
        ({"path": "corpus.txt", "name": "../../evil"}, "becomes a folder name.*without /"),
        ({"path": "corpus.txt", "name": "."}, "becomes a folder name"),
        ({"path": "corpus.txt", "name": "a\x1b[2J"}, "without control characters"),
        ({"path": "corpus.txt", "name": "n" * 250}, "may have 200 bytes"),
        ({"path": "corpus.txt", "weight": float("inf")}, "positive"),
        ("corpus.txt\0", "NUL"),
        ("x" * 300, "cannot be read: File name too long|no such file"),
        (
            {"path": "a.jsonl", "text_field": "txt"},
            r"no field 'txt', but 'text', 'url': set text_field of this source; did you mean 'text'\?$",
        ),
        ({"path": "a.csv", "text_field": "body"}, "no field 'body', but 'id', 'text'"),
        ({"path": "a.parquet", "text_field": "texts"}, "no field 'texts'.*'text'"),
    ],
)
def test_wrong_requests(tmp_path: Path, entry: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path, "corpus.txt", "folder/wiki_00")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "a.jsonl").write_text('broken\n{"text": "a", "url": "b"}\n')
    (tmp_path / "a.csv").write_text("id,text\n1,a\n")
    write_parquet(tmp_path / "a.parquet", ["a"])
    with pytest.raises(RequestError, match=message) as caught:
        resolve_sources([entry])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.zip", b"PK\x03\x04rest", "a zip archive"),
        (
            "a.tar.gz",
            gzip.compress(b"\0" * 257 + b"ustar" + b"\0" * 600, mtime=0),
            "a tar archive: unpack it",
        ),
        ("a.txt", b"\x7fELF\0\0", "a program"),
        ("a", b"PAR1\0\0", "a parquet file: give it a name that ends in .parquet"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\n", "a git-lfs pointer.*git lfs pull"),
        ("a.jsonl", b"BZh91AY&SY\0\0", "bzip2 data: give it a name that ends in .bz2"),
        # Not to be told to have the ending that it has
        ("a.txt.gz", gzip.compress(gzip.compress(b"text")), "gzip data: decompress it"),
        ("a.tgz", gzip.compress(b"\0" * 600), "a compressed tar archive: unpack it"),
        ("a.txt", b"\x04\x22\x4d\x18\x64\x40", "lz4 data: decompress it"),
        ("data-00000-of-00001.arrow", b"\xff\xff\xff\xff\xa0\1\0\0", "an Arrow file.*write it as parquet"),
        ("a.orc", b"ORC\n\x16\0\0", "an ORC file: write it as parquet"),
        ("a.avro", b"Obj\x01\x04\x14avro.codec", "an Avro file: write its text as JSON lines"),
    ],
)
def test_archive_named_as_text_is_refused_at_once(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RequestError, match=rf"{re.escape(name)} is not text but {message}"):
        resolve_sources([str(tmp_path / name)])


def test_text_may_begin_like_an_orc_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("ORC is a file format.")
    assert resolve_sources([str(tmp_path / "a.txt")])


@pytest.mark.parametrize("folder", ["", "train"])
def test_folder_of_save_to_disk_is_named_as_one(tmp_path: Path, folder: str) -> None:
    """Its descriptions are JSON: "the records have no field 'text', but 'citation', ..." was about them."""
    make(
        tmp_path, *(f"{folder or '.'}/{name}" for name in ("dataset_info.json", "state.json", "data-0.arrow"))
    )
    with pytest.raises(RequestError, match=r"save_to_disk, whose Arrow files \(data-0.arrow\).*to_parquet"):
        resolve_sources([str(tmp_path)])
    make(tmp_path, "a.txt")
    (tmp_path / folder / "dataset_info.json").write_text('{"citation": ""}')
    with pytest.raises(RequestError, match="no field 'text'"):  # a folder of several things is read as before
        resolve_sources([str(tmp_path)])


@pytest.mark.parametrize(
    ("name", "content", "remedy"),
    [
        (
            "a.csv",
            "id;text\n1;a\n",
            "separated by ';', not by a comma: write it with commas, or as JSON lines",
        ),
        ("a.csv", "text|id\na|1\n", r"separated by '\|', not by a comma"),
        ("a.csv", "id\ttext\n1\ta\n", r"give it a name that ends in \.tsv"),
        ("a.tsv", "id,text\n1,a\n", r"give it a name that ends in \.csv"),
        ("a.csv", "sep=,\nid,text\n1,a\n", "remove its first line"),
        ("a.csv", "sep=;\nid;text\n1;a\n", "remove its first line"),
    ],
)
def test_csv_with_another_separator_is_named_as_one(
    tmp_path: Path, name: str, content: str, remedy: str
) -> None:
    """The whole header was offered as data.text_field, with which whole rows would be trained on."""
    (tmp_path / name).write_text(content)
    with pytest.raises(RequestError, match=remedy):
        resolve_sources([str(tmp_path / name)])
    (tmp_path / "0.csv").write_text("text,id\na,1\n")  # the first file is right
    _, bad, _ = read_all(resolve_sources([str(tmp_path)])[0])
    assert re.search(remedy, bad[0].reason)


def test_remedy_for_a_field_of_one_source_does_not_break_the_others(tmp_path: Path) -> None:
    """data.text_field alone was offered, though the training text has its field."""
    (tmp_path / "valid.jsonl").write_text('{"body": "x"}\n')
    path = str(tmp_path / "valid.jsonl")
    with pytest.raises(RequestError, match=r"for this source alone '\{path: \.\.\., text_field: NAME\}'"):
        resolve_sources([path])
    [source] = resolve_sources([{"path": path, "text_field": "body"}])
    assert [document.text for document in read_all(source)[0]] == ["x"]


def test_field_missing_in_some_records_is_allowed(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"title": "a"}\n{"text": "b"}\n')
    documents, bad, _ = read_all(resolve_sources([str(tmp_path / "a.jsonl")])[0])
    assert ([d.text for d in documents], len(bad)) == (["b"], 1)


def test_unit_auto_rule(tmp_path: Path) -> None:
    def unit(files: dict[str, str]) -> tuple[str, str]:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_text(content)
        [source] = resolve_sources([str(folder)])
        return source.unit, source.unit_reason

    assert unit({"a.py": "x\n\ny", "b.py": "", "c.txt": ""}) == ("file", "auto: mostly source code or markup")
    assert unit({"a.txt": "x", "b.txt": "y"}) == ("file", "auto: 2 files, the median at most 1 MiB")
    assert unit({"a.txt": "x\n\ny\n"}) == ("paragraph", "auto: blank lines in a.txt")
    assert unit({"a.txt": "x\ny\n"}) == ("line", "auto: no blank lines in a.txt")
    assert unit({"a.txt": "\n\nx\ny\n\n"})[0] == "line"
    big = "line\n" * 250_000
    assert unit({"a.txt": big, "b.txt": big + "\n\nx"})[0] == "line"
    assert unit({"a.jsonl": '{"text": "a"}'})[1] == "auto: no plain text files"


def test_unit_auto_takes_time_in_proportion_to_the_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    for line in ("word " * 25_000 + "\n", "x" * 2**20, "\r" * 2**20, "a\n" * 2**19, " \n" * 2**19):
        path.write_text((line * (2**20 // len(line) + 1))[: 2**20])
        started = time.perf_counter()
        resolve_sources([str(path)])
        assert time.perf_counter() - started < 5  # about 0.05 s; a minute where it is quadratic


def test_many_files_are_listed_in_linear_time(tmp_path: Path) -> None:
    for number in range(10_000):
        if number % 1000 == 0:
            (tmp_path / str(number)).mkdir()
        (tmp_path / str(number // 1000 * 1000) / f"{number}.txt").write_text("text")
    started = time.perf_counter()
    [source] = resolve_sources([str(tmp_path)])
    assert len(parts(source)[0].pieces) == 10_000
    assert time.perf_counter() - started < 10  # about 0.3 s


def test_many_files_named_one_by_one_take_linear_time(tmp_path: Path) -> None:
    files = [str(tmp_path / f"{number}.txt") for number in range(5000)]
    for file in files:
        Path(file).write_text("text")
    started = time.perf_counter()
    [source] = resolve_sources(files, join_files=True)
    assert len(source.paths) == 5000
    assert len(resolve_sources(files)) == 5000
    assert time.perf_counter() - started < 10  # about 0.7 s


def test_gzip_of_one_long_line_is_read_in_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(300):
            file.write(b"x" * 2**20)
    [source] = resolve_sources([str(path)])
    tracemalloc.start()
    documents, bad, _ = read_all(source)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (documents, [record.n_bytes for record in bad]) == ([], [300 * 2**20])
    assert peak < 270 * 2**20


def test_standard_library_corpus() -> None:
    [source] = resolve_sources(["stdlib"])
    assert (source.name, source.unit) == ("stdlib", "file")
    assert all(path.endswith(".py") for path in source.paths)
    assert not any(
        "test" in path.split("/")[:-1] or "site-packages" in path for path in source.relative_paths
    )
    documents, bad, _ = read_all(source, part_bytes=2**20)
    assert bad == []
    assert 8e6 < sum(len(d.text.encode()) for d in documents) < 20e6
    assert read_all(source)[0] == documents


@pytest.mark.parametrize("entry", ["", "/*", "/*.txt", "/**/*.txt"])
def test_links_without_their_target_are_said(tmp_path: Path, entry: str) -> None:
    """A disk that is not mounted, or files of git-annex that were not fetched, looked like a smaller corpus."""
    make(tmp_path, "text/a.txt", "text/b.txt", "empty/.keep")
    (tmp_path / "text" / "link.txt").symlink_to(tmp_path / "text" / "a.txt")
    (tmp_path / "text" / "a.txt").unlink()
    (tmp_path / "text" / "circle.txt").symlink_to("circle.txt")
    (tmp_path / "empty" / "x.txt").symlink_to("/not/mounted/x.txt")
    [source] = resolve_sources([f"{tmp_path}/text{entry}"])
    assert source.relative_paths == ("b.txt",)
    [note] = source.notes
    assert re.search(
        r"left out: .*\.txt, a link to .*, which is not there, and 1 other link without a target", note
    )
    with pytest.raises(RequestError, match=r"x.txt, a link to /not/mounted/x.txt, which is not there"):
        resolve_sources([f"{tmp_path}/empty{entry}"])
