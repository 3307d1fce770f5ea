"""A mesh of nodes in one process: stash, checkpoint, social and presence services, and what happens to them.

`python -m examples.mesh [--file PATH] [--nodes 5] [--seconds N]`
"""
