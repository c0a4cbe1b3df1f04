"""`python -m experiments.edit_weights`."""

from experiments.edit_weights.run import main

main()
