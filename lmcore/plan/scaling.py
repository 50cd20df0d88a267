"""Choosing model, learning rate and batch for a text, a machine and a time budget: published laws, a fit, and the choice.

Pure functions of measured numbers; nothing here trains or reads a file. ``lmcore size`` (:mod:`lmcore.run.ladder`) measures
short runs and calls these functions.

Letters: ``N`` parameters in matrix products (without an embedding that is only looked up), ``D`` tokens trained on, ``U`` tokens
of the text, ``L`` validation loss in nats per token.

Sources:
    ``L(N, D) = E + A / N^alpha + B / D^beta``: Hoffmann et al. 2022, arXiv 2203.15556, equation 10, with the constants refitted by
    Besiroglu et al. 2024, arXiv 2404.10102. ``L(N, D) = ((Nc / N)^(alpha / beta) + Dc / D)^beta``: Kaplan et al. 2020,
    arXiv 2001.08361, equation 1.5. Repeated text: Muennighoff et al. 2023, arXiv 2305.16264. Learning rate and batch:
    Li et al. 2025 ("Step Law"), arXiv 2503.04715; Porian et al. 2024, arXiv 2406.19146. Bootstrap of a penalized fit: each sample
    perturbs the data and the centre of the penalty, as in "randomize then optimize", Bardsley et al. 2014.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from lmcore.errors import RequestError

REPEATS = 15.387756
"""``R*`` of Muennighoff et al. 2023, appendix A: this many repetitions after the first epoch, a token is worth 1/e of a new
one."""
STOPS_HELPING = 0.1
"""An epoch whose tokens are worth less than this share of new ones is considered useless."""
TOKENS_PER_PARAMETER = 20.0
"""Approximate compute-optimal ratio, Hoffmann et al. 2022 (Chinchilla), table 3: 400 M with 8.0 B, 67 B with 1.5 T."""


@dataclass(frozen=True, kw_only=True)
class Law:
    """``E + ((A / N^alpha)^(1/s) + (B / D^beta)^(1/s))^s``, where ``s`` is :attr:`joint`.

    ``s = 1`` is the sum of Hoffmann et al.; ``s = beta`` with ``E = 0`` is the law of Kaplan et al., in which the larger of the
    two terms dominates the other.
    """

    E: float
    A: float
    alpha: float
    B: float
    beta: float
    joint: float = 1.0

    def loss(self, parameters: float, tokens: float) -> float:
        """The loss of a model with this many parameters after this many (effective) tokens.

        >>> round(CHINCHILLA.loss(70e9, 1.4e12), 3)
        1.974
        """
        of_size = math.log(self.A) - self.alpha * math.log(parameters)
        of_length = math.log(self.B) - self.beta * math.log(tokens)
        return self.E + math.exp(
            self.joint * float(np.logaddexp(of_size / self.joint, of_length / self.joint))
        )


CHINCHILLA = Law(E=1.8172, A=482.01, alpha=0.3478, B=2085.43, beta=0.3658)
"""Besiroglu et al. 2024, table 1, from the runs of Hoffmann et al.: web text, 70M to 16B parameters."""


# ---------------------------------------------------------------------------------------------------- repeated text


def effective_tokens(tokens: float, unique_tokens: float) -> float:
    """The number of new tokens that ``tokens`` are worth if the text has only ``unique_tokens``.

    ``D' = U + U R* (1 - exp(-R / R*))`` with ``R = D / U - 1`` repetitions; ``D`` itself within the first epoch.

    >>> effective_tokens(5e5, 1e6), round(effective_tokens(4e6, 1e6))
    (500000.0, 3725673)
    """
    if tokens <= unique_tokens:
        return float(tokens)
    repetitions = tokens / unique_tokens - 1
    return unique_tokens * (1 + REPEATS * -math.expm1(-repetitions / REPEATS))


def worth_of_epoch(epoch: float) -> float:
    """The worth of a token in an epoch relative to a new token: the derivative of :func:`effective_tokens`; 1 in the first
    epoch."""
    return 1.0 if epoch <= 1 else math.exp(-(epoch - 1) / REPEATS)


def last_useful_epoch(worth: float = STOPS_HELPING) -> int:
    """The last epoch whose tokens are worth at least ``worth`` of new ones.

    >>> last_useful_epoch()
    36
    """
    return math.floor(1 - REPEATS * math.log(worth))


# --------------------------------------------------------------------------------------------------- published laws


@dataclass(frozen=True, kw_only=True)
class Published:
    """What a published law recommends for a budget; ``None`` for what the law does not cover."""

    source: str
    measured: str
    inside: bool
    parameters: float | None = None
    tokens: float | None = None
    learning_rate: float | None = None
    batch_tokens: float | None = None


def step_law(parameters: float, tokens: float) -> tuple[float, float]:
    """(learning rate of AdamW, tokens in a batch): ``1.79 N^-0.713 D^0.307`` and ``0.58 D^0.571`` (arXiv 2503.04715).

    >>> [float(f"{value:.3g}") for value in step_law(1e9, 1e11)]
    [0.00163, 1110000.0]
    """
    return 1.79 * parameters**-0.713 * tokens**0.307, 0.58 * tokens**0.571


def porian(parameters: float) -> tuple[float, float]:
    """(learning rate of AdamW, tokens in a batch) of a compute-optimal run: ``0.0047 (N / 108M)^(-1/3)`` and 160 sequences of
    2,048 tokens times ``(N / 108M)^(2/3)`` (arXiv 2406.19146)."""
    share = parameters / 108e6
    return 0.0047 * share ** (-1 / 3), 160 * 2048 * share ** (2 / 3)


def published(
    sizes: Sequence[float], tokens_of: Callable[[float], float], unique_tokens: float
) -> list[Published]:
    """What each published law recommends for a budget.

    Args:
        sizes: parameters of the models that can be chosen.
        tokens_of: maps a number of parameters to the tokens that the budget allows for such a model.
    """
    near = min(sizes, key=lambda n: abs(math.log(tokens_of(n) / (TOKENS_PER_PARAMETER * n))))
    fitted = min(sizes, key=lambda n: CHINCHILLA.loss(n, effective_tokens(tokens_of(n), unique_tokens)))
    tokens = tokens_of(fitted)
    rate, batch = step_law(fitted, tokens)
    porian_rate, porian_batch = porian(fitted)
    return [
        Published(
            source="Hoffmann et al. 2022 (2203.15556): 20 tokens a parameter",
            measured="70M to 16B parameters, 5B to 500B tokens",
            inside=70e6 <= near <= 16e9 and 5e9 <= tokens_of(near) <= 5e11,
            parameters=near, tokens=tokens_of(near),
        ),
        Published(
            source="Besiroglu et al. 2024 (2404.10102): L(N, D), repeated text by Muennighoff et al. 2023 (2305.16264)",
            measured="70M to 16B parameters, 5B to 500B tokens; repeated: 7M to 9B parameters",
            inside=70e6 <= fitted <= 16e9 and 5e9 <= tokens <= 5e11,
            parameters=fitted, tokens=tokens,
        ),
        Published(
            source="Li et al. 2025 (2503.04715), AdamW",
            measured="checked with 400M parameters on 40B and 1B on 100B tokens",
            inside=4e8 <= fitted <= 1.1e9 and 4e10 <= tokens <= 1.1e11,
            learning_rate=rate, batch_tokens=batch,
        ),
        Published(
            source="Porian et al. 2024 (2406.19146), AdamW",
            measured="5M to 901M parameters, 20 tokens a parameter",
            inside=5e6 <= fitted <= 9.01e8 and 10 <= tokens / fitted <= 40,
            learning_rate=porian_rate, batch_tokens=porian_batch,
        ),
    ]  # fmt: skip


# -------------------------------------------------------------------------------------------------------- the fit


@dataclass(frozen=True, kw_only=True)
class Point:
    """A finished run: parameters, tokens trained on, validation loss."""

    parameters: float
    tokens: float
    loss: float


@dataclass(frozen=True, kw_only=True)
class Interval:
    """An expected value and the range that contains the actual value with a probability of 90%."""

    low: float
    middle: float
    high: float

    @property
    def width(self) -> float:
        """Width of the whole range, as a share of the middle."""
        return (self.high - self.low) / self.middle


SEED_NOISE = 0.005
"""Prior for the relative deviation of the loss between seeds, before anything is measured; its weight is that of
:data:`SEED_RUNS` runs."""
SEED_RUNS = 4
EXPONENT, EXPONENT_SPREAD = 0.12, 0.5
"""Prior for alpha and beta, within a factor of exp(0.5): 0.076 and 0.095 where E is 0 (Kaplan et al.), 0.125 and 0.112 for small
models of Python source (docs/log.md); both grow with E."""
FLOOR_SHARE, FLOOR_SPREAD = 0.05, 1.0
"""Prior for ``E`` as a share of the lowest loss, within a factor of e: from nothing (Kaplan et al., and small models of Python
source, docs/log.md) to half of it (Hoffmann et al.)."""
FORM_ERROR = 0.015
"""Relative error because the law has only approximately this form, and because the batch of a long run is larger than that of the
ladder, for each factor of e by which a run is larger or longer than the fitted ones. For runs 20 times as long and twice as large
the fit predicts 9.4%, 2.3% and 0.8% too much (Python source, English, Japanese; docs/log.md)."""
DRAWS = 200


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A law fitted to runs on one text, with bootstrap samples of it.

    ``noise`` is the relative deviation of a single run; ``residual`` is the root mean square of those that were fitted.
    """

    law: Law
    draws: tuple[Law, ...]
    noise: float
    residual: float
    unique_tokens: float
    points: tuple[Point, ...]

    def predict(self, parameters: float, tokens: float) -> Interval:
        """The expected loss of one more run, with the range for a single run (not for the mean of many)."""
        worth = effective_tokens(tokens, self.unique_tokens)
        larger = max(1.0, parameters / max(p.parameters for p in self.points))
        longer = max(1.0, worth / max(effective_tokens(p.tokens, self.unique_tokens) for p in self.points))
        deviation = math.hypot(self.noise, FORM_ERROR * math.log(larger * longer))
        # Noise from its quantiles, in a fixed random order.
        steps = (np.arange(len(self.draws)) + 0.5) / len(self.draws)
        order = np.random.default_rng(0).permutation(len(steps))
        noise = deviation * np.array([NormalDist().inv_cdf(float(steps[i])) for i in order])
        values = np.array([law.loss(parameters, worth) for law in self.draws]) * np.exp(noise)
        low, high = np.quantile(values, (0.05, 0.95))
        middle = self.law.loss(parameters, worth)
        return Interval(low=min(float(low), middle), middle=middle, high=max(float(high), middle))


