# The learner of the predictor: the core with torch for CPUs, without vLLM. From a checkout:
#   docker build -f deploy/docker/learner.Dockerfile -t ares-learner:0.1.0 .
ARG PYTHON=3.12
FROM python:${PYTHON}-slim AS build
COPY . /source
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheel /source

FROM python:${PYTHON}-slim
# PyTorch's index of CPU wheels; without it, torch brings 4 GB of CUDA libraries.
ARG TORCH_INDEX=
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends tini \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /wheel /wheel
# hadolint ignore=DL3013
RUN pip install --no-cache-dir ${TORCH_INDEX:+--index-url ${TORCH_INDEX}} torch==2.13.0 \
    && pip install --no-cache-dir safetensors==0.8.0
RUN pip install --no-cache-dir /wheel/*.whl && rm -r /wheel
ENV HOME=/cache ARES_CACHE=/cache/ares XDG_CACHE_HOME=/cache HF_HOME=/cache/huggingface
RUN install --directory --owner 1000 --group 1000 /cache /learned
USER 1000:1000
VOLUME ["/cache", "/learned"]
ENTRYPOINT ["tini", "--", "ares"]
CMD ["predictor", "learn", "--help"]
