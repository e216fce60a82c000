"""Training and export. Torch lives here and nowhere else; the runtime never imports this package."""
