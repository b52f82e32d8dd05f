"""Training of linear heads on frozen backbones, by the published recipes."""
