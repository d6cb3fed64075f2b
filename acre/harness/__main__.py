"""`python -m acre.harness`."""

from acre.harness import main

if __name__ == "__main__":
    raise SystemExit(main())
