"""Documents to a memory-mapped token store."""
