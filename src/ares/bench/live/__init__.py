"""`ares bench live`: presets side by side over the same engines and the same requests."""
