"""The encoder-decoder Transformer of Vaswani et al., "Attention Is All You Need" (2017), written from scratch.

``source`` (B, S) and ``target`` (B, L) are ids; the logits (B, L, V) predict the next id at each position of the target. A
position of the target attends to itself and to earlier positions only. Padding follows the last real position, so that no
label depends on it.

Letters: B examples, S and L lengths of source and target, H heads, D width, V vocabulary. Section numbers are those of
the paper.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, relu, softmax

from examples.number_sequences.sequences import END, PADDING, START, vocab_size


def attention(queries: Tensor, keys: Tensor, values: Tensor, allowed: Tensor | None) -> Tensor:
    """Scaled dot-product attention (3.2.1): softmax(Q K^T / sqrt(D / H)) V, over (B, H, positions, D / H).

    ``allowed`` (positions of the queries, positions of the keys), boolean: which key each query may attend to.
    """
    scores = queries @ keys.transpose(-2, -1) / math.sqrt(queries.shape[-1])
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -math.inf)
    return softmax(scores, dim=-1) @ values


class MultiHeadAttention(nn.Module):
    """Attention in H heads of D / H each, side by side (3.2.2)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of heads {heads}")
        self.heads = heads
        self.queries, self.keys, self.values, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, memory: Tensor, allowed: Tensor | None = None) -> Tensor:
        """Attention of the positions of ``x`` (B, L, D) to those of ``memory`` (B, S, D)."""
        q, k, v = (
            self._split(self.queries(x)),
            self._split(self.keys(memory)),
            self._split(self.values(memory)),
        )
        return self.out(attention(q, k, v, allowed).transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, L, D) -> (B, H, L, D / H)


class FeedForward(nn.Module):
    """Two linear maps with a ReLU between them, at each position separately (3.3)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(relu(self.wide(x)))


class Residual(nn.Module):
    """LayerNorm(x + Dropout(output of the sublayer)) (3.1, 5.4)."""

    def __init__(self, width: int, rate: float) -> None:
        super().__init__()
        self.norm, self.rate = nn.LayerNorm(width), rate

    def forward(self, x: Tensor, added: Tensor) -> Tensor:
        return self.norm(x + dropout(added, self.rate, self.training))


class EncoderLayer(nn.Module):
    """Self-attention, feed-forward (3.1)."""

    def __init__(self, width: int, heads: int, rate: float) -> None:
        super().__init__()
        self.attention, self.feed_forward = MultiHeadAttention(width, heads), FeedForward(width)
        self.residuals = nn.ModuleList(Residual(width, rate) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.residuals[0](x, self.attention(x, x))
        return self.residuals[1](x, self.feed_forward(x))


class DecoderLayer(nn.Module):
    """Causal self-attention, attention to the source, feed-forward (3.1)."""

    def __init__(self, width: int, heads: int, rate: float) -> None:
        super().__init__()
        self.attention, self.to_source = MultiHeadAttention(width, heads), MultiHeadAttention(width, heads)
        self.feed_forward = FeedForward(width)
        self.residuals = nn.ModuleList(Residual(width, rate) for _ in range(3))

    def forward(self, x: Tensor, source: Tensor, allowed: Tensor) -> Tensor:
        x = self.residuals[0](x, self.attention(x, x, allowed))
        x = self.residuals[1](x, self.to_source(x, source))
        return self.residuals[2](x, self.feed_forward(x))


def positions(length: int, width: int, device: torch.device) -> Tensor:
    """Sines and cosines of geometrically growing wavelengths (3.5), (L, D)."""
    position = torch.arange(length, device=device).unsqueeze(1)
    rate = torch.exp(-math.log(10_000.0) * torch.arange(0, width, 2, device=device) / width)
    pairs = torch.stack((torch.sin(position * rate), torch.cos(position * rate)), dim=-1).flatten(1)
    return pairs[:, :width]  # an odd width has no room for the last cosine


class Transformer(nn.Module):
    """Encoder and decoder with one embedding, which is also the matrix of the output (3.4)."""

    def __init__(self, vocabulary: int, width: int, heads: int, layers: int, rate: float) -> None:
        super().__init__()
        self.width, self.rate = width, rate
        self.embedding = nn.Embedding(vocabulary, width)
        self.encoder = nn.ModuleList(EncoderLayer(width, heads, rate) for _ in range(layers))
        self.decoder = nn.ModuleList(DecoderLayer(width, heads, rate) for _ in range(layers))
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2 and not name.startswith("embedding"):
                nn.init.xavier_uniform_(parameter)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Logits (B, L, V) of the id after each position of ``target`` (B, L)."""
        length = target.shape[1]
        # Padding is at the end, so the causal mask also keeps real positions from attending to it.
        allowed = torch.ones(length, length, dtype=torch.bool, device=target.device).tril()
        memory = self._embed(source)
        for layer in self.encoder:
            memory = layer(memory)
        x = self._embed(target)
        for layer in self.decoder:
            x = layer(x, memory, allowed)
        return x @ self.embedding.weight.T

    def _embed(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids) * math.sqrt(self.width) + positions(ids.shape[1], self.width, ids.device)
        return dropout(x, self.rate, self.training)


def build(
    *, numbers: int = 11, width: int = 64, heads: int = 4, layers: int = 2, dropout: float = 0.1
) -> Transformer:
    """``model.factory``: the flags are ``--model.config.width 64`` and so on. ``numbers`` as in ``data.config``."""
    return Transformer(vocab_size(numbers), width, heads, layers, dropout)


@torch.no_grad()
def greedy(model: Transformer, source: Tensor, length: int) -> Tensor:
    """The most probable id at each position, one after another: (B, ``length``), PADDING after END."""
    target = torch.full((len(source), 1), START, device=source.device)
    ended = torch.zeros(len(source), dtype=torch.bool, device=source.device)
    for _ in range(length):
        following = model(source, target)[:, -1].argmax(-1).masked_fill(ended, PADDING)
        target = torch.cat((target, following.unsqueeze(1)), dim=1)
        ended |= following == END
    return target[:, 1:]
