"""The measuring room: what block diffusion gains on this machine, beside what else there is."""
