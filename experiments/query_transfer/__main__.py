"""`python -m experiments.query_transfer`."""

from experiments.query_transfer.run import main

main()
