"""A discrete-event cluster that asks the same policy objects as the gateway, over traces."""
