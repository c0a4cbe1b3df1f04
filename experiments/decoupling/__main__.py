"""`python -m experiments.decoupling`."""

from experiments.decoupling.run import main

main()
