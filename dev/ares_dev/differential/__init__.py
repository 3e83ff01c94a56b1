"""The same requests to the gateway and to the vLLM API of a decode instance: their replies must be equal."""
