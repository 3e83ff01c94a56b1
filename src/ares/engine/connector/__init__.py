"""The KV connector: NIXL's scheduler and worker side with ours in them."""
