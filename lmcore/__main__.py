"""``python -m lmcore COMMAND``."""

import sys

from lmcore.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
