"""`python -m experiments.thinking_gap`."""

from experiments.thinking_gap.run import main

main()