def fit(points: Sequence[Point], unique_tokens: float, *, draws: int = DRAWS, seed: int = 0) -> Fit:
    """Fit :class:`Law` with ``s = beta`` to runs by penalized least squares of the logarithm of the loss.

    The sum of Hoffmann et al. is not used because in it more tokens help a small model as much as a large one, although small
    models stop improving long before large ones. Fitted to three sizes on Python source, the sum predicted 3.21 for a run twelve
    times as long as the longest of them, which reached 2.73; this form predicted 2.75 (docs/log.md).

    The fit has five numbers from about nine runs. A penalty keeps the exponents and ``E`` near published values, with the spreads
    above, so that what the runs do not determine is as uncertain as in the literature. Each bootstrap sample draws new losses with
    the estimated noise, and new centres of the penalty with their spread.

    Raises:
        RequestError: there are fewer than four finite runs, or all have the same size or length, or scipy is not installed.
    """
    known = [p for p in points if math.isfinite(p.loss) and p.loss > 0]
    sizes, lengths = {p.parameters for p in known}, {p.tokens for p in known}
    if len(known) < 4 or len(sizes) < 2 or len(lengths) < 2:
        raise RequestError(
            f"a fit needs at least 4 finished runs of 2 sizes and 2 lengths (got {len(known)} of {len(sizes)} and {len(lengths)})"
        )
    try:
        from scipy import special
        from scipy.optimize import least_squares
    except ImportError as error:
        raise RequestError("lmcore size needs scipy: pip install scipy") from error
    n = np.array([p.parameters for p in known])
    d = np.array([effective_tokens(p.tokens, unique_tokens) for p in known])
    y = np.log([p.loss for p in known])
    n0, d0 = math.exp(float(np.mean(np.log(n)))), math.exp(float(np.mean(np.log(d))))
    x_n, x_d = np.log(n / n0), np.log(d / d0)
    lowest = float(np.exp(y.min()))
    centre = np.array([math.log(FLOOR_SHARE * lowest), math.log(EXPONENT), math.log(EXPONENT)])
    spread = np.array([FLOOR_SPREAD, EXPONENT_SPREAD, EXPONENT_SPREAD])
    penalized = [0, 3, 4]
    bounds = (
        [-20, -20, -20, math.log(0.02), math.log(0.02)],
        [math.log(lowest), 10, 10, math.log(1.5), math.log(1.5)],
    )

    def parts(theta: Any) -> tuple[Any, Any, Any]:
        """``E``, the loss of each run above ``E``, and the share of that which is due to its size, between 0 and 1."""
        log_e, log_a, log_b = theta[:3]
        alpha, beta = np.exp(theta[3:])
        of_size, of_length = (log_a - alpha * x_n) / beta, (log_b - beta * x_d) / beta
        both = np.logaddexp(of_size, of_length)
        return math.exp(log_e), np.exp(beta * both), np.exp(of_size - both)

    def model(theta: Any) -> Any:
        floor, above, _ = parts(theta)
        return np.log(floor + above)

    of_penalty = np.zeros((3, 5))
    of_penalty[range(3), penalized] = 1 / spread

    def solve(values: Any, centres: Any, noise: float, start: Any) -> Any:
        def residuals(theta: Any) -> Any:
            return np.concatenate([(model(theta) - values) / noise, (theta[penalized] - centres) / spread])

        def jacobian(theta: Any) -> Any:
            alpha, beta = np.exp(theta[3:])
            floor, above, share = parts(theta)
            total = floor + above
            of_a, of_b = above * share / total, above * (1 - share) / total
            entropy = -(special.xlogy(share, share) + special.xlogy(1 - share, 1 - share))
            of_beta = (above / total * entropy - x_d * of_b) * beta
            of_runs = np.stack([floor / total, of_a, of_b, -x_n * of_a * alpha, of_beta], axis=1)
            return np.concatenate([of_runs / noise, of_penalty])

        return least_squares(residuals, np.clip(start, *(np.array(b) + e for b, e in zip(bounds, (1e-6, -1e-6)))),
                             jacobian, bounds=bounds, x_scale="jac", max_nfev=400)  # fmt: skip

    rest = math.log(max(1e-3, float(np.exp(y.mean())) - FLOOR_SHARE * lowest))
    starts = [
        np.array([centre[0], rest + math.log(share), rest + math.log(1 - share), centre[1], centre[2]])
        for share in (0.2, 0.5, 0.8)
    ]
    noise = SEED_NOISE
    for _ in range(3):  # the noise sets the weight of the penalty, and is estimated from the residuals
        best = min((solve(y, centre, noise, start) for start in starts), key=lambda found: found.cost)
        left = model(best.x) - y
        noise = math.sqrt(
            (SEED_RUNS * SEED_NOISE**2 + float(left @ left)) / (SEED_RUNS + max(1, len(known) - 3))
        )
        starts = [best.x]
    draw = np.random.default_rng(seed)
    samples = []
    for _ in range(draws):
        values = model(best.x) + noise * draw.standard_normal(len(y))
        moved = centre + spread * draw.standard_normal(3)
        samples.append(_law(solve(values, moved, noise, best.x).x, n0, d0))
    return Fit(
        law=_law(best.x, n0, d0),
        draws=tuple(samples),
        noise=noise,
        residual=float(np.sqrt(np.mean(left**2))),
        unique_tokens=unique_tokens,
        points=tuple(known),
    )


