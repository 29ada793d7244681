# Image of the steps on NVIDIA GPUs. Build from the repository's root:
#   docker build -f images/gpu.Dockerfile -t flagscale-distillation:0.1.0-gpu .
# Both bases must have the CUDA major version of the torch in constraints.txt.
ARG BUILD_BASE=nvidia/cuda:13.0.1-cudnn-devel-ubuntu24.04
ARG BASE=nvidia/cuda:13.0.1-cudnn-runtime-ubuntu24.04

FROM ${BUILD_BASE} AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        g++ git make ninja-build python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /src
COPY constraints.txt teacher-requirements.txt ./
RUN pip install --constraint constraints.txt torch setuptools wheel pybind11
COPY pyproject.toml README.md LICENSE ./
COPY flagscale flagscale
COPY components components
COPY pipelines pipelines
# Transformer Engine compiles against the torch that is installed: no isolated build.
RUN pip install --constraint constraints.txt --no-build-isolation '.[gpu]' \
    && pip install --no-deps --require-hashes --requirement teacher-requirements.txt

FROM ${BASE}
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ python3 python3-dev \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/venv /opt/venv
# Ubuntu's image has a user with this number already.
RUN id 1000 >/dev/null 2>&1 || useradd --uid 1000 --create-home distil
USER 1000
WORKDIR /tmp
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 HOME=/tmp
