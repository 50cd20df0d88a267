"""A corpus of a single document, which the split by content puts on one side as a whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmcore.data.corpus import Reading, open_corpus, training_texts
from lmcore.data.text.documents import side
from lmcore.errors import RequestError
from tests.support.data import Bytes


def book(on: str) -> str:
    return next(
        text for number in range(1000) if side(text := f"A book of one document, {number}.", 0.3) == on
    )


@pytest.mark.parametrize(
    ("on", "said"), [("valid", "training on all of it"), ("train", "selects no document")]
)
def test_corpus_of_one_document_trains_whatever_side_it_falls_on(tmp_path: Path, on: str, said: str) -> None:
    path = tmp_path / "book.txt"
    path.write_text(book(on))
    reading = Reading(unit="file")
    texts = list(
        training_texts(
            [str(path)], reading=reading, valid_fraction=0.3, max_bytes=10**6, seed=1, bad=lambda record: None
        )
    )
    assert texts == [book(on)]
    notes: list[str] = []
    corpus = open_corpus(
        Bytes(),  # type: ignore[arg-type]  # encodes like one
        train=[str(path)],
        valid=(),
        test=(),
        valid_fraction=0.3,
        reading=reading,
        store_dir=str(tmp_path / "stores"),
        eos=True,
        processes=1,
        worker=0,
        on_error="raise",
        max_bad_fraction=0.0,
        note=notes.append,
    )
    assert [store.n_tokens for store in corpus.train] == [len(book(on)) + 1]
    assert corpus.valid == {}
    assert any(said in line for line in notes)


def test_text_of_nothing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(RequestError, match="no text to train a tokenizer on"):
        list(
            training_texts(
                [str(tmp_path / "empty.txt")],
                reading=Reading(),
                valid_fraction=0.3,
                max_bytes=10**6,
                seed=1,
                bad=lambda record: None,
            )
        )
