"""`python -m experiments.knowledge_transfer`."""

from experiments.knowledge_transfer.run import main

main()
