"""``python -m lmcore COMMAND``, and the console command ``lmcore``."""

import sys

from lmcore.errors import end_at_interrupt


def main() -> int:
    """Run the command of ``sys.argv``. Returns its exit code."""
    end_at_interrupt("lmcore: interrupted", only_in_imports=True)  # the imports of a command take seconds
    from lmcore.cli.main import main

    return main()


if __name__ == "__main__":
    sys.exit(main())
