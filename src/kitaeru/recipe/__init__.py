"""What a person wants: types, reading YAML, presets, explaining."""
