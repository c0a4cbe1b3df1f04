"""Questions that need reasoning before an image can be drawn, made from a seed, each with its exact answer.

Arithmetic: how many objects there should be. Mapping: which object, by a chain of rules. Every answer is found a second
time, from the text of its question alone.
"""
