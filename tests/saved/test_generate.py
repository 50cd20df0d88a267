"""Generation: seeded, streamed in whole characters, within the context; the model is left as it was."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lmcore.data.tokenizer.training import train_tokenizer
from lmcore.errors import RequestError
from lmcore.model.build import build_model
from lmcore.model.module import ModelWithLoss
from lmcore.saved.generate import Draw, choose, generate, stream, tokens_seen


@pytest.fixture(scope="module")
def words() -> Any:
    texts = ["def f(x):\n    return x + 1\n", "吾輩は猫である。\n"] * 40
    return train_tokenizer(texts, vocab_size=300)


def build(words: Any, context: int = 64) -> Any:
    return build_model(
        type="gpt2",
        config_overrides={"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": context},
        vocab_size=words.vocab_size,
        special_ids=words.special_ids,
        block_size=8,
        seed=1,
    )


class Script(nn.Module):
    """Returns plain logits that make a given text the most probable one, whatever was said before."""

    def __init__(self, ids: Sequence[int], prompt: int, vocabulary: int) -> None:
        super().__init__()
        self.ids, self.prompt, self.vocabulary = list(ids), prompt, vocabulary
        self.scale = nn.Parameter(torch.tensor(9.0))
        self.dropout = nn.Dropout(0.5)
        self.seen: list[int] = []

    def forward(self, input_ids: Tensor) -> Tensor:
        self.seen.append(input_ids.shape[1])
        logits = torch.zeros(1, input_ids.shape[1], self.vocabulary)
        written = input_ids.shape[1] - self.prompt
        logits[0, -1, self.ids[written]] = self.scale
        return self.dropout(logits) if self.training else logits


def test_greedy_equals_transformers_generate(words: Any) -> None:
    model = build(words).eval()
    model.generation_config.pad_token_id = words.eos_id
    ids = words.encode("def f(x):")
    ours = generate(model, words, ["def f(x):"], 30, temperature=0)[0]
    limit = torch.arange(model.config.vocab_size) >= model.real_vocab_size
    forbid: Any = lambda _, scores: scores.masked_fill(limit, -torch.inf)  # noqa: E731 - what generate() calls
    theirs = model.generate(
        torch.tensor([ids]), max_new_tokens=30, do_sample=False, logits_processor=[forbid]
    )
    new = [token for token in theirs[0, len(ids) :].tolist() if token != words.eos_id]
    assert ours == words.decode(new)
    assert len(new) > 5


def test_ids_that_the_tokenizer_does_not_have_are_never_drawn(words: Any) -> None:
    model = build(words)
    model.real_vocab_size = model.config.vocab_size  # as of pretrained weights, whose vocabulary is padded
    assert model.config.vocab_size > words.vocab_size
    with torch.no_grad():
        model.transformer.wte.weight[words.vocab_size :] *= 1000
    assert generate(model, words, ["def "], 20, temperature=0, stop_at_eos=False)[0]


def test_model_that_takes_no_cache_generates(words: Any) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = build_model(
        type="lfm2",
        config_overrides={**sizes, "intermediate_size": 48, "layer_types": ["conv", "conv"]},
        vocab_size=words.vocab_size,
        special_ids=words.special_ids,
        block_size=8,
        seed=1,
    )
    ids = words.encode("def f(x):")
    for _ in range(4):
        with torch.no_grad():
            logits: Any = model(input_ids=torch.tensor([ids])).logits
        ids.append(int(logits[0, -1, : words.vocab_size].argmax()))
    ours = generate(model, words, ["def f(x):"], 4, temperature=0, stop_at_eos=False)[0]
    assert ours == words.decode(ids)[len("def f(x):") :]


def test_seed_decides_and_prompts_are_independent(words: Any) -> None:
    model = build(words)
    both = generate(model, words, ["def ", "吾輩"], 20, seed=3)
    assert both == [generate(model, words, [p], 20, seed=3)[0] for p in ("def ", "吾輩")]
    assert both != generate(model, words, ["def ", "吾輩"], 20, seed=4)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    generate(model, words, ["x"], 5)
    assert torch.equal(before, torch.get_rng_state()), "training's random state is not touched"


def test_stream_yields_whole_characters(words: Any) -> None:
    text = "猫と𠮷野家で😀を見た。"
    ids = words.encode(text)
    assert len(ids) > len(text), "some characters are encoded as bytes here"
    prompt = "名前は"
    model = Script([*ids, words.eos_id], len(words.encode(prompt)), words.vocab_size)
    pieces = list(stream(model, words, prompt, 100, temperature=0))
    assert "".join(pieces) == text
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces)
    assert len(pieces) > 5, "it streams"
    broken = list(stream(model, words, prompt, len(words.encode("猫と")) + 2, temperature=0))
    assert "".join(broken).startswith("猫と"), "what ends half is shown as it is, not lost"


def test_training_mode_is_restored_and_dropout_is_off(words: Any) -> None:
    ids = words.encode("猫である")
    model = Script(ids, 1, words.vocab_size)
    model.train()
    model.dropout.eval()
    assert generate(model, words, ["x"], len(ids), temperature=0) == ["猫である"]
    assert model.training
    assert not model.dropout.training
    assert model.scale.grad is None


def test_generation_beyond_the_context(words: Any) -> None:
    model = build(words, context=16)
    pieces = list(stream(model, words, "def f(x):\n    return", 60, stop_at_eos=False))
    assert len(words.encode("".join(pieces))) >= 30
    loss_module = ModelWithLoss(model)
    assert list(stream(loss_module, words, "def f(x):\n    return", 60, stop_at_eos=False)) == pieces


@pytest.mark.parametrize("letters", [15, 16, 17, 40])
def test_tokens_of_a_prompt_that_the_model_sees_are_counted(words: Any, letters: int) -> None:
    model, prompt = build(words, context=16), "§" * letters
    lengths: list[int] = []
    model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: lengths.append(inputs[0].shape[1])
    )
    list(stream(model, words, prompt, 1))
    assert tokens_seen(model, words, prompt) == (lengths[0], len(words.encode(prompt)))


def test_empty_prompt_starts_a_document(words: Any) -> None:
    model = Script([*words.encode("ab"), words.eos_id], 1, words.vocab_size)
    assert generate(model, words, [""], 10, temperature=0) == ["ab"]
    assert model.seen == [1, 2, 3]


def test_top_k_and_top_p() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, 3.0])
    generator = torch.Generator().manual_seed(0)

    def drawn(**settings: Any) -> set[int]:
        base = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
        return {choose(logits, Draw(generator=generator, **(base | settings))) for _ in range(300)}

    assert drawn() == {0, 1, 2, 3}
    assert drawn(temperature=0) == {3}
    assert drawn(top_k=2) == {2, 3}
    assert drawn(top_k=9) == {0, 1, 2, 3}
    # softmax: .032 .087 .237 .644
    assert drawn(top_p=0.6) == {3}
    assert drawn(top_p=0.7) == {2, 3}
    assert drawn(top_p=0.9) == {1, 2, 3}
    counts = torch.zeros(4)
    draw = Draw(temperature=1.0, top_k=0, top_p=1.0, generator=generator)
    for _ in range(2000):
        counts[choose(logits, draw)] += 1
    torch.testing.assert_close(counts / 2000, torch.softmax(logits, 0), atol=0.04, rtol=0)


def test_settings_out_of_range_and_broken_weights_raise(words: Any) -> None:
    model = Script([5], 1, words.vocab_size)
    nan, inf = float("nan"), float("inf")
    wrong_values: dict[str, list[float]] = {
        "temperature": [-1, nan, inf],
        "top_p": [0, 1.5, nan],
        "top_k": [-1],
        "repetition_penalty": [0, -1, nan, inf],
    }
    for wrong in ({name: value} for name, values in wrong_values.items() for value in values):
        with pytest.raises(RequestError, match="must be"):
            generate(model, words, ["x"], 1, **wrong)
    with torch.no_grad():
        model.scale.fill_(torch.nan)
    with pytest.raises(RequestError, match="not finite"):
        generate(model, words, ["x"], 1)


def test_any_temperature_above_zero_is_finite() -> None:
    """At 1e-40 every logit divided by it is infinite; the softmax must still be that of the largest."""
    logits = torch.tensor([-3.0, 5.0, 4.9])
    for temperature in (1e-40, 1e-300, 1e300):
        draw = Draw(temperature=temperature, top_k=0, top_p=1.0, generator=torch.Generator().manual_seed(0))
        drawn = {choose(logits, draw) for _ in range(100)}
        assert drawn == ({1} if temperature < 1 else {0, 1, 2})


def test_repetition_penalty_lowers_what_was_there() -> None:
    logits = torch.tensor([2.0, 1.9, -1.0, -1.05])
    draw = Draw(temperature=0, top_k=0, top_p=1.0, repetition_penalty=1.2, generator=torch.Generator())
    assert choose(logits, draw, []) == 0
    assert choose(logits, draw, [0, 0, 7]) == 1, "ids beyond the logits (padding) are ignored"
    assert choose(logits[2:], draw, [0]) == 1, "a negative logit becomes more negative"
    assert logits.tolist() == pytest.approx([2.0, 1.9, -1.0, -1.05]), "the model's logits are not changed"


def test_any_repetition_penalty_above_zero_is_finite() -> None:
    """A logit divided by 1e-300 is infinite, and 1e300 itself is so in float32."""
    logits = torch.tensor([2.0, 0.0, -1.0])
    for penalty, temperature in itertools.product((1e-300, 1e-40, 1e300), (0.0, 1e-40, 0.8)):
        draw = Draw(
            temperature=temperature,
            top_k=0,
            top_p=1.0,
            repetition_penalty=penalty,
            generator=torch.Generator(),
        )
        # Divided by a huge penalty the first logit is 0, like the second.
        assert choose(logits, draw, [0, 1, 2]) in ({0} if penalty < 1 else {0, 1})


def test_repetition_penalty_ends_loops(words: Any) -> None:
    model = build(words)
    settings: dict[str, Any] = {"temperature": 0, "stop_at_eos": False}
    looped = words.encode(generate(model, words, ["x"], 30, **settings)[0])
    freed = words.encode(generate(model, words, ["x"], 30, repetition_penalty=2.0, **settings)[0])
    assert len(set(freed)) > len(set(looped))


def test_prompt_that_is_not_unicode_raises(words: Any) -> None:
    with pytest.raises(RequestError, match="not valid Unicode at character 4"):
        stream(build(words), words, "caf\udce9", 1)
    with pytest.raises(RequestError, match="no tokenizer"):
        stream(build(words), None, "x", 1)
