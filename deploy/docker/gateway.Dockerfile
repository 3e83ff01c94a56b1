# The gateway, mock engines and the operator's commands: the core, without torch and vLLM. From a checkout:
#   docker build -f deploy/docker/gateway.Dockerfile -t ares-gateway:0.1.0 .
ARG PYTHON=3.12
FROM python:${PYTHON}-slim AS build
COPY . /source
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheel /source

FROM python:${PYTHON}-slim
# As process 1, tini passes signals on from the start, and collects processes that nobody waits for.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends tini \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /wheel /wheel
# With the clients of Kubernetes and SRV records, by which gateways find their instances.
RUN pip install --no-cache-dir "$(echo /wheel/*.whl)[discovery]" && rm -r /wheel
ENV HOME=/cache ARES_CACHE=/cache/ares XDG_CACHE_HOME=/cache HF_HOME=/cache/huggingface
RUN install --directory --owner 1000 --group 1000 /cache
USER 1000:1000
VOLUME /cache
EXPOSE 8000
# The exec form: SIGTERM, which begins the drain, reaches the command itself.
ENTRYPOINT ["tini", "--", "ares"]
CMD ["gateway", "--help"]
