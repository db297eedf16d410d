"""`python -m rft` and `accelerate launch -m rft` are the console script `rft`."""

from rft.cli import main

if __name__ == "__main__":
    main()
