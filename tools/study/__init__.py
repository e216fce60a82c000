"""The study's parts: what is run (`plan`), how (`runs`), and how it is told (`text`, `plots`)."""