def _law(theta: Any, n0: float, d0: float) -> Law:
    log_e, log_a, log_b = map(float, theta[:3])
    alpha, beta = map(math.exp, theta[3:])
    return Law(
        E=math.exp(log_e),
        A=math.exp(log_a + alpha * math.log(n0)),
        alpha=alpha,
        B=math.exp(log_b + beta * math.log(d0)),
        beta=beta,
        joint=beta,
    )


# ---------------------------------------------------------------------------------------- learning rate and batch


def lowest_of_parabola(values: Sequence[float], losses: Sequence[float]) -> float:
    """The value with the lowest loss: the minimum of a parabola, in the logarithm of the value, through the best value and its two
    neighbours.

    If the best is the lowest or highest value, it is returned itself, because nothing is known beyond it. Values whose loss is not
    finite (a run that diverged) are left out.

    >>> lowest_of_parabola([1, 2, 4], [3.0, 2.0, 3.0])
    2.0
    """
    tried = sorted((v, loss) for v, loss in zip(values, losses) if math.isfinite(loss))
    if not tried:
        raise RequestError("every learning rate that was tried diverged: give a smaller one to start from")
    best = min(range(len(tried)), key=lambda i: tried[i][1])
    if best in (0, len(tried) - 1):
        return float(tried[best][0])
    (x0, y0), (x1, y1), (x2, y2) = ((math.log(v), loss) for v, loss in tried[best - 1 : best + 2])
    left, right = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
    curve = (right - left) / (x2 - x0)
    if curve <= 0:  # three equal losses
        return float(tried[best][0])
    return math.exp((x0 + x1) / 2 - left / (2 * curve))


