"""Documents to a SentencePiece model; text to ids and back."""
