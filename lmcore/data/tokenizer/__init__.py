"""Text <-> token ids: training SentencePiece models, and loading other tokenizers."""
