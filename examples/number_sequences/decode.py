"""Greedy decoding of the test set of a trained run.

    python -m examples.number_sequences.decode runs/unseen_pairs [--show 10]

Prints input, target and prediction of some test pairs, the share of exact matches, the accuracy of single ids with and
without padding, and the accuracy of chance.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from torch import Tensor

from examples.number_sequences.sequences import PADDING, Sequences, random_draws, to_text, unseen_pairs
from examples.number_sequences.transformer import Transformer, greedy
from lmcore.errors import RequestError
from lmcore.saved.load import load_model

MODEL = "examples.number_sequences.transformer:build"
"""Code named by a run folder is not executed, so model and data are named here."""
DATA = {
    "examples.number_sequences.sequences:random_draws": random_draws,
    "examples.number_sequences.sequences:unseen_pairs": unseen_pairs,
}


@dataclass(frozen=True, kw_only=True)
class Score:
    """Shares of 1: whole runs that are right, and single ids that are right."""

    exact: float
    with_padding: float
    without_padding: float


def score(predictions: Tensor, labels: Tensor) -> Score:
    """Compare (B, L) ids; a prediction holds PADDING behind its END."""
    right, real = predictions == labels, labels != PADDING
    return Score(
        exact=right.all(dim=1).double().mean().item(),
        with_padding=right.double().mean().item(),
        without_padding=right[real].double().mean().item(),
    )


def open_run(run_dir: str) -> tuple[Transformer, Sequences]:
    """The model of the newest good checkpoint, and the run's test set."""
    model = load_model(run_dir, factory=MODEL, device="cpu").model
    data = yaml.safe_load((Path(run_dir) / "config.yaml").read_text(encoding="utf-8"))["data"]
    if data["factory"] not in DATA:
        raise RequestError(f"{run_dir} was trained on other data: {data['factory']}")
    test = DATA[data["factory"]](**(data["config"] or {}))["test"]
    assert isinstance(model, Transformer)
    return model, test


def decode(model: Transformer, test: Sequences) -> tuple[Tensor, Tensor]:
    """(predictions, labels), both (B, L)."""
    items = [test[index] for index in range(len(test))]
    source, labels = (torch.stack([item[name] for item in items]) for name in ("source", "labels"))
    return greedy(model, source, test.length), labels


def main() -> None:
    """Print it all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir")
    parser.add_argument("--show", type=int, default=10)
    arguments = parser.parse_args()
    try:
        model, test = open_run(arguments.run_dir)
    except RequestError as refusal:
        parser.exit(refusal.exit_code, f"decode: {refusal}\n")
    predictions, labels = decode(model, test)
    for (first, last), label, predicted in list(zip(test.pairs, labels, predictions))[: arguments.show]:
        print(f"input      {first} {last}")
        print(f"target     {to_text(label.tolist())}")
        print(f"prediction {to_text(predicted.tolist())}\n")
    result = score(predictions, labels)
    ids = model.embedding.num_embeddings
    wrong = [pair for pair, label, one in zip(test.pairs, labels, predictions) if not torch.equal(label, one)]
    print(f"exact match            {result.exact:.2%} of {len(test):,} test pairs")
    print(f"accuracy, no padding   {result.without_padding:.2%} of the ids")
    print(f"accuracy, with padding {result.with_padding:.2%} of the ids (the end of every run is easy)")
    print(f"chance                 {1 / ids:.2%} of the ids, 1 run in {len({*test.pairs}):,} or fewer")
    if wrong:
        print(f"wrong                  {', '.join(map(str, wrong[:10]))}")


if __name__ == "__main__":
    main()
