"""`python -m experiments.edit_conditions`."""

from experiments.edit_conditions.run import main

main()
