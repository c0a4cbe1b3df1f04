"""`python -m experiments.stars_arms`."""

from experiments.stars_arms.run import main

main()
