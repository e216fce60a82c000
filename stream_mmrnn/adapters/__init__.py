"""Adapters: predictions inside the frameworks that voice agents are made of. Each framework is an optional package."""
