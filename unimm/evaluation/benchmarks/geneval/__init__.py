"""GenEval (arXiv 2310.11513): objects, counts, colours and positions, found in images by a detector."""
