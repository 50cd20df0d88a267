"""The configuration: schema, parsing, help, checks. Imports no torch."""
