"""`python -m experiments.self_verifier`."""

from experiments.self_verifier.run import main

main()
