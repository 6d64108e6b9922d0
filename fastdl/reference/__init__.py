"""Plain PyTorch: the ground truth for parity and the baseline for speed.

``ops`` holds each op, differentiable; ``scratch`` the three models from their formulas; ``concise`` the three
with ``torch.nn``; ``textbook`` the training loop of both; ``parity`` the rule by which a run is held to them.

The programs follow Zhang, Lipton, Li, Smola, "Dive into Deep Learning", https://d2l.ai, in names and steps.
"""
