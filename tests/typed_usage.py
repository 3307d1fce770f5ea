"""Usage that must type-check, and infer exactly; mypy and pyright read this file, nothing runs it."""