SLOPE, SLOPE_SPREAD = -1 / 6, 1 / 6
"""Prior for the slope of the logarithm of the best rate against that of the size: 0 if updates are scaled so that rates transfer
(muP; Muon), -1/3 (Porian et al.) for plain AdamW."""
RATE_NOISE = 0.35
"""Standard deviation of the logarithm of a best rate that was found on a grid of factors of two."""


def transferred_rate(best: Sequence[tuple[float, float]], parameters: float) -> tuple[float, float]:
    """(learning rate for a size, slope), from a line through the best rates of smaller sizes in logarithms. A penalty keeps its
    slope near :data:`SLOPE`: ridge regression in closed form.

    Args:
        best: (parameters, best rate) of each size.

    >>> round(transferred_rate([(1e6, 0.01)], 8e6)[0], 5)  # one size: 8 ** (-1/6)
    0.00707
    """
    x = np.log([n for n, _ in best])
    y = np.log([rate for _, rate in best])
    centred = x - x.mean()
    weight = (RATE_NOISE / SLOPE_SPREAD) ** 2
    slope = (float(centred @ y) + weight * SLOPE) / (float(centred @ centred) + weight)
    return math.exp(float(y.mean()) + slope * (math.log(parameters) - float(x.mean()))), slope


BATCH_EXPONENT = 0.383
"""Exponent of the best batch in the number of tokens: nanochat's rule (``2^19 (D / D_ref)^0.383``); with 0.571 by Li et al. 2025
the batch would differ more from that of the ladder."""


