"""The command line: python -m lmcore COMMAND."""
