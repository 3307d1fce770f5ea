"""Programs worth copying: each utility alone, and a mesh of services."""
