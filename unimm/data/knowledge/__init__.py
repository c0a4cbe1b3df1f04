"""Invented characters: what is known of them, the texts that teach it, and the questions that ask for it."""
