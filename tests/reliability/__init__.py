"""Promises about faults, as commands: `python -m tests.reliability [name ...]`. See docs/reliability.md."""
