"""The service: OpenAI's API at the edge, token ids inside, and the controller that moves running requests."""
