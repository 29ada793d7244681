# Image of the steps that need no GPU. `make images` builds it; images/README.md says how.
# BASE_IMAGE: Debian or Ubuntu, with Python 3.11 or 3.12 or an apt that has it.
ARG BASE_IMAGE=python:3.11-slim

FROM ${BASE_IMAGE} AS base
RUN if ! command -v python3 >/dev/null; then \
        apt-get update \
        && apt-get install --yes --no-install-recommends python3 \
        && rm -rf /var/lib/apt/lists/*; \
    fi
RUN useradd --uid 1000 --no-create-home --home-dir /tmp distil

FROM base AS build
# Where pip finds torch without CUDA; empty: where pip finds everything else.
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
ARG EXTRAS=cluster
# pip keeps no wheels in a layer; 0 where its cache is a mounted folder.
ARG PIP_NO_CACHE_DIR=1
# Every package comes as a wheel or is plain Python: no compiler is needed.
RUN if ! python3 -c 'import ensurepip' 2>/dev/null; then \
        apt-get update \
        && apt-get install --yes --no-install-recommends python3-venv \
        && rm -rf /var/lib/apt/lists/*; \
    fi
# pip stays in a place of its own, and out of the result.
RUN python3 -m venv /opt/pip && python3 -m venv --without-pip /opt/venv
# As variables the pins hold for what builds packages too; newer pips (26.3) ask for the second one.
ENV PATH=/opt/pip/bin:$PATH PIP_PYTHON=/opt/venv/bin/python PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_CONSTRAINT=/tmp/lock/constraints.txt PIP_BUILD_CONSTRAINT=/tmp/lock/constraints.txt
WORKDIR /src
COPY images/requirements.py images/build-constraints.txt images/
COPY pyproject.toml constraints.txt teacher-requirements.txt ./
RUN python3 images/requirements.py /tmp/lock --extras $EXTRAS
RUN if [ -n "$TORCH_INDEX_URL" ]; then \
        pip install --index-url "$TORCH_INDEX_URL" "$(grep '^torch==' /tmp/lock/constraints.txt)"; \
    fi \
    && pip install --no-compile --requirement /tmp/lock/requirements.txt \
    && pip install --no-compile --no-deps --require-hashes --requirement teacher-requirements.txt
# What serves to build, to test or to browse, and never in a step. Python's own compiled files stay:
# a step's root is read-only, and each would be compiled at each start. Some libraries ship files of
# a newer Python's syntax, which do not compile and are not imported.
COPY images/prune.sh images/
RUN sh images/prune.sh /opt/venv \
    && /opt/venv/bin/python -c 'import torch; assert torch.version.cuda is None, "torch has CUDA"' \
    && printf '%s\n' /opt/flagscale /opt/tasks > "$(/opt/venv/bin/python -c \
        'import sysconfig; print(sysconfig.get_path("purelib"))')/flagscale.pth" \
    && { /opt/venv/bin/python -m compileall -qq -j 0 --invalidation-mode unchecked-hash \
        /opt/venv/lib || true; }

# lm-eval and what it alone needs, for evaluate-tasks: a layer of its own. TASKS= leaves it out.
FROM build AS tasks
ARG TASKS=tasks
COPY images/missing.py images/
RUN python3 images/requirements.py /tmp/lock --extras $TASKS \
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

FROM base
COPY --from=build /opt/venv /opt/venv
COPY --from=tasks /opt/tasks /opt/tasks
COPY --from=project /opt/flagscale /opt/flagscale
USER 1000:1000
WORKDIR /tmp
# A user without an entry in /etc/passwd, as clusters like to give, has these all the same.
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 HOME=/tmp USER=distil
ARG VERSION=""
ARG SOURCES=""
LABEL org.opencontainers.image.title="flagscale-distillation, steps without a GPU" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      flagscale.sources="${SOURCES}"
