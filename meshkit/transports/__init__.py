"""Transports: what carries messages between runtimes."""
