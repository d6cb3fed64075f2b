"""`python -m acre` is the `acre` command."""

from acre.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
