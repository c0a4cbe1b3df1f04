"""`python -m experiments.latent_words`."""

from experiments.latent_words.run import main

main()
