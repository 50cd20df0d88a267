"""The encoder-decoder example: what it trains on, what it must not see, and how it is scored."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from examples.number_sequences.decode import decode, open_run, score
from examples.number_sequences.sequences import (
    END,
    PADDING,
    START,
    Sequences,
    loss_per_run,
    loss_without_padding,
    random_draws,
    to_text,
    unseen_pairs,
    vocab_size,
)
from examples.number_sequences.transformer import Transformer, build, greedy, positions

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("pair", "target"),
    [((3, 6), "< 3 4 5 6 . . ."), ((2, 0), "< 2 1 0 . . . ."), ((7, 7), "< 7 . . . . . .")],
)
def test_speed_run_between_two_numbers(pair: tuple[int, int], target: str) -> None:
    item = Sequences([pair], 7)[0]
    assert to_text(item["target"].tolist()) == target
    real = item["labels"] != PADDING
    assert item["labels"][real][-1] == END
    assert item["labels"][real][:-1].tolist() == item["target"][1 : int(real.sum())].tolist()
    assert len(item["target"]) == len(item["labels"]) == 8


def test_special_tokens_keep_their_ids_in_a_larger_vocabulary() -> None:
    assert (START, END, PADDING) == (11, 12, 13)
    item = Sequences([(9, 12)], 40)[0]
    assert item["source"].tolist() == [9, 15]
    assert item["labels"][:5].tolist() == [9, 10, 14, 15, END]
    assert (vocab_size(11), vocab_size(40)) == (14, 43)
    assert to_text([11, 9, 10, 14, 15, 12, 13]) == "< 9 10 11 12 > ."


def test_documented_splits() -> None:
    drawn = random_draws(pairs=2000)
    assert [len(drawn[name]) for name in ("train", "valid", "test")] == [2000, 200, 200]
    assert set(drawn["test"].pairs) <= set(drawn["train"].pairs)  # all are seen, as stated
    apart = unseen_pairs(numbers=20)
    sets = [set(apart[name].pairs) for name in ("train", "valid", "test")]
    assert [len(one) for one in sets] == [320, 40, 40]
    assert len(set.union(*sets)) == 400
    assert unseen_pairs(numbers=20)["test"].pairs == apart["test"].pairs


def test_loss_ignores_padding() -> None:
    logits = torch.randn(3, 5, 14, requires_grad=True)
    labels = torch.randint(0, 11, (3, 5))
    labels[1, 3:], labels[2, :] = PADDING, -100
    loss, count = loss_without_padding(logits, {"labels": labels})
    picked = -logits.log_softmax(-1).gather(2, labels.clamp(0).unsqueeze(2)).squeeze(2)
    assert count.item() == 8
    torch.testing.assert_close(loss, picked[(labels != PADDING) & (labels >= 0)].sum())
    loss.backward()
    assert logits.grad is not None
    assert logits.grad[2].abs().sum() == logits.grad[1, 3:].abs().sum() == 0
    means, runs = loss_per_run(logits, {"labels": labels})
    assert runs.item() == 2
    torch.testing.assert_close(means, picked[0].mean() + picked[1, :3].mean())


def test_original_transformer_matches_the_paper() -> None:
    torch.manual_seed(0)
    model = build(numbers=11, width=32, heads=4, layers=2).eval()
    source, target = torch.tensor([[3, 6], [2, 0]]), torch.randint(0, 11, (2, 7))
    logits = model(source, target)
    assert logits.shape == (2, 7, 14)
    # Nothing looks ahead; everything sees the whole source.
    changed = target.clone()
    changed[:, 4:] = 0
    torch.testing.assert_close(model(source, changed)[:, :4], logits[:, :4])
    assert not torch.allclose(model(source.flip(1), target), logits)
    # Its attention is PyTorch's own.
    ours = model.decoder[0].attention
    x = torch.randn(2, 7, 32)
    allowed = torch.ones(7, 7, dtype=torch.bool).tril()
    q, k, v = (one(x).unflatten(2, (4, 8)).transpose(1, 2) for one in (ours.queries, ours.keys, ours.values))
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
    torch.testing.assert_close(ours(x, x, allowed), ours.out(theirs.transpose(1, 2).flatten(2)))
    assert positions(3, 4, torch.device("cpu"))[1].tolist() == pytest.approx(
        [0.8415, 0.5403, 0.01, 0.99995], abs=1e-4
    )
    with pytest.raises(ValueError, match="multiple of heads"):
        build(width=30, heads=4)


def test_odd_width_with_one_head() -> None:
    model = build(numbers=5, width=7, heads=1, layers=1)
    assert model(torch.tensor([[1, 2]]), torch.tensor([[START, 1]])).shape == (1, 2, vocab_size(5))


def test_run_without_settings_of_its_data_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = SimpleNamespace(model=build())
    monkeypatch.setattr("examples.number_sequences.decode.load_model", lambda *args, **kwargs: loaded)
    factory = "examples.number_sequences.sequences:random_draws"
    (tmp_path / "config.yaml").write_text(f"data: {{factory: '{factory}', config: null}}\n")
    assert open_run(str(tmp_path))[1].pairs == random_draws()["test"].pairs


def test_greedy_decoding_stops_at_the_end() -> None:
    def always(source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(len(source), target.shape[1], 14)
        logits[:, :, END if target.shape[1] == 3 else 5] = 1
        return logits

    found = greedy(always, torch.zeros(2, 2), 5)
    assert found.tolist() == [[5, 5, END, PADDING, PADDING]] * 2
    result = score(found, torch.tensor([[5, 5, END, PADDING, PADDING], [5, 6, 7, END, PADDING]]))
    assert (result.exact, result.with_padding, result.without_padding) == (0.5, 0.7, 4 / 7)


def train(recipe: str, folder: Path, *options: str) -> tuple[Transformer, Sequences]:
    command = [sys.executable, "train_lm.py", "--config", f"examples/number_sequences/{recipe}.yaml"]
    subprocess.run([*command, "--run_dir", str(folder), *options], cwd=ROOT, check=True, capture_output=True)
    return open_run(str(folder))


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("recipe", ["random_draws", "unseen_pairs"])
def test_number_sequences_are_learned(recipe: str, tmp_path: Path) -> None:
    result = score(*decode(*train(recipe, tmp_path / "run")))
    assert result.exact >= 0.99
