"""Training data: sources, chat templates, packing, and procedural tasks."""
