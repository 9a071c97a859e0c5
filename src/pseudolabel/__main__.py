"""`python -m pseudolabel` is the command `pseudolabel`."""

from pseudolabel.cli import main

__all__: list[str] = []

if __name__ == "__main__":
    raise SystemExit(main())
