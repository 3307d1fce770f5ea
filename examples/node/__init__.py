"""One node of the example mesh in a process of its own: `python -m examples.node`, and `examples.node.story`."""
