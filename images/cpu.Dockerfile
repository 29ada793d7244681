# Image of the steps on a CPU. Build from the repository's root:
#   docker build -f images/cpu.Dockerfile -t flagscale-distillation:0.1.0-cpu .
ARG BASE=python:3.11-slim

FROM ${BASE} AS build
# Where pip finds torch without CUDA; empty: the default index, whose torch brings CUDA along.
ARG TORCH_INDEX_URL=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# Megatron-Core's index builder and some wheels compile a little C++.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ make \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /src
COPY constraints.txt teacher-requirements.txt ./
RUN if [ -n "$TORCH_INDEX_URL" ]; then \
        pip install --index-url "$TORCH_INDEX_URL" "$(grep '^torch==' constraints.txt)"; \
    fi
COPY pyproject.toml README.md LICENSE ./
COPY flagscale flagscale
COPY components components
COPY pipelines pipelines
RUN pip install --constraint constraints.txt . \
    && pip install --no-deps --require-hashes --requirement teacher-requirements.txt

FROM ${BASE}
COPY --from=build /opt/venv /opt/venv
RUN useradd --uid 1000 --create-home distil
USER 1000
WORKDIR /home/distil
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1
