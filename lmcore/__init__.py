"""lmcore: pretraining of causal language models on your own text.

The rooms, in the order in which the data flows through them::

    text -> tokenizer -> tokens -> order -> blocks -> batches -> model -> loss -> engine (+ optim) -> checkpoint

Nothing is imported here: ``python train_lm.py --help`` must not pay for torch.
"""

from __future__ import annotations

__version__ = "0.1.0"
