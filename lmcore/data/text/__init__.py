"""Files, globs and Hub datasets -> documents."""
