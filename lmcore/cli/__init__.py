"""The command line: ``lmcore COMMAND``."""