def scaled_batch(batch_blocks: int, tokens: float, for_tokens: float, *, at_most: int) -> int:
    """The power of two nearest to ``batch * (for_tokens / tokens) ** 0.383``, at least ``batch_blocks``, at most ``at_most``.

    >>> scaled_batch(8, 1e6, 1e7, at_most=512)
    16
    """
    asked = batch_blocks * (for_tokens / tokens) ** BATCH_EXPONENT
    power = 2 ** round(math.log2(max(1.0, asked)))
    return min(max(power, batch_blocks), 2 ** math.floor(math.log2(max(1, at_most))))


# ------------------------------------------------------------------------------------------------------ the choice


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A model that can be trained: its name, parameters, and tokens per second on this machine."""

    name: str
    parameters: float
    tokens_per_second: float


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A candidate with its tokens and expected loss within the budget."""

    candidate: Candidate
    tokens: float
    epochs: float
    expected: Interval


def choices(candidates: Sequence[Candidate], fitted: Fit, seconds: float) -> list[Choice]:
    """Every candidate with its expected loss after ``seconds``, the lowest first.

    The number of tokens is limited to the epochs that still help (:func:`last_useful_epoch`).
    """
    found = []
    for one in candidates:
        tokens = min(one.tokens_per_second * seconds, last_useful_epoch() * fitted.unique_tokens)
        expected = fitted.predict(one.parameters, tokens)
        found.append(
            Choice(candidate=one, tokens=tokens, epochs=tokens / fitted.unique_tokens, expected=expected)
        )
    return sorted(found, key=lambda choice: choice.expected.middle)


def speeds(measured: Sequence[tuple[float, float]], flops: Sequence[float]) -> list[float]:
    """Tokens per second for each number of FLOPs per token in ``flops``: linear interpolation in logarithms between the
    measurements; outside their range, the FLOPs per second of the nearest one.

    Args:
        measured: (FLOPs per token, tokens per second).

    >>> [round(rate) for rate in speeds([(1e6, 1000), (4e6, 500)], [2e6, 8e6])]
    [707, 250]
    """
    known = sorted(measured)
    x, y = np.log([f for f, _ in known]), np.log([rate for _, rate in known])
    found = []
    for one in np.log(flops):
        rate = float(np.interp(one, x, y)) - max(0.0, float(one - x[-1]))
        found.append(math.exp(rate))
    return found
