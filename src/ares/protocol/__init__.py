"""What crosses a process boundary: messages, field names, keys."""
