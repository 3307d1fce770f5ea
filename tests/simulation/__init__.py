"""meshkit itself, simulated: a cluster in a storm of faults, and what must hold in it, whatever happens."""
