"""Training, evaluation and export of models; the only room that imports torch.

The other rooms never import this one, so the runtime works without torch.
"""
