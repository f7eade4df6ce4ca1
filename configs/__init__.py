"""YAML shipped with the package: published figures, export presets."""
