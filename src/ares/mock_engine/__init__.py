"""A mock engine: the routes, control channel, telemetry and timing of a real instance, without a model.

`ares worker --simulate PROFILE` serves it. It generates tokens that are a function of the tokens before them, at the
pace of a profile's step-time model, and `/version`, its `Hello` and its metrics name it as a mock.
"""
