# An instance: vLLM's own image with ARES in it. From a checkout:
#   docker build -f deploy/docker/worker.Dockerfile -t ares-worker:0.1.0 .
# Use one image, and so one version of vLLM and NIXL, for all instances of a pool.
ARG VLLM=v0.32.0
FROM python:3.12-slim AS build
COPY . /source
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheel /source

FROM vllm/vllm-openai:${VLLM}
USER 0
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends tini \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /wheel /wheel
RUN pip install --no-cache-dir nixl==1.5.1 /wheel/*.whl && rm -r /wheel
ENV HOME=/cache ARES_CACHE=/cache/ares XDG_CACHE_HOME=/cache HF_HOME=/cache/huggingface
RUN install --directory --owner 1000 --group 1000 /cache
USER 1000:1000
VOLUME /cache
# HTTP, the control channel, and NIXL's handshake, as the chart sets them.
EXPOSE 8100 8200 8300
ENTRYPOINT ["tini", "--", "ares"]
CMD ["worker", "--help"]
