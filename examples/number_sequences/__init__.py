"""An encoder-decoder Transformer of one's own, trained by ``train_lm.py``."""
