"""Training the semantic tokenizer: a VQ autoencoder's losses, and those of predicting a frozen encoder's features."""

from __future__ import annotations
