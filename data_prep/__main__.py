"""`python -m data_prep`, the same as the command `data-prep`."""

from data_prep.cli import entry_point

if __name__ == "__main__":
    entry_point()
