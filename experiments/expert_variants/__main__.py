"""`python -m experiments.expert_variants`."""

from experiments.expert_variants.run import main

main()
