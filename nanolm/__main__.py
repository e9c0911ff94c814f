"""`python -m nanolm`: the same as the console script `nanolm`."""

from nanolm.cli import main

if __name__ == "__main__":
    main()
