"""The KV connector: our scheduler and worker sides, built on NIXL's."""
