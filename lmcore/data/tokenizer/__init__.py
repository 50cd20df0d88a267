"""Text <-> token ids: training a SentencePiece model, and opening the tokenizers of others."""
