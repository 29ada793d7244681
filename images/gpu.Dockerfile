# Image of the steps on NVIDIA GPUs. `make images` builds it; images/README.md says how.
# The base brings CUDA, NCCL, torch, triton and transformer-engine, built for one another: they stay.
ARG PYTORCH_VERSION=25.12
ARG BASE_IMAGE=nvcr.io/nvidia/pytorch:${PYTORCH_VERSION}-py3

FROM ${BASE_IMAGE} AS build
ARG EXTRAS=cluster
ARG PIP_NO_CACHE_DIR=1
# The base's own pins (PIP_CONSTRAINT) are of a year before the lock; ours hold, but for its torch.
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_PYTHON=/opt/venv/bin/python \
    PIP_CONSTRAINT=/tmp/lock/constraints.txt PIP_BUILD_CONSTRAINT=/tmp/lock/constraints.txt
RUN python3 -m venv --without-pip --system-site-packages /opt/venv
WORKDIR /src
COPY images/requirements.py images/build-constraints.txt images/
COPY pyproject.toml constraints.txt teacher-requirements.txt ./
RUN python3 images/requirements.py /tmp/lock --keep-base --extras gpu $EXTRAS
RUN pip install --no-compile --requirement /tmp/lock/requirements.txt \
    && pip install --no-compile --no-deps --require-hashes --requirement teacher-requirements.txt
# A torch in the environment would hide the base's; another transformer-engine is not Megatron-Core's.
COPY images/prune.sh images/check_base.py images/
RUN sh images/prune.sh /opt/venv \
    && /opt/venv/bin/python images/check_base.py \
    && printf '%s\n' /opt/flagscale /opt/tasks > "$(/opt/venv/bin/python -c \
        'import sysconfig; print(sysconfig.get_path("purelib"))')/flagscale.pth" \
    && { /opt/venv/bin/python -m compileall -qq -j 0 --invalidation-mode unchecked-hash \
        /opt/venv/lib || true; }

# lm-eval and what it alone needs, for evaluate-tasks: a layer of its own. TASKS= leaves it out.
FROM build AS tasks
ARG TASKS=tasks
COPY images/missing.py images/
RUN python3 images/requirements.py /tmp/lock --keep-base --extras gpu $TASKS \
    && pip install --dry-run --report /tmp/report.json --requirement /tmp/lock/requirements.txt \
    && python3 images/missing.py /tmp/report.json > /tmp/tasks.txt \
    && mkdir /opt/tasks \
    && if [ -s /tmp/tasks.txt ]; then pip install --no-compile --no-deps --target /opt/tasks \
        --requirement /tmp/tasks.txt; fi \
    && { /opt/venv/bin/python -m compileall -qq -j 0 --invalidation-mode unchecked-hash \
        /opt/tasks || true; }

FROM build AS project
COPY README.md LICENSE ./
COPY flagscale flagscale
COPY components components
COPY pipelines pipelines
RUN pip install --no-deps --no-compile --target /opt/flagscale . \
    && /opt/venv/bin/python -m compileall -q --invalidation-mode unchecked-hash /opt/flagscale

# NVIDIA's image keeps its compiler: Triton and transformer-engine compile kernels as they run.
FROM ${BASE_IMAGE}
COPY --from=build /opt/venv /opt/venv
COPY --from=tasks /opt/tasks /opt/tasks
COPY --from=project /opt/flagscale /opt/flagscale
# Ubuntu's image has a user with this number already; its name does not matter.
RUN getent passwd 1000 >/dev/null || useradd --uid 1000 --no-create-home --home-dir /tmp distil
USER 1000:1000
WORKDIR /tmp
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 HOME=/tmp USER=distil
# The base lets cuBLAS compute fp32 in TF32; the second is for transformer-engine, which asks for it.
ENV TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=0 NVIDIA_TF32_OVERRIDE=0
ARG VERSION=""
ARG SOURCES=""
LABEL org.opencontainers.image.title="flagscale-distillation, steps on NVIDIA GPUs" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      flagscale.sources="${SOURCES}"
