"""Files, globs and Hub datasets to documents."""
