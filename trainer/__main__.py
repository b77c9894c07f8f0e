"""`python -m trainer`, the same program as the console command `rsb`."""

from __future__ import annotations

from trainer.cli import app


def main() -> None:
    app(prog_name="rsb")


if __name__ == "__main__":
    main()
